"""`train.py` for tests of several processes: without the report and the long sample."""

import sys

from moe_jax.cli.main import main, run_as
from moe_jax.inspection import report
from moe_jax.training import session

session.SAMPLE_TOKENS = 8
report.report_run = lambda files: ["no report"]

if __name__ == "__main__":
    sys.exit(main(lambda given: run_as("train", given, "train.py"), sys.argv[1:]))
