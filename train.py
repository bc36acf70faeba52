"""Train a sparse mixture-of-experts language model.

    uv run train.py                                        preset nano, embedded stories: minutes on two CPU cores
    uv run train.py --preset seed-158m --data tinystories  158.6 million parameters, on TinyStories
    uv run train.py --data FOLDER --tokenizer bpe          your own text: FOLDER/train.txt and FOLDER/valid.txt
    uv run train.py --out runs/x --resume                  continue a run
    uv run train.py --preset story-cpu --dry-run           print the costs of the settings, do not train

`--help` lists the flags. The README lists the files that a run leaves in its folder. `Train.execute` in
`moe_jax/cli/train.py` does the run: settings, session, loop, report.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` listens, Ctrl-C ends the program without a traceback

from moe_jax.cli.main import main, run_as
from moe_jax.cli.train import Train

if __name__ == "__main__":
    sys.exit(main(lambda argv: run_as(Train, argv, "train.py")))
