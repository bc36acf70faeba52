"""The recorded plans: they are of the presets and cards as they are now, and are there without jax. The tests with the
marker `plan` compile pairs again: `uv run --isolated --extra gpu-plan pytest -m plan`."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.planning.plans import RECORDED, Plan, recorded
from moe_jax.planning.target import described_gpus, load_target
from tests.support import short_form
from tests.support.programs import compiled_for_gpu

PAIRS = [tuple(key.split()) for key in json.loads(RECORDED.read_text())]


def test_what_is_recorded_is_of_the_presets_and_cards_as_they_are() -> None:
    """Of each preset on each card. After a change of one `benchmarks/record_plans.py` records it again. The last plan
    is the one that fits, or nothing fits."""
    assert set(PAIRS) == set(itertools.product(PRESETS, described_gpus()))
    for name, gpu in PAIRS:
        config, target = with_vocabulary(preset(name)), load_target(gpu)
        plans, jaxlib = recorded(config, target)
        assert jaxlib, f"{name}:{gpu}"
        assert not any(plan.fits(target.budget) for plan in plans[:-1])
        asked = config.train.batch_size * config.train.grad_accum
        assert {p.config.train.batch_size * p.config.train.grad_accum for p in plans} == {asked}


def test_other_settings_are_not_recorded() -> None:
    config, card = with_vocabulary(preset("nano")), load_target("quadro-t1000-4gb")
    for section, name, value in (("train", "batch_size", 9), ("model", "layers", 2), ("execution", "memory", "3GB")):
        assert recorded(config.override({(section, name): value}), card) == ([], "")
    assert recorded(config, dataclasses.replace(card, text=card.text + "\n")) == ([], "")


def test_a_plan_is_the_same_after_it_was_written() -> None:
    config = with_vocabulary(preset("nano"))
    plan = Plan(config, "float32", 1.5, {"step": 2.5, "evaluation": 1.0}, "why")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json())), config) == plan


QUICK = """
import sys
from moe_jax.cli.main import main, run_command
assert main(run_command, ["plan", "--json"]) == 0
assert "jax" not in sys.modules
"""


def test_the_command_answers_without_jax() -> None:
    """And without the extra that compiles."""
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *_, command, last = done.stdout.splitlines()
    assert command == "uv run --extra cuda12 train.py --preset=seed-158m"
    assert json.loads(last)["fits"]


def test_flags_that_change_nothing_are_looked_up_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_command, ["plan", "--preset", "nano", "--gpu", "quadro-t1000-4gb", "--batch-size", "8"]) == 0
    assert "recorded with jaxlib " in capsys.readouterr().out


def test_where_nothing_fits_the_smallest_setting_is_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    """What the last setting needs at least is over the budget already. So it is not compiled, and nothing is said of
    its programs or of its attention."""
    assert main(run_command, ["plan", "--preset", "max-4gb", "--gpu", "quadro-t1000-4gb"]) == 1
    *_, smallest, empty, advice, result = capsys.readouterr().out.splitlines()
    assert [*smallest.split()[2:4], smallest.split()[-1]] == ["1", "32", "no"]
    assert (empty, advice.partition(":")[0]) == ("", "no setting fits")
    assert json.loads(result)["total_mib"] > 2402


@pytest.mark.parametrize(("name", "gpu"), short_form(PAIRS, [("nano", "quadro-t1000-4gb")]))
@compiled_for_gpu
def test_a_pair_compiles_to_what_is_recorded(name: str, gpu: str) -> None:
    """With the jaxlib that recorded it, to the last digit; with another one, within 2 %."""
    from importlib.metadata import version

    from moe_jax.planning.ladder import Room, walk

    config, target = with_vocabulary(preset(name)), load_target(gpu)
    plans, jaxlib = recorded(config, target)
    now = [plan.to_json() for plan in walk(config, Room.on(target))]
    if jaxlib == version("jaxlib"):
        assert now == [plan.to_json() for plan in plans]
    assert [p["setting"] for p in now] == [plan.to_json()["setting"] for plan in plans]
    for plan, old in zip(now, plans, strict=True):
        assert plan["programs"] == pytest.approx(old.programs, rel=0.02)
