"""The memory and the time that a run needs on a GPU, found without the GPU: `python -m moe_jax plan` (extra
`gpu-plan`).

    target.py         descriptions of GPUs for XLA's compiler, which lie in targets/
    device_memory.py  the device memory of one compiled program on a described GPU
    roofline.py       the time of a program, predicted from its kernels
    search.py         the settings of a preset that fit a GPU
    suite.py          the suite `benchmark.py memory`

Nothing here runs on a GPU, except `plan --verify`.
"""
