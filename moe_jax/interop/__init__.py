"""Models for other programs, and from them: `python -m moe_jax export`, `import`, `train.py --init-from`, `--upcycle`.

    architectures.py  which class of transformers, and which architecture of llama.cpp, holds which configuration
    source.py         a verified checkpoint as arrays on the host, in the conventions of other programs
    huggingface.py    which tensor of transformers is which of our parameters, for both ways; and config.json
    gguf_file.py      one GGUF file with its vocabulary, for llama.cpp and ollama (extra `gguf`)
    tokenizers.py     the tokenizer, and the role format of tuned runs, in the form of each
    export.py         all of it with a model card, into a folder that is whole or absent
    html.py, page/    one page that runs the model in a browser

    pretrained_shape.py  a folder, downloaded by its name; its config.json -> ModelConfig, or a refusal by name
    weight_files.py      the headers of its safetensors files, checked before any tensor is read
    pretrained.py        the folder, opened: shape, tokenizer, parameters
    imported_run.py      the folder as a run to read, its weights rounded part by part

Nothing here imports torch, and nothing is compiled. The folder lies below `training`, which starts runs from imports.
"""
