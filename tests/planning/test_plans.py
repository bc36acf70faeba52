"""The recorded plans: they are of the presets as they are now, and are there at once, without jax."""

import itertools
import json
import subprocess
import sys

import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model.costs import least_step_bytes
from moe_jax.planning.plans import DEFAULT_GPU, RECORDED, known_card, known_cards, recorded
from moe_jax.system.environment import MIB
from moe_jax.training.plan import with_values

PAIRS = [tuple(key.split()) for key in json.loads(RECORDED.read_text())["plans"]]


def test_what_is_recorded_is_of_the_presets_as_they_are() -> None:
    """Of each preset on each card: a plan's least memory is that of the preset. The last plan is the one that fits, or
    nothing fits. After a change of a preset `benchmarks/record_plans.py --record` records its plans again."""
    assert set(PAIRS) == set(itertools.product(PRESETS, known_cards()))
    for name, gpu in PAIRS:
        config, card = with_vocabulary(preset(name)), known_card(gpu)
        plans, jaxlib = recorded(config, card)
        assert jaxlib, f"{name}:{gpu}"
        assert not any(plan.fits(card.budget) for plan in plans[:-1])
        asked = config.train.batch_size * config.train.grad_accum
        assert {p.setting["train.batch_size"] * p.setting["train.grad_accum"] for p in plans} == {asked}
        for plan in plans:
            computed = with_values(config, plan.setting).override({("execution", "compute_dtype"): plan.precision})
            assert least_step_bytes(computed) / MIB == pytest.approx(plan.least, abs=0.051)
            assert plan.least <= plan.programs.get("step", plan.least), "it is a lower bound"
        assert least_step_bytes(config) < 16 * 2**30, "a machine of 16 GiB refuses no preset"


def test_the_budget_of_a_4_gb_card_by_hand() -> None:
    """3,951,369,912 bytes are 3,768.3 MiB; 75 % of that is 2,826.2, and 85 % of that 2,402.3."""
    assert known_card(DEFAULT_GPU).budget == pytest.approx(2402.3, abs=0.05)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("train", "batch_size", 9), ("model", "layers", 2), ("execution", "memory", "3GB"), ("execution", "fit", "any")],
)
def test_other_settings_are_not_recorded(section: str, name: str, value: object) -> None:
    config = with_vocabulary(preset("nano"))
    assert recorded(config, known_card("quadro-t1000-4gb"))[0]
    assert recorded(config.override({(section, name): value}), known_card("quadro-t1000-4gb")) == ([], "")


QUICK = """
import sys
from moe_jax.cli.main import main, run_command
assert main(run_command, ["plan", "--json"]) == 0
assert "jax" not in sys.modules
"""


def test_the_command_answers_without_jax() -> None:
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *_, command, last = done.stdout.splitlines()
    assert command == "uv run --extra cuda12 train.py --preset seed-158m"
    result = json.loads(last)
    assert (result["fits"], result["train.batch_size"], result["total_mib"]) == (True, 32, 1471.8)


def test_where_nothing_fits_the_smallest_setting_is_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    """What the last setting needs at least is over the budget already. So it is not compiled, and nothing is said of
    its programs or of its attention."""
    assert main(run_command, ["plan", "--preset", "max-4gb", "--gpu", "quadro-t1000-4gb"]) == 1
    *_, smallest, advice, result = capsys.readouterr().out.splitlines()
    assert [*smallest.split()[2:4], smallest.split()[-1]] == ["1", "32", "no"]
    assert advice.partition(":")[0] == "no setting fits"
    assert json.loads(result)["total_mib"] > 2402


def test_a_card_without_plans_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_command, ["plan", "--gpu", "rtx9090"]) == 2
    assert "--gpu rtx9090: must be one of h100-80gb, quadro-t1000-4gb, rtx2060-6gb" in capsys.readouterr().err
