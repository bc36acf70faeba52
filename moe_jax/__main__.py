"""`python -m moe_jax COMMAND`, the same as `moe-jax COMMAND`."""

import os
import signal
import sys

if (__name__ == "__main__" or os.path.basename(sys.argv[0]).startswith("moe-jax")) and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` listens, Ctrl-C ends the program without a traceback

from moe_jax.cli.main import console

if __name__ == "__main__":
    sys.exit(console())
