"""The suites of `benchmark.py`: what the model costs, measured on this machine.

command.py          which suites to run, and where their numbers go
request.py          BenchmarkRequest: what a suite is asked for; and the tables that suites print
layer.py            `moe`: one MoE layer and dense layers, by time and by arithmetic
dense_baselines.py  `train`: the cost table, the training step and its dense baselines
decoding.py         `decode`: prefill, cached decoding and uncached forward passes
serving.py          `serve`: many texts at once, and a late one
peers.py            `peers`: our model and Mixtral, timed in turn
mixtral.py          Mixtral in PyTorch, in a process of its own
"""
