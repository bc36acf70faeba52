"""What the model costs, measured on this machine: `benchmark.py`.

    suites.py           the suites: moe, decode, pipeline, peers and serve
    dense_baselines.py  the suite `train`: the training step and its dense baselines
    request.py          BenchmarkRequest: what a suite is asked for; and the tables that suites print
    scaling.py          the suite `scaling`: one size of the model doubled at a time
    card.py             the suite `gpu`: each part as predicted, and as the card takes it
    card_parts.py       the parts of that suite
    layer.py            one MoE layer and dense layers, by time and by arithmetic
    step_memory.py      the temporary memory of the training step
    decoding.py         prefill, cached decoding and uncached forward passes
    weights.py          decoding with weights of 32, 16, 8 and 4 bits
    llama_cpp.py        llama.cpp beside our decoding
    serving.py          the engine of `serve`: many texts at once, and a late one
    feeding.py          tokenizers and batches
    saving.py           the time of saving and restoring a checkpoint
    cost_table.py       parameters and arithmetic, by formula and in the compiled program
    uniform_routing.py  UniformMoE: routers that load all experts evenly
    peers.py            our model and Mixtral, timed in turn
    mixtral.py          Mixtral in PyTorch, in a process of its own

The suite `memory` is `planning.suite`.
"""
