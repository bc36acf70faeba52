"""What the model costs, measured on this machine: `benchmark.py`.

suites.py           the suites moe, decode and peers, and the list of all
dense_baselines.py  the suite `train`: the cost table, the training step and its dense baselines
serving.py          the suite `serve`: many texts at once, and a late one
request.py          BenchmarkRequest: what a suite is asked for; and the tables that suites print
layer.py            one MoE layer and dense layers, by time and by arithmetic
decoding.py         calls to time: prefill, cached decoding and uncached forward passes
peers.py            our model and Mixtral, timed in turn
mixtral.py          Mixtral in PyTorch, in a process of its own
"""
