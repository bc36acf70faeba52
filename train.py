"""Train a sparse mixture-of-experts language model.

    uv run train.py                                        embedded stories, preset nano: minutes on two CPU cores
    uv run train.py --preset seed-158m --data tinystories  the real thing
    uv run train.py --data FOLDER --tokenizer bpe          own text: train.txt and valid.txt
    uv run train.py --out runs/x --resume                  go on

Every field of the configuration is a flag (`--help`). What a run leaves in its folder is listed in the README.
"""

import sys
from collections.abc import Sequence

from moe_jax import cli, environment


def run(argv: Sequence[str]) -> None:
    """Parse, prepare, print the card, train, score, show the routing."""
    config, saved = cli.parse_run(argv)
    notes = environment.prepare()

    # Only now, with the arguments accepted and the environment set, is jax imported.
    from moe_jax.analysis.report import report_run
    from moe_jax.training.card import print_card, print_result
    from moe_jax.training.loop import Session, finish, train

    session = Session.open(config, saved)
    print_card(session, notes)
    if int(session.state.step) >= session.config.train.steps:
        print(f"{session.folder.path}: already trained to step {int(session.state.step)}; --steps extends it")
    else:
        train(session)
    print_result(session, finish(session))
    print(*report_run(session.folder.path), sep="\n")


if __name__ == "__main__":
    sys.exit(cli.main(run))
