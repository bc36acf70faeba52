"""Using a trained model: `python -m moe_jax generate` and `chat`. The other packages write texts with it too.

decode.py           Decoder: prefill and cached decoding of one text or of several independent ones; TextGenerator
sampling.py         from logits to the next token
chat.py             a conversation and its commands
traced_pass.py      one forward pass with every routing decision
"""
