"""The language model: `transformer.py` (the whole model), `attention.py`, `moe/` (routing and experts), `precision.py`
(which dtype computes and stores what), `kernels/`, `costs.py` (parameters and operations by formula)."""
