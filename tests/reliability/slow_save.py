"""train.py on a disk so slow that a save after the first two takes for ever."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from moe_jax import cli


def program(argv: list[str]) -> int:
    from moe_jax.training import checkpoint

    write, saves = checkpoint.write_weights, []

    def slow(*args: object) -> None:
        saves.append(1)
        write(*args)
        if len(saves) > 2:
            time.sleep(1000)

    checkpoint.write_weights = slow
    return train.run(argv)


if __name__ == "__main__":
    sys.exit(cli.main(program))
