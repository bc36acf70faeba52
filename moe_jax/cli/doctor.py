"""`moe-jax doctor`: a run on the disk, or the card of this machine."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moe_jax.cli.options import starting
from moe_jax.config import ConfigError, PresetName
from moe_jax.runs.catalog import run_folder
from moe_jax.system import environment
from moe_jax.system.terminal import say, working

if TYPE_CHECKING:
    from moe_jax.planning.card import Finding


def doctor(
    run: str = "", gpu: bool = False, test: bool = False, long: bool = False, preset: PresetName = "seed-158m"
) -> int:
    """Verify every file of every checkpoint of a run; or look at this machine's NVIDIA card.

    With --gpu, what JAX needs of the machine is checked step by step. If nothing is missing, the card's products and
    bandwidth are measured, and the command that trains on it is printed. With --test, what the card computes is
    compared with what the CPU computes, some minutes long, and written into a file; with --long, a run is killed and
    resumed, too. The exit status is 1 if anything is damaged, missing or wrong.

    Args:
        run: Folder of a run.
        gpu: Look at the card, and not at a run.
        test: With --gpu: compare the card with the CPU.
        long: With --test: train 200 steps, and again with a kill and a resume.
        preset: With --gpu: the preset that is to be trained on the card.
    """
    if gpu == bool(run):
        raise ConfigError(f"--run {run or 'RUN'}: give either the folder of a run, or --gpu to look at the card")
    if (test and not gpu) or (long and not test):
        raise ConfigError("--test: tests a card; give it with --gpu, and --long with both")
    if gpu:
        return _test_card(preset, long) if test else _examine_card(preset)
    folder = run_folder(run)
    if not (folder / "checkpoints").is_dir():
        raise ConfigError(f"--run {run}: is not the folder of a run; it has no folder `checkpoints`")
    with starting(f"reading every checkpoint of {folder}"):
        from moe_jax.runs.checkpoint import CheckpointStore

        found = list(CheckpointStore(folder).examine())
    say(*(f"{path.name}  {damage or 'good'}" for path, damage in found))
    damaged = sum(damage is not None for _, damage in found)
    say(f"{len(found)} checked, {damaged} damaged")
    return 1 if damaged else 0


def _examine_card(preset: PresetName) -> int:
    from moe_jax.planning import card

    if not _said_all_good(card.needs()):
        say("put the first missing thing right, and try again")
        return 1
    say(*environment.prepare_environment())
    with working("starting JAX"):
        import jax

        device = jax.devices()[0]
    return 0 if _said_all_good(card.reached(device, preset)) else 1


def _test_card(preset: PresetName, long: bool) -> int:
    from moe_jax.planning import card, selftest

    if not selftest.on_a_cpu() and not _said_all_good(card.needs()):
        say("put the first missing thing right, and try again")
        return 1
    record, failed = {}, 0
    for line in selftest.lines(preset, record, [*selftest.CHECKS, *(selftest.LONG if long else ())]):
        say(f"{line.check:<9}  {line.result}  {line.detail}")
        failed += line.result == "FAIL"
    if "checks" in record:
        say(f"written: {selftest.write(record)}; it names the card and its software, and nothing else of this machine")
    return 1 if failed else 0


def _said_all_good(findings: "Iterable[Finding]") -> bool:
    """Print a line for each finding, as soon as it is made."""
    all_good = True
    for what, detail, good in findings:
        say(f"{what:<13}  {'good' if good else 'missing'}  {detail}")
        all_good &= good
    return all_good
