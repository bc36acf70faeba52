"""`train.py`, or `moe-jax sft`, for tests of several processes: without the report and the long sample.

MOE_JAX_TEST_ANSWER stands for the seconds that processes wait for each other at the start, and MOE_JAX_TEST_FULL for
the save from whose arrays on no file may grow beyond 1,000 bytes.
"""

import itertools
import os
import resource
import sys
from typing import Any

from moe_jax.cli.main import main, run_as
from moe_jax.cli.train import Sft, Train
from moe_jax.inspection import report
from moe_jax.parallel import processes
from moe_jax.runs import checkpoint
from moe_jax.training import session

session.SAMPLE_TOKENS = 8
report.report_run = lambda files: ["no report"]
if seconds := os.environ.get("MOE_JAX_TEST_ANSWER"):
    processes.ANSWER_SECONDS = int(seconds)
if full := os.environ.get("MOE_JAX_TEST_FULL"):
    write, saves = checkpoint.write_arrays, itertools.count(1)

    def limited(*args: Any) -> None:
        if next(saves) == int(full):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        write(*args)

    checkpoint.write_arrays = limited

if __name__ == "__main__":
    command, argv = (Sft, sys.argv[2:]) if sys.argv[1] == "sft" else (Train, sys.argv[1:])
    sys.exit(main(lambda given: run_as(command, given, "train.py"), argv))
