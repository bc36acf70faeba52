"""Models for other programs: `python -m moe_jax export`.

    architectures.py  which class of transformers, and which architecture of llama.cpp, holds which configuration
    source.py         a verified checkpoint as arrays on the host
    huggingface.py    config.json and model.safetensors, for transformers
    gguf_file.py      one GGUF file, for llama.cpp and ollama (extra `gguf`)
    tokenizers.py     the tokenizer in the form of each
    card.py           the model card and ollama's Modelfile
    export.py         all of it, into a folder that is whole or absent

Nothing here imports torch, and nothing is compiled.
"""
