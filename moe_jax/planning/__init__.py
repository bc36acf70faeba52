"""The memory that a run needs, known before it starts: `plan`, and `train.py`, which fits itself to its device.

plans.py      the recorded plans: presets on well-known cards (plans.json); `benchmarks/record_plans.py` writes them
fitting.py    the settings with which a run may fit a device, and the choice of `train.py`
card.py       what JAX needs of this machine, and what its card reaches: `doctor --gpu`
"""
