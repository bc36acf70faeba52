"""The memory that a run needs, known before it starts: `plan`, and `train.py`, which fits itself to its device.

target.py         descriptions of GPUs for XLA's compiler, which lie in targets/
device_memory.py  the memory of a compiled program, also on GPUs that need not be there (extra `gpu-plan`)
plans.py          one setting with the memory of its programs, and those that are recorded in plans.json
ladder.py         the settings with which a run may fit a device, from the fastest on; the memory of a step on a mesh
fitting.py        the choice of `train.py` on this machine's device, and what config.json says of it
card.py           what JAX needs of this machine, and what its card reaches: `doctor --gpu`
auto.py           the preset and the steps for a text, the memory of this machine, and a time
"""
