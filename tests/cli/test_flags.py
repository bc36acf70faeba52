"""Every setting of a run against values that it cannot have: refused with the name of its flag, and nothing written."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import SECTIONS, RunConfig
from moe_jax.config.section import flag_of
from tests.support.commands import refusal, train_settings

HIDDEN = ("base", "format", "lora_rank", "lora_alpha", "train_router")
"""Settings without a flag in `train.py`: those of fine-tuning."""
ANY_NUMBER = ("capacity_factor", "device_capacity_factor")
"""Every positive number means something."""
WORDS = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=8).filter(
    lambda word: word.lower() not in ("nan", "inf", "infinity")
)
OF_A_FORM = ("upcycle", "init_from", "mesh", "memory", "rope_scaling")
"""Texts that must name something, or have a form of their own."""


def bad_values(name: str, kind: Any) -> st.SearchStrategy[str]:
    """Values that a field cannot have, as typed."""
    if get_origin(kind) is Literal:
        return WORDS.filter(lambda word: word not in get_args(kind))
    if kind is int:
        number = st.integers(max_value=-1) | st.integers(min_value=2**33) | st.just("9" * 400)
        return number.map(str) | WORDS | st.floats(0.1, 0.9).map(str)
    if kind is float:
        number = st.floats(max_value=-1e-3, allow_infinity=False).map(str) | st.sampled_from(["nan", "inf", "-inf"])
        large = st.floats(min_value=1e10, allow_infinity=False).map(str)
        return number | WORDS | (st.nothing() if name in ANY_NUMBER else large)
    if kind is bool:
        return WORDS.map(lambda word: word + "x")
    return WORDS if name in OF_A_FORM else st.just("") if name == "source" else st.nothing()


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
    if values.is_empty:
        assert flag == "--out"
        return

    @settings(max_examples=6)
    @given(values)
    def check(value: str) -> None:
        named = value if kind is bool else flag  # tyro takes what follows a switch for an argument of its own
        assert named in refusal(train_settings, f"{flag}={value}")

    check()
    assert list(tmp_path.iterdir()) == []
