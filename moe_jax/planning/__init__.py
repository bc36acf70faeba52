"""The memory and the time that a run needs on a GPU, found without the GPU: `python -m moe_jax plan` (extra
`gpu-plan`).

    target.py         descriptions of GPUs for XLA's compiler, which lie in targets/
    device_memory.py  the device memory of one compiled program on a described GPU
    roofline.py       the time of a program, predicted from its kernels
    search.py         the settings of a preset that fit a GPU
    ahead_of_time.py  a step compiled for many GPUs or TPUs (extra `tpu-plan`)
    interconnect.py   their links, and the time of a collective
    tpu.py            slices of TPUs
    many_devices.py   a plan for many devices, and the table `plan --scaling`
    suite.py          the suite `benchmark.py memory`

Nothing here runs on a GPU, except `plan --verify`.
"""
