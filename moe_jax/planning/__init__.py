"""The memory and the time that a run needs, found before it starts: `python -m moe_jax plan` (for GPUs, which need not
be there, extra `gpu-plan`).

    target.py         descriptions of GPUs for XLA's compiler, which lie in targets/
    device_memory.py  the device memory of one compiled program on a described GPU
    plan_cache.py     what a plan has compiled, kept for later plans
    roofline.py       the time of a program, predicted from its kernels
    search.py         the settings of a preset that fit a GPU
    ahead_of_time.py  a step compiled for many GPUs or TPUs (extra `tpu-plan`)
    interconnect.py   their links, and the time of a collective
    tpu.py            slices of TPUs
    many_devices.py   a plan for many devices, and the table `plan --scaling`
    suite.py          the suite `benchmark.py memory`
    own_text.py       the settings for a text, on this machine
    plan_in_words.py  such a plan with its reasons, in sentences
    text_size.py      the bytes and the tokens of a text

Nothing runs on a GPU, except with `plan --verify`. A plan for a text within a time measures a matrix product on this
machine.
"""
