"""Runs random command lines of train.py in warm processes, and judges what each one did."""

import collections
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_jax.runs.verify_resume import TIMES
from tests.reliability import random_lines, runs
from tests.reliability.mutated_run import Worker
from tests.reliability.random_lines import Line, Places
from tests.support.programs import QUICK_COMPILER

POOL = 2
LINES_A_PROCESS = 40
"""A process keeps every program that it has compiled, so it is replaced after some lines."""
MAX_LINE = 700
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "HTTPS_PROXY": "http://127.0.0.1:9"}
"""No line waits for a network. A line that needs one is refused."""


class Battery:
    """Random lines, each run in full."""

    def __init__(self, folder: Path, places: Places) -> None:
        self.folder, self.places = folder, places
        self.counts: collections.Counter[str] = collections.Counter()
        self._free, self._dense = threading.Lock(), threading.Lock()
        self._workers = [LineWorker(folder, number) for number in range(POOL)]

    @classmethod
    @contextmanager
    def made(cls, folder: Path) -> "Iterator[Battery]":
        """A battery with its texts. Its processes end with the context."""
        battery = cls(folder, write_places(folder))
        try:
            yield battery
        finally:
            for worker in battery._workers:
                worker.close()

    def _train_dense(self, line: Line, worker: "LineWorker") -> None:
        """Train the dense run that a line names, if it is the first that names it."""
        for out, kind in zip(self.places.dense, ("active", "total"), strict=True):
            if out in f"{line}" and not Path(out).exists():
                argv = [f"--out={out}", f"--data={self.places.texts[0]}", "--tokenizer=byte", f"--model.dense={kind}"]
                argv += [f"--{s}.{n.replace('_', '-')}={v[0]}" for (s, n), v in random_lines.SIZES.items()]
                answer = worker.run(argv)
                assert answer["status"] == 0, answer

    def check(self, seed: int, numbers: list[int]) -> list[str]:
        """Run some lines in one process, and say what is wrong: nothing if all is well."""
        with self._free:
            worker = self._workers.pop()
        wrong = []
        for number in numbers:
            line = random_lines.draw(seed, number, self.places)
            with self._dense:
                self._train_dense(line, worker)
            kind, faults = worker.check(line)
            wrong += [f"{line}: {fault}" for fault in faults]
            with self._free:
                self.counts[kind] += 1
        with self._free:
            self._workers.append(worker)
        return wrong


class LineWorker:
    """A warm process, and the folder in which it works."""

    def __init__(self, folder: Path, number: int) -> None:
        self.work, self.kept = folder / f"work{number}", folder / f"kept{number}"
        self.work.mkdir()
        environment = {"XLA_FLAGS": QUICK_COMPILER, **OFFLINE}
        self._worker = Worker(folder / "cache", "tests.reliability.line_worker", self.work, environment)
        self._lines = 0

    def close(self) -> None:
        self._worker.close()

    def run(self, argv: Any, share: float | None = None, dies: bool = False) -> dict[str, Any]:
        return self._worker.run({"argv": list(argv), "share": share, "dies": dies})

    def check(self, line: Line) -> tuple[str, list[str]]:
        """What the line came to, and its faults."""
        self._lines += 1
        if self._lines % LINES_A_PROCESS == 0:
            self.close()
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(self.kept, ignore_errors=True)
        random_lines.prepare(self.work)
        (self.work / "settings.toml").write_text(line.settings)
        before = tree(self.work)
        answer = self.run(line.argv)
        faults = judge(answer)
        run = self._run_folder()
        if faults:
            return "faulty", faults
        if answer["status"] == 0 and run is None:
            return "help or dry run", [] if tree(self.work) == before else ["a line that does not train wrote a file"]
        if answer["status"] == 2 or run is None:
            left = {name for name in tree(self.work) if name not in before}
            return "refused", [f"status {answer['status']}, and {sorted(left)} was written"] if left else []
        return self._resume(line, run, answer)

    def _run_folder(self) -> Path | None:
        found = [p for p in self.work.rglob("config.json") if p.is_file()]
        return found[0].parent if found else None

    def _resume(self, line: Line, run: Path, whole: dict[str, Any]) -> tuple[str, list[str]]:
        """Run the line again, interrupted and resumed, and compare."""
        expected = outcome(run, whole)
        run.rename(self.kept)
        stopped = self.run(line.argv, line.share, line.dies)
        faults = judge(stopped, interrupted=True)
        resumed = self.run([*line.argv, "--resume"])
        faults += judge(resumed)
        found = outcome(run, resumed)
        if found != expected:
            names = [name for name in expected if found.get(name) != expected[name]]
            told = {name: (expected[name], found.get(name)) for name in names}
            how = "lost" if line.dies else "stopped"
            hit = f"{how} at {line.share:.2f}" if stopped.get("hit") else "not interrupted"
            faults.append(f"{hit}, resumed, and different: {str(told)[:1500]} {resumed.get('err', '')[-500:]}")
        if faults:
            return "faulty", faults
        if whole["status"]:
            return "failed while it trained, and again after the resume", []
        return "resumed" if stopped.get("hit") else "ended before it could be interrupted", []


