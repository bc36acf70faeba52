"""`moe-jax plan`."""

from moe_jax.cli.options import Json, print_json
from moe_jax.config import PresetName
from moe_jax.config.presets import preset as preset_named
from moe_jax.config.presets import with_vocabulary
from moe_jax.planning import plans
from moe_jax.planning.plans import DEFAULT_GPU, RECORD, known_card
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import say
from moe_jax.training.plan import Plan, chosen

_COLUMNS = "{:<10} {:>8} {:>6} {:>6} {:>6} {:>9} {:>14}  {}"
"""80 columns at most."""
_HEADINGS = ("optimizer", "weights", "micro", "accum", "remat", "precision", "step MiB", "fits")


def plan(preset: PresetName = "seed-158m", gpu: str = DEFAULT_GPU, json: Json = False) -> int:
    """Look up the settings with which a preset fits a GPU, without the GPU. `train.py` chooses the same ones on it.

    The plans of the presets on well-known cards are recorded. benchmarks/record_plans.py compiles plans of other
    settings and other cards.

    The exit status is 0 if a setting fits, and 1 if none fits. The last line of the output is JSON if it is asked for,
    or if the output is a file or a pipe.

    Args:
        preset: The preset that is to be trained.
        gpu: Name of a GPU. A wrong name lists all names.
    """
    card = known_card(gpu)
    found, compiler = plans.recorded(with_vocabulary(preset_named(preset)), card)
    say(
        f"{preset} on {card.device_kind} (compute capability {card.compute_capability}, {card.memory / MIB:,.0f} MiB): "
        f"a run may use {card.budget:,.0f} MiB; recorded with jaxlib {compiler}"
    )
    print("(micro: sequences of a micro-batch)")
    print(_COLUMNS.format(*_HEADINGS))
    for row in found:
        _print_row(row, card.budget)
    best = chosen(found, card.budget)
    if best.programs:
        programs = ", ".join(f"{name} {mib:,.0f} MiB" for name, mib in best.programs.items())
        say("", f"{programs}, with all that is in memory beside it", f"attention in training: {best.attention}")
    fits, command = best.fits(card.budget), None
    if fits:
        command = f"uv run --extra cuda12 train.py --preset {preset}"
        say("this fits, by XLA's buffer plan; on the card, train with", command)
    else:
        say(f"no setting fits: take a smaller preset or another --gpu, or plan other settings with {RECORD}")
    mib = {"total_mib": round(best.total, 1), "budget_mib": round(card.budget, 1)}
    result = {"preset": preset, "gpu": card.name, "fits": fits} | mib
    print_json(result | best.setting | {"precision": best.precision, "command": command}, json)
    return 0 if fits else 1


def _print_row(row: Plan, budget: float) -> None:
    """One line for a setting."""
    batch, accum, optimizer, weights, remat = row.setting.values()
    step = row.programs.get("step")
    memory = f"{step:,.0f}" if step is not None else f">= {row.least:,.0f}"
    answers = ["yes" if answer else "no" for answer in (remat, row.fits(budget))]
    print(_COLUMNS.format(optimizer, weights, batch, accum, answers[0], row.precision, memory, answers[1]))
    if step is not None and step <= budget < row.total:
        name = max(row.programs, key=row.programs.__getitem__)
        say(f"its step fits, but between steps {name} takes {row.programs[name]:,.0f} MiB")
