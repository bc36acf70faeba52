"""The names of the files and folders of a step: `step_00000100`. Standard library only.

A step has eight digits, or more if eight are not enough. So names do not sort as their steps do: compare the numbers.
"""

import re

REPLACED = ".replaced"
"""Ending of a checkpoint's folder while a newer checkpoint of the same step takes its name."""
_NAME = re.compile(r"step_(\d{8,18})", re.ASCII)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_number(name: str) -> int | None:
    """The step that a name stands for; None for a name that `step_name` does not write."""
    found = _NAME.fullmatch(name)
    step = int(found[1]) if found else -1
    return step if step_name(step) == name else None


def checkpoint_step(name: str) -> int | None:
    """The step of a checkpoint's folder, also of one that is being replaced. None for any other name."""
    return step_number(name.removesuffix(REPLACED))
