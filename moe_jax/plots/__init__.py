"""Pictures of runs: `python -m moe_jax plot` (extra `plots`).

    figures.py  curves of one run or of several, and the load of the experts
    scaling.py  the picture of `plan --scaling`

The figures of a trace are `inspection.trace`.
"""
