"""Looking into a trained model: `python -m moe_jax inspect`, the routing report.

    report.py           the report: one HTML file, its data and its assembly
    trace.py            RoutingTrace: the routing of every token of one text
    ablation.py         experts switched off, one at a time: what each of them is good for
    corpus_routing.py   counts of the routing on validation text, and the tokens that each expert prefers
    token_groups.py     kinds of tokens, and the kinds that each expert prefers
    training_curves.py  the curves of a run, and the routing saved at each evaluation
    compiled_layer.py   the MoE layer as the compiler sees it
    figures.py          matplotlib figures of a trace, for notebooks
    page/               markup, style and scripts of the report

A report shows a run after training; `training.routing_snapshot` saves the routing during it.
"""
