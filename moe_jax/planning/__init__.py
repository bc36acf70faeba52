"""The memory that a run needs on a GPU, found without the GPU: `python -m moe_jax plan` (extra `gpu-plan`).

    device_memory.py  the device memory of one compiled program on a described GPU
    search.py         the settings of a preset that fit a GPU
    suite.py          the suite `benchmark.py memory`
    targets/          descriptions of GPUs for XLA's compiler

Nothing here runs on a GPU, except `plan --verify`.
"""
