"""What `benchmarks/compare.py` computes.

    baselines.py      a mixture of experts and its dense baselines, trained over seeds: plan, table, verdicts
    tuning.py         the search for the learning rate and the depth of each model
    scaling.py        the mixture and its dense baseline over a ladder of budgets
    power_law.py      a power law fitted to losses, and what it predicts
    study_runs.py     the training runs of all of these: finished ones are not trained again
    report.py         means with confidence intervals; a result ready to be written
    plots.py          the pictures

The dense baselines are `suites/dense_baselines.py`.
"""
