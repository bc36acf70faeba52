"""`python -m moe_jax COMMAND`, the same as `moe-jax COMMAND`."""

import sys

from moe_jax.cli.main import console

if __name__ == "__main__":
    sys.exit(console())
