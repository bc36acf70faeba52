"""`doctor --gpu --test`: what it says of a card that computes wrong numbers, lacks memory, crashes or hangs.

The forms of cards run on the CPU here. The faults are planted into the processes of the checks.
"""

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.planning import selftest

EXACT = np.array([3.0, 4.0])


def arrays(dtype: str, error: float, own: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """An array of norm 5 of the card and of the CPU, which are off by shares of it."""
    off = np.array([1.0, 0.0]) * 5
    cpu = {f"{dtype}/x": EXACT + own * off, "float64/x": EXACT}
    return {f"{dtype}/x": EXACT + error * off}, cpu


@pytest.mark.parametrize(
    ("dtype", "error", "own", "passes"),
    [
        ("float32", 9e-6, 1e-7, True),
        ("float32", 1.1e-5, 1e-7, False),
        ("float32", 1.1e-5, 4e-6, True),
        ("bfloat16", 2.9e-2, 1e-2, True),
        ("bfloat16", 3.1e-2, 1e-2, False),
        ("bfloat16", 5e-3, 0.0, True),
        ("float16", 5e-3, 0.0, False),
        ("float32", np.nan, 1e-7, False),
    ],
)
def test_an_array_may_be_off_by_rounding_only(dtype: str, error: float, own: float, passes: bool) -> None:
    assert selftest.compare(*arrays(dtype, error, own))[0] == passes


def test_a_loss_a_token_a_bit_and_the_memory_are_judged() -> None:
    loss = {"float32/nano": np.array([5.0, 4.0]), "skipped in float32/nano": 0}
    for changed, passes in (({}, True), ({"float32/nano": np.array([5.0, 4.05])}, False)):
        assert selftest.same_losses(loss | changed, loss)[0] == passes
    assert not selftest.same_losses(loss | {"skipped in float32/nano": 1}, loss)[0]
    assert not selftest.same_losses(loss | {"float32/nano": np.array([np.nan, 4.0])}, loss)[0]
    text = {"float32/tokens": np.array([5, 6, 7])}
    assert selftest.same_text(text, text)[0]
    assert selftest.same_text({"float32/tokens": np.array([5, 8, 7])}, text) == (
        False,
        "3 tokens of `stories`; the first other one is number 2",
    )
    assert selftest.same_bits({"again": 0, "restored": 0, "arrays": 9}, {})[0]
    assert not selftest.same_bits({"again": 0, "restored": 1, "arrays": 9}, {})[0]
    for differ, step, passes in ((0, 100, True), (1, 100, False), (0, 0, False)):
        assert selftest.same_after_a_kill({"arrays": 9, "differ": differ, "resumed from": step}, {})[0] == passes
    for peak, tried, passes in ((109, "ab", True), (111, "ab", False), (0, "a", False), (0, "aa", False)):
        plan = {"planned": 100.0, "peak": float(peak), "tried": np.array([*tried])}
        assert selftest.within_the_plan(plan, {})[0] == passes


def test_a_machine_without_a_card_is_not_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every check would pass."""
    facts = {"platform": "cpu", "compute": "float32", "device": "a processor", "jaxlib": "1"}
    monkeypatch.setattr(selftest, "computed", lambda *_: {name: np.array(value) for name, value in facts.items()})
    monkeypatch.delenv("MOE_JAX_FORMS", raising=False)
    record: dict[str, Any] = {}
    (line,) = selftest.lines("nano", record, selftest.CHECKS)
    assert (line.check, line.result, record) == ("facts", "FAIL", {})
    assert line.detail.startswith("JAX sees no card, only a processor")


def test_an_error_names_no_folder() -> None:
    line = "OSError: [Errno 28] No space left on device: '/home/ada/My/runs/x.bin' (C:\\Users\\ada\\x)"
    assert selftest.without_paths(line) == "OSError: [Errno 28] No space left on device: 'x.bin' (x)"


def planted(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Python runs this code at the start of every process of a check that computes on the card."""
    lines = "import os\nif os.environ.get('MOE_JAX_FORMS') == 'gpu':\n" + textwrap.indent(textwrap.dedent(code), "    ")
    (folder / "sitecustomize.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MOE_JAX_FORMS", "gpu")
    monkeypatch.setenv("MOE_JAX_CACHE", str(folder / "cache"))


def line_of(name: str) -> selftest.Line:
    *_, line = selftest.lines("nano", {}, (name,))
    return line


CUDNN = """
    import moe_jax.model.kernels.library_attention as library
    own = library.causal_attention
    def cudnn(query, key, value, implementation):
        return own(query, key, value * (1.05 if implementation == "cudnn" else 1))
    library.causal_attention = cudnn
"""
NO_MEMORY = """
    import jax
    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: planted")
"""
AT_AN_EVALUATION = (
    NO_MEMORY
    + """
    import moe_jax.training.session as session
    session.evaluate = fails
"""
)
NO_SECOND_SETTING = """
    import moe_jax.training.fit as fit
    fit.settings_after = lambda config, failed: []
"""
WRONG_PRODUCT = """
    import moe_jax.model.kernels.grouped_matmul as grouped
    right = grouped._copied
    grouped._copied = lambda *given: right(*given) * 1.0001
"""


ANOTHER_BATCH = """
    import sys
    import moe_jax.planning.run_checks as runs
    runs.LONG_STEPS, runs.SAVED_AT, runs.KILLED_AT = 30, 10, 20
    if "--resume" in sys.argv:
        import moe_jax.training.session as session
        own = session.Session.batch
        session.Session.batch = lambda self, step: own(self, step + 1)
"""


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("check", "fault", "said"),
    [
        ("resume", ANOTHER_BATCH, "after a kill and a resume from step"),
        ("attention", CUDNN, "wrong numbers: the output is off by"),
        ("forms", WRONG_PRODUCT, "experts in turn in float32: off by 1.0e-04"),
        ("loop", AT_AN_EVALUATION, "on the card: moe_jax.system.errors.UserError: the device ran out of memory after"),
        ("memory", NO_SECOND_SETTING, "on the card: moe_jax.system.errors.UserError: "),
        (
            "text",
            "os.kill(os.getpid(), 11) if 'text' in open('/proc/self/cmdline').read() else 0",
            "crashed: signal 11",
        ),
        ("text", "import time\nif 'text' in open('/proc/self/cmdline').read(): time.sleep(60)", "no answer in 5 s"),
    ],
)
def test_a_planted_fault_is_a_line(
    check: str, fault: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(tmp_path, monkeypatch, fault)
    if "sleep" in fault:
        monkeypatch.setitem(selftest.CHECKS, check, selftest.CHECKS[check]._replace(limit=5))
    line = line_of(check)
    assert (line.check, line.result) == (check, "FAIL")
    assert said in line.detail


@pytest.mark.reliability
def test_the_command_writes_what_can_be_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The faster half of the checks, on the forms of cards without a fault."""
    planted(tmp_path, monkeypatch, "pass")
    monkeypatch.chdir(tmp_path)
    some = {name: selftest.CHECKS[name] for name in ("forms", "twice", "memory", "text")}
    monkeypatch.setattr(selftest, "CHECKS", some)
    assert main(run_command, ["doctor", "--gpu", "--test", "--preset", "nano"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[1:-1]] == [[name, "pass"] for name in some]
    (path,) = tmp_path.glob("card-*.json")
    assert path.name in said[-1]
    record = json.loads(path.read_text())
    assert [check["result"] for check in record["checks"]] == ["pass"] * len(some)
    assert record["facts"]["platform"] == "cpu"
    for private in (str(Path.home()), str(tmp_path), os.uname().nodename):
        assert private not in path.read_text()
