"""train.py on a disk so slow that a save after the first two takes for ever."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_jax.cli.main import main, run_as


def program(argv: list[str]) -> int:
    from moe_jax.runs import orbax_state

    write, saves = orbax_state.write_weights, []

    def slow(*args: object) -> None:
        saves.append(1)
        write(*args)
        if len(saves) > 2:
            time.sleep(float(os.environ.get("SLOW_SAVE_SECONDS", "1000")))

    orbax_state.write_weights = slow
    return run_as("train", argv, "train.py")


if __name__ == "__main__":
    sys.exit(main(program))