def judge(answer: dict[str, Any], interrupted: bool = False) -> list[str]:
    """The faults of one command: a traceback, an unusual status, more than a line of error."""
    if "died" in answer:
        return [answer["died"]]
    out, err, escaped = answer["out"], answer["err"], answer["escaped"]
    if interrupted and escaped.rstrip().endswith("Died") and "Traceback" not in out + err:
        return []
    if escaped or "Traceback" in out + err:
        return [f"a traceback: {(escaped or err)[-2000:]}"]
    allowed = (0, 1, 2, 143) if interrupted else (0, 1, 2)
    faults = [] if answer["status"] in allowed else [f"status {answer['status']}: {err[-500:]}"]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if len(errors) != (answer["status"] in (1, 2)):
        faults.append(f"status {answer['status']} with {len(errors)} lines of error: {err[-500:]}")
    faults += [f"a line of {len(line)} characters: {line[:200]}" for line in err.splitlines() if len(line) > MAX_LINE]
    if answer["status"] == 2 and (out or len(err.splitlines()) != 1):
        faults.append(f"a refusal of more than one line: {out[-300:]}{err[-500:]}")
    return faults


def outcome(run: Path, answer: dict[str, Any]) -> dict[str, Any]:
    """All that must be equal: of a finished run `runs.result`, of one that failed its records and its error."""
    if answer.get("status") == 0:
        return {"status": 0, **runs.result(run)}
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    records = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return {"status": answer.get("status"), "records": records, "error": answer.get("err", "").splitlines()[-1:]}


def tree(folder: Path) -> dict[str, Any]:
    """Names, sizes and times of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[path.relative_to(folder).as_posix()] = (status.st_mode, 0 if path.is_dir() else status.st_mtime_ns)
    return found


def write_places(folder: Path) -> Places:
    """A file of text and a folder of text; `stories` is the embedded corpus."""
    (folder / "cache").mkdir()
    runs.write_text(folder / "stories.txt")
    parts = folder / "text"
    parts.mkdir()
    stories = (folder / "stories.txt").read_text()
    (parts / "train.txt").write_text(stories)
    (parts / "valid.txt").write_text(stories[-600:])
    texts = (str(folder / "stories.txt"), str(parts)) * 4
    return Places((*texts, "stories"), (str(folder / "dense-active"), str(folder / "dense-total")))


def run_in_pool(battery: Battery, seed: int, numbers: range) -> list[str]:
    """The faults of all lines of the numbers. A block goes to one process, which has its programs."""
    blocks: dict[int, list[int]] = collections.defaultdict(list)
    for number in numbers:
        blocks[number // random_lines.BLOCK].append(number)
    with ThreadPoolExecutor(POOL) as pool:
        found = pool.map(lambda block: battery.check(seed, block), blocks.values())
        return [fault for faults in found for fault in faults]
