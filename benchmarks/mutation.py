"""Mutation testing: do the tests notice a small change of the code?

    uv run --with cosmic-ray benchmarks/mutation.py --out mutants.jsonl            a sample, 30 mutants a package
    uv run --with cosmic-ray benchmarks/mutation.py --out mutants.jsonl --packages data runs --seed 7 --number 20
    uv run --with cosmic-ray benchmarks/mutation.py --out again.jsonl --again mutants.jsonl    not killed: once more

The mutants of the packages are thousands, too many for two cores. So this program draws a sample with a fixed seed,
the same number in each package (`mutants.py`). What a package draws depends on the seed and the package alone.

The tests of a mutant are the nearest ones: the test file with the module's name, the checks of planted bugs, the test
files of the package that import the module, and the files of NEAREST. Tests that name the changed function run first.
`.ci/run` holds all of them and more, so the share killed is a lower bound for it. `--wide` adds the files of other
packages that import the module. At the end every test that killed a mutant runs without a mutant. All must pass, or
their kills do not count.

A single test that takes half of the time limit is ended and has failed, as under the limit of CI. A mutant whose tests
together run into the time limit is not counted as killed. Give it more time.

Each mutant is written into a copy of the tree, never into the tree itself. One process imports jax and the other large
packages, without starting a backend of jax, and forks a child for each mutant.
"""

import argparse
import ast
import importlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from mutants import ROOT, Mutant, draw, mutate

ANALYSIS = ("inspection", "certify", "planning", "plots", "benchmarks")
"""Packages that measure, judge or show. The table sums them up in one more line."""
USERS = (
    "serving",
    "interop",
    "parallel",
    "model/kernels",
    "model/quantized.py",
    "training/quantize.py",
    "training/start.py",
)
"""What other programs and devices see, kernels, quantisation, and where a run starts: packages, or single modules."""
PACKAGES = ("model", "training", "inference", "data", "runs", *ANALYSIS)
RUNS = ["tests/training/test_run.py", "tests/training/test_records.py"]
NEAREST = {
    "model.attention": ["tests/model/test_attention.py", "tests/inference/test_decode.py"],
    "model.moe.queues": ["tests/model/moe/test_router.py", "tests/model/moe/test_layer.py"],
    "model.moe.layer": ["tests/model/moe/test_layer.py", "tests/inspection/test_ablation.py"],
    "model.precision": ["tests/training/test_precision.py"],
    "runs": ["tests/runs"],
    "runs.records": ["tests/training/test_routing_snapshot.py"],
    **{f"training.{module}": RUNS for module in ("header", "logging", "loop", "session")},
    "training.optimizers": ["tests/training/test_optimizer.py", "tests/training/test_step.py"],
    "data": ["tests/data"],
    **{package: [f"tests/{package}"] for package in ANALYSIS},
    "inspection.trace": ["tests/plots", "tests/test_api.py"],
    "inspection.report": ["tests/training/test_routing_snapshot.py"],
    "inference.traced_pass": ["tests/training/test_routing_snapshot.py"],
    "inference": ["tests/inference", "tests/test_api.py"],
    "serving": ["tests/serving"],
    "interop": ["tests/interop"],
    "parallel": ["tests/parallel"],
    "training.quantize": ["tests/training/test_quantize.py"],
    "training.start": [
        "tests/interop/test_import_settings.py",
        "tests/training/test_sft.py",
        "tests/training/test_lora.py",
        "tests/training/test_upcycle.py",
    ],
}
"""Module or package -> tests that reach it without importing it by name, or that test it best."""
CHECKS = {package: ["tests/test_records.py"] for package in PACKAGES}
CHECKS |= {name: ["tests/test_checks.py", "tests/test_records.py"] for name in ("model", "training", "inference")}
BROAD = ["tests/test_bridge.py", *RUNS]
LEFT_OUT = ("tests/reliability", "tests/support", "tests/foundation")
"""Tests of real processes, other programs and pages, and helpers."""
MARKERS = "not reliability and not plan and not notebooks and not package and not slow"
DEVICES = "--xla_force_host_platform_device_count=8"
"""For `parallel` only: its tests need eight devices."""
EXIT_OF_NO_TESTS = 5


