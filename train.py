"""Train a sparse mixture-of-experts language model.

    uv run train.py                                        preset nano, embedded stories: minutes on two CPU cores
    uv run train.py --preset seed-158m --data tinystories  158.6 million parameters, on TinyStories
    uv run train.py --data FOLDER --tokenizer bpe          your own text: FOLDER/train.txt and FOLDER/valid.txt
    uv run train.py --out runs/x --resume                  continue a run
    uv run train.py --preset story-cpu --dry-run           print the costs of the settings, do not train

`--help` lists the usual flags, `--help-verbose` all of them. `moe_jax/training/run.py` does the run: set-up, loop,
report. The README lists the files that a run leaves in its folder.
"""

import sys

from moe_jax.cli.main import main, run_as

if __name__ == "__main__":
    sys.exit(main(lambda argv: run_as("train", argv, "train.py")))
