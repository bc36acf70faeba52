"""Pictures of runs: `python -m moe_jax plot` (extra `plots`).

`figures.py` draws the curves of one run or of several, and the load of the experts.
"""
