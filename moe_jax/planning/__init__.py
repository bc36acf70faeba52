"""The memory that a run needs, known before it starts: `plan`, and `train.py --preset auto`.

target.py         descriptions of GPUs for XLA's compiler, which lie in targets/
device_memory.py  the memory of a compiled program, also on GPUs that need not be there (extra `gpu-plan`)
search.py         the settings of a preset that fit a GPU; the memory of a step on a mesh of GPUs
auto.py           the preset and the steps for a text, the memory of this machine, and a time
"""
