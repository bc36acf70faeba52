"""Models for other programs, and from them: `python -m moe_jax export`, `train.py --init-from` and `--upcycle`.

    architectures.py  which class of transformers, and which architecture of llama.cpp, holds which configuration
    source.py         a verified checkpoint as arrays on the host
    layers.py         weights in the conventions of other programs
    huggingface.py    config.json and model.safetensors, for transformers
    gguf_file.py      one GGUF file, for llama.cpp and ollama (extra `gguf`)
    tokenizers.py     the tokenizer in the form of each; gguf_vocabulary.py, as GGUF holds it
    chat_template.py  the role format of tuned runs as templates of both
    card.py           the model card and ollama's Modelfile
    export.py         all of it, into a folder that is whole or absent

    starting_point.py    the settings that a run of an imported model starts from
    pretrained_shape.py  config.json of a Hugging Face folder -> ModelConfig, or a refusal by name
    weight_files.py      the headers of its safetensors files, checked before any tensor is read
    tensor_table.py      which tensor is which part of our parameters
    pretrained.py        the folder, opened: shape, tokenizer, parameters

Nothing here imports torch, and nothing is compiled. This room lies below `training`, which starts runs from imports.
"""
