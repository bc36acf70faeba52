"""train.py on a device that lacks the memory for a step: its first N calls end as on a GPU. N is the first argument."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_jax.cli.main import main, run_as

failing = int(sys.argv.pop(1))


class SmallStep:
    """A jitted step that fails while there are calls to fail."""

    def __init__(self, step: Any) -> None:
        self.step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def __call__(self, state: Any, batch: Any) -> Any:
        global failing
        if failing == 0:
            return self.step(state, batch)
        import jax

        failing -= 1
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.")


def program(argv: list[str]) -> int:
    import jax

    from moe_jax.training import programs

    make_step, make_params = programs.make_step, programs.Programs.initial_params

    def initial_params(self: Any) -> Any:
        print(f"arrays in memory before: {sum(x.nbytes for x in jax.live_arrays())} bytes", file=sys.stderr)
        return make_params(self)

    programs.Programs.initial_params = initial_params
    programs.make_step = lambda *given, **named: SmallStep(make_step(*given, **named))
    return run_as("train", argv, "train.py")


if __name__ == "__main__":
    sys.exit(main(program))
