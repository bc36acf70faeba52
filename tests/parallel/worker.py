"""`train.py` for tests of several processes: without the report and the long sample, which other tests cover.

MOE_JAX_TEST_CODE stands for another version of the program, MOE_JAX_TEST_ANSWER for the seconds that processes wait for
each other at the start, and MOE_JAX_TEST_FAULT for the step at which reading the batch fails.
"""

import os
import sys

from moe_jax.cli.main import main, run_as
from moe_jax.cli.train import Train
from moe_jax.inspection import report
from moe_jax.parallel import processes
from moe_jax.training import agreement, session, step_logger

session.SAMPLE_TOKENS = 8
step_logger.matmul_rate = lambda dtype: 1e9  # only for the matmul rate
report.report_run = lambda files: ["no report"]
if code := os.environ.get("MOE_JAX_TEST_CODE"):
    agreement.code_digest = lambda: code
if seconds := os.environ.get("MOE_JAX_TEST_ANSWER"):
    processes.ANSWER_SECONDS = int(seconds)
if fault := os.environ.get("MOE_JAX_TEST_FAULT"):
    batch = session.Session.batch

    def broken(self: session.Session, step: int) -> object:
        if step == int(fault):
            raise OSError(5, "Input/output error", "tokens.bin")
        return batch(self, step)

    session.Session.batch = broken

if __name__ == "__main__":
    sys.exit(main(lambda argv: run_as(Train, argv, "train.py")))
