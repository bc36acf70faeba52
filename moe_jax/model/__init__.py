"""The language model.

transformer.py  the whole model: embedding, blocks, head
attention.py    causal attention, whole or one token at a time
moe/            routing and experts
layers.py       the small parts: initial values, norms, rotary positions, dropout
low_rank.py     adapters of low rank
quantized.py    weights of 8 or 4 bits, for inference only
kernels/        the expensive operations, one function each
precision.py    the device, and which dtype computes and stores what on it
costs.py        parameters, operations and the least memory of a training step, by formula
"""