def tests_of(module: str, wide: bool) -> list[str]:
    """The nearest tests of a module (a path), the nearest first; `wide`: and all others that import the module."""
    parts = Path(module).with_suffix("").parts[1:]
    name, package = ".".join(parts), parts[0]
    mirror = Path("tests", *parts[:-1], f"test_{parts[-1]}.py")
    first = [mirror.as_posix()] if (ROOT / mirror).exists() else []
    imported = re.compile(rf"moe_jax\.{name}\b|from moe_jax\.{'.'.join(parts[:-1])} import .*\b{parts[-1]}\b")
    files = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    naming = [f for f in files if not f.startswith(LEFT_OUT) and imported.search((ROOT / f).read_text("utf-8"))]
    wanted = [f for f in naming if f.startswith(f"tests/{package}/")]
    for known in (name, ".".join(parts[:-1]), package):
        for entry in NEAREST.get(known, []):
            wanted += [f for f in files if f == entry or f.startswith(entry + "/")]
    return list(dict.fromkeys([*first, *wanted, *CHECKS.get(package, []), *(naming + BROAD if wide else [])]))


class NamedFirst:
    """Of the selected tests, those that name the changed function or class run first."""

    def __init__(self, mutant: Mutant):
        tree = ast.parse((ROOT / mutant.module).read_text(encoding="utf-8") if mutant.operator else "")
        named = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        self.names = [n.name for n in named if n.lineno <= mutant.line <= (n.end_lineno or 0)]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def elsewhere(item: Any) -> bool:
            given = item.callspec.params.values() if hasattr(item, "callspec") else ()
            text = "".join(map(inspect.getsource, [item.function, *filter(inspect.isfunction, given)]))
            return not any(re.search(rf"\b{name}\b", text) for name in self.names)

        items.sort(key=elsewhere)


