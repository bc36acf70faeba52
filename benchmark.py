"""Measure what the model costs on this machine, and compare it with other models.

    uv run benchmark.py moe       one MoE layer beside dense layers, by time
    uv run benchmark.py train     the training step, its dense baselines, and the machine's matmul rate
    uv run benchmark.py decode    prefill and cached decoding, and the machine's memory bandwidth
    uv run benchmark.py serve     16 texts at once beside one, and the wait of a late one
    uv run --extra peers benchmark.py peers        Mixtral of Hugging Face transformers, in PyTorch
    uv run benchmark.py           moe, train and decode; and peers if its extra is installed

The results go into `runs/bench`, beside machine, versions and commit. In a pipe, or with `--json`, the last line of the
output is one JSON object. `moe_jax/cli/benchmark.py` runs the suites.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` listens, Ctrl-C ends the program without a traceback

from moe_jax.cli.benchmark import Benchmark
from moe_jax.cli.main import main, run_as

if __name__ == "__main__":
    sys.exit(main(lambda argv: run_as(Benchmark, argv, "benchmark.py")))
