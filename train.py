"""Train a sparse mixture-of-experts language model.

    uv run train.py                                        embedded stories, preset nano: minutes on two CPU cores
    uv run train.py --preset seed-158m --data tinystories  the real thing
    uv run train.py --data FOLDER --tokenizer bpe          own text: train.txt and valid.txt
    uv run train.py --out runs/x --resume                  go on
    uv run train.py --verify-resume                        show that a run killed here and resumed loses nothing

Every field of the configuration is a flag (`--help`). What a run leaves in its folder is listed in the README.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_jax import cli, environment
from moe_jax.training.signals import Signals, Stopped


def run(argv: Sequence[str]) -> int:
    """Parse, prepare, print the card, train, score, show the routing."""
    config, saved = cli.parse_run(argv)
    notes = environment.prepare(config.deterministic)
    if config.verify_resume:
        from moe_jax.training.verify_resume import verify_resume

        return verify_resume(config, Path(__file__))
    with Signals() as signals:
        # Only now, with the arguments accepted and the environment set, is jax imported.
        from moe_jax.analysis.report import report_run
        from moe_jax.training.card import print_card, print_result
        from moe_jax.training.loop import Session, finish, train
        from moe_jax.training.run import locked

        try:
            with locked(Path(config.run_dir)):
                session = Session.open(config, saved)
                print_card(session, notes)
                train(session, signals)
                print_result(session, finish(session))
                print(*report_run(session.folder.path), sep="\n")
        except Stopped as stop:
            return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(run))
