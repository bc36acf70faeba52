"""`python -m moe_jax COMMAND`."""

import sys

from moe_jax.cli import main, run_command

if __name__ == "__main__":
    sys.exit(main(run_command))
