"""Looking into a trained model: `python -m moe_jax inspect`, the routing report.

    report.py           the report: one HTML file, its data and its assembly
    trace.py            RoutingTrace: the routing of every token of one text
    switches.py         layers and runs whose experts can be switched off
    ablation.py         experts switched off, one at a time: what each of them is good for
    corpus_routing.py   counts of the routing on validation text
    specialisation.py   the tokens, and the kinds of tokens, that each expert prefers
    decisions.py        every decision on a long text, written to a file, and counts of them
    page/               markup, style and scripts of the report

A report shows a run after training; `training.evaluate` saves the routing during it.
"""
