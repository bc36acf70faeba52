"""What the model costs on this machine, measured beside what it is compared with.

    uv run benchmark.py moe       one MoE layer against dense ones, by the clock and by the compiled program
    uv run benchmark.py train     the training step against the machine's matmul rate, beside dense twins
    uv run benchmark.py decode    prefill and cached decoding against the machine's memory bandwidth
    uv run benchmark.py surroundings    tokenizing, drawing batches, saving and restoring a checkpoint (in TMPDIR)
    uv run --extra gpu-plan benchmark.py memory    which setting fits a 4 GB card, compiled without one
    uv run --extra peers benchmark.py peers        beside Mixtral of Hugging Face transformers, in PyTorch
    uv run benchmark.py           all of these whose extras are installed

Candidates run in turn and medians are compared, so that a drifting machine does not decide. The last line of the
output is one JSON object; the same goes into `benchmarks/`, with machine, versions and commit.
"""

import sys

from moe_jax import cli
from moe_jax.commands.benchmark import Benchmark


def run(argv: list[str]) -> int:
    return cli.parse(Benchmark, argv, prog="benchmark.py", description=__doc__).execute()


if __name__ == "__main__":
    sys.exit(cli.main(run))
