"""Experiments with trained models: `python -m moe_jax compare` and `samples`.

    comparison.py         a mixture of experts and its dense baselines, trained over seeds
    comparison_result.py  the table and the verdicts of a comparison
    comparison_plots.py   the pictures of a comparison
    intervals.py          means over seeds with confidence intervals
    samples.py            the texts that a model writes, and how much they repeat and vary
    minimal_pairs.py      which of two texts that differ in one word a model finds likelier
    text_statistics.py    shares of repeated and of different n-grams

The dense baselines are `config.baselines`.
"""
