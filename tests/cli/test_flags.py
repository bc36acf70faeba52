"""Every setting of a run against values that it cannot have: refused with the name of its flag, and nothing written."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from moe_jax.config import SECTIONS, RunConfig
from moe_jax.config.section import flag_of
from tests.support.commands import refusal, train_settings

HIDDEN = ("base", "format", "lora_rank", "lora_alpha", "train_router")
"""Settings without a flag in `train.py`: those of fine-tuning."""
ANY_NUMBER = ("capacity_factor", "device_capacity_factor")
"""Every positive number means something."""
OF_A_FORM = ("upcycle", "init_from", "mesh", "memory", "rope_scaling")
"""Texts that must name something, or have a form of their own."""


def bad_values(name: str, kind: Any) -> list[str]:
    """Values that a field cannot have, as typed."""
    if get_origin(kind) is Literal:
        return ["", "neither", get_args(kind)[0] + "x"]
    if kind is int:
        return ["-1", str(2**33), "0.5", "many"]
    if kind is float:
        return ["-0.001", "nan", "many", *([] if name in ANY_NUMBER else ["1e10", "-inf"])]
    if kind is bool:
        return ["maybe"]
    return ["neither"] if name in OF_A_FORM else [""] if name == "source" else []


FIELDS = {
    flag_of(section, name): (name, type(section).__dataclass_fields__[name].type)
    for section in map(RunConfig().section, ("", *SECTIONS))
    for name, _ in section.values()
    if name not in HIDDEN
}


@pytest.mark.parametrize("flag", FIELDS)
def test_bad_values(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, kind = FIELDS[flag]
    values = bad_values(name, kind)
    assert values or flag == "--out"
    for value in values:
        named = value if kind is bool else flag  # tyro takes what follows a switch for an argument of its own
        assert named in refusal(train_settings, f"{flag}={value}")
    assert list(tmp_path.iterdir()) == []
