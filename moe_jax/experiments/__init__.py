"""Experiments with models: `compare`, `samples`, and `evaluate` with `--pairs`, `--copies` or `--tasks`.

    comparison.py         a mixture of experts and its dense baselines, trained over seeds
    comparison_result.py  the table and the verdicts of a comparison
    comparison_plots.py   the pictures of a comparison
    tuning.py             the search for the learning rate and the depth of each model
    ladder.py             budgets of training operations, and their runs
    power_law.py          a power law fitted to losses, and what it predicts
    scaling.py            the mixture and its dense baseline over the ladder of budgets
    expert_counts.py      mixtures of several numbers of experts beside the dense baseline
    sweep_plots.py        the pictures of the last two
    study_runs.py         the training runs of all of these: finished ones are not trained again
    report.py             table, sentences, record and pictures, ready to be written
    intervals.py          means over seeds with confidence intervals
    samples.py            the texts that a model writes, and how much they repeat and vary
    copies.py             the longest passages that a model's texts share with its training text
    suffix_automaton.py   how these passages are found
    tasks.py              tasks of lm-evaluation-harness
    minimal_pairs.py      which of two texts that differ in one word a model finds likelier
    text_statistics.py    shares of repeated and of different n-grams

The dense baselines are `config.baselines`.
"""