class Slot:
    """A copy of the tree, in which one child at a time runs tests."""

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignored)
        self.mutant: Mutant | None = None
        self.pid = 0

    def start(self, mutant: Mutant, tests: list[str]) -> None:
        self.mutant, self.began = mutant, time.monotonic()
        if mutant.operator:
            self._write(mutant.module, mutate(mutant) or "")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(mutant, tests)

    def _write(self, module: str, source: str) -> None:
        path = self.folder / module
        path.write_text(source, encoding="utf-8")
        for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            stale.unlink()

    def _run(self, mutant: Mutant, tests: list[str]) -> None:
        os.setsid()
        os.chdir(self.folder)
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        markers = MARKERS
        if mutant.package == "parallel":
            os.environ["XLA_FLAGS"] += f" {DEVICES}"
        else:
            markers += " and not parallel"
        os.environ["COLUMNS"] = "1000"  # so that pytest writes the whole name of a failed test
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["PYTHONPATH"] = f"{self.folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        sys.path[:] = [str(self.folder), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "benchmarks"))]
        code = 3
        try:
            options = ["-x", "-q", "-n", "0", "--tb=line", "-p", "no:cacheprovider", "-m", markers]
            options.append(f"--timeout={self.limit / 2:g}")
            code = int(pytest.main([*options, *tests], plugins=[NamedFirst(mutant)]))
        finally:
            os._exit(code)

    def finished(self) -> Mutant | None:
        """The mutant with its outcome, once its tests have ended."""
        assert self.mutant is not None
        mutant, seconds = self.mutant, time.monotonic() - self.began
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid != 0:
            code = os.waitstatus_to_exitcode(status)
            assert code != EXIT_OF_NO_TESTS, f"no tests for {mutant.module}"
            mutant.outcome = "survived" if code == 0 else "killed"
        elif seconds > self.limit and mutant.operator:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            mutant.outcome = "time limit"
        else:
            return None
        said = (self.folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        failed = [line for line in said if line.startswith(("FAILED", "ERROR", "ImportError", "E  "))]
        mutant.by = failed[-1] if failed and mutant.outcome == "killed" else ""
        mutant.seconds = round(seconds, 1)
        self.mutant = None
        if mutant.operator:
            self._write(mutant.module, (ROOT / mutant.module).read_text(encoding="utf-8"))
        return mutant


def run(work: list[tuple[Mutant, list[str]]], slots: list[Slot]) -> Iterator[Mutant]:
    """Run the tests of every mutant, one in each slot at a time."""
    waiting = list(reversed(work))
    while waiting or any(slot.mutant for slot in slots):
        for slot in slots:
            if slot.mutant is None and waiting:
                slot.start(*waiting.pop())
            elif slot.mutant is not None and (done := slot.finished()) is not None:
                yield done
        time.sleep(0.05)


def wilson(killed: int, drawn: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's formula."""
    z, p = 1.96, killed / drawn
    middle, width = p + z * z / (2 * drawn), z * math.sqrt(p * (1 - p) / drawn + z * z / (4 * drawn * drawn))
    return (middle - width) / (1 + z * z / drawn), (middle + width) / (1 + z * z / drawn)


def preload(cache: str) -> None:
    """Import what every child needs. No backend of jax starts here, because its threads would not survive a fork."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # XLA compiles faster with fewer optimizations.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy starts threads at its import otherwise
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=0"  # as tests/conftest.py sets it
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    for name in ("beartype", "flax.nnx", "hypothesis", "jax.numpy", "jaxtyping", "optax", "pytest", "xdist.plugin"):
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 1
    assert threads == 1, f"{threads} threads: a fork would lose them"


def table(mutants: list[Mutant]) -> Iterator[str]:
    """For each package: mutants drawn, killed, their share and its 95 % interval."""
    groups = {**{package: (package,) for package in (*PACKAGES, *USERS)}, "analysis": ANALYSIS, "users": USERS}
    groups["all"] = (*PACKAGES, *USERS)
    for package, members in groups.items():
        drawn = [m for m in mutants if m.package in members]
        if drawn:
            killed = sum(m.outcome == "killed" for m in drawn)
            low, high = wilson(killed, len(drawn))
            share = f"{killed / len(drawn):.0%} ({low:.0%} to {high:.0%})"
            yield f"{package:20} {len(drawn):4} drawn, {killed:4} killed: {share}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="gets a line of JSON for each mutant")
    parser.add_argument("--number", type=int, default=30, help="mutants a package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", nargs="+", choices=(*PACKAGES, *USERS), default=PACKAGES)
    parser.add_argument("--processes", type=int, default=2, help="mutants at a time")
    parser.add_argument("--again", type=Path, help="an older OUT: run what it has not killed")
    parser.add_argument("--wide", action="store_true", help="also the tests of other packages that import the module")
    parser.add_argument("--limit", type=float, default=600, help="seconds a mutant may take")
    args = parser.parse_args()
    if args.again:
        lines = args.again.read_text(encoding="utf-8").splitlines()
        mutants = [m for m in (Mutant(**json.loads(line)) for line in lines) if m.outcome != "killed"]
    else:
        samples = {package: draw(package, args.number, args.seed) for package in args.packages}
        print(
            *(f"{package}: {len(drawn)} of {number} places" for package, (drawn, number) in samples.items()), sep="\n"
        )
        drawn = [sample for sample, _ in samples.values()]
        # One of each package in turn, so that a run cut short is a sample too.
        mutants = [mutant for turn in zip_longest(*drawn) for mutant in turn if mutant is not None]
    ended: list[Mutant] = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder, args.out.open("a", encoding="utf-8") as out:
        preload(f"{folder}/compiled")
        slots = [Slot(Path(folder, str(number)), args.limit) for number in range(args.processes)]
        for done in run([(mutant, tests_of(mutant.module, args.wide)) for mutant in mutants], slots):
            ended.append(done)
            out.write(json.dumps(asdict(done)) + "\n")
            out.flush()
            print(f"{done.outcome:10} {done.seconds:6.1f} s  {done.module}:{done.line}  {done.new}", flush=True)
        named = {m.by.removeprefix("FAILED ").split(" - ")[0] for m in ended if m.by.startswith("FAILED")}
        parallel = {test for test in named if test.startswith("tests/parallel")}
        for package, tests in (("parallel", parallel), ("", named - parallel)):
            plain = Mutant(package, "every test that killed, without a mutant", 0, 0, "", 0)
            for done in run([(plain, sorted(tests))] if tests else [], slots):
                print(done.module + ":", "passes" if done.outcome == "survived" else done.by)
    print(*table(ended), sep="\n")


if __name__ == "__main__":
    main()
