"""Measure what the model costs on this machine, and compare it with other models.

    uv run benchmark.py moe       one MoE layer beside dense layers, by time
    uv run benchmark.py train     the training step, its dense baselines, and the machine's matmul rate
    uv run benchmark.py decode    prefill and cached decoding, and the machine's memory bandwidth
    uv run benchmark.py serve     16 texts at once beside one, and the wait of a late one
    uv run --extra peers benchmark.py peers        Mixtral of Hugging Face transformers, in PyTorch
    uv run benchmark.py           moe, train and decode; and peers if its extra is installed

The candidates run in turn and their medians are compared, so a slow phase of the machine hits all of them. The results
go into `runs/bench`, beside machine, versions and commit. The last line of the output is one JSON object.
`benchmarks/suites/` has the suites.
"""

import sys
from functools import partial

from benchmarks.suites.command import run
from moe_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(partial(run, about=__doc__ or "")))
