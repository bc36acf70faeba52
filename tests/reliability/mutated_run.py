"""Opens a damaged run with every command, and judges what each one did."""

import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability import run_mutations, runs
from tests.reliability.run_mutations import Case, Mutation

STEPS, MORE_STEPS = 6, 8
MAX_SECONDS = 30
"""Of processor time, which other work on the machine does not change. Ten times as long on the clock is a fault too."""
MAX_BYTES = 256 * 2**20
"""Memory above that of the same command on the whole run."""
MAX_LINE = 700
_SAID = re.compile(
    r"warning|skipped|damaged|has changed| -> |unreadable|foreign|repaired|left out|no pictures|no routing"
)
"""A line with one of these says what is wrong with the run."""


def commands(run: Path, out: Path, text: Path) -> dict[str, list[str]]:
    """Every command that opens a run. Those that change more than `report` come last, each with a copy of its own."""
    at = ["--run", str(run)]
    resume = ["--data", str(text), "--out", str(run), "--resume", "--steps", str(MORE_STEPS)]
    return {
        "generate": ["generate", *at, "--max-tokens", "60", "--prompt", "the cat"],
        "evaluate": ["evaluate", *at],
        "inspect": ["inspect", *at],
        "plot": ["plot", *at],
        "doctor": ["doctor", *at],
        "doctor --repair": ["doctor", *at, "--repair"],
        "train --resume": ["train.py", *resume],
    }


OWN_COPY = ("doctor --repair", "train --resume")


class Worker:
    """A process that runs command lines (`command_worker.py`). Started anew if it dies, or takes too long."""

    def __init__(
        self,
        cache: Path,
        module: str = "tests.reliability.command_worker",
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`module` answers lines of JSON. It works in `folder`, with more variables of the environment."""
        self._module, self._folder, self._process = module, folder or cache, None
        self._values = runs.environment(cache) | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._values |= environment or {}

    def run(self, request: Any) -> dict[str, Any]:
        """The answer to a request. Its key `died` says why there is none."""
        if self._process is None:
            command = [sys.executable, "-m", self._module]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen(command, env=self._values, cwd=self._folder, **pipes)
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ready = select.select([self._process.stdout], [], [], 10 * MAX_SECONDS)[0]
        line = self._process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.close()
        return {"died": "took too long" if not ready else "the process died"}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@dataclass
class Clean:
    """What the commands say of the whole run."""

    numbers: dict[str, list[Any]]
    """Command -> its numbers: of the checkpoint that it takes first, then of the others."""
    lines: set[str]
    """What is printed for the whole run."""
    grown: dict[str, int]
    """Bytes by which the memory of a command grew at its peak."""


@dataclass
class Counts:
    """What a battery came to."""

    mutations: int = 0
    commands: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    numbers: int = 0
    """Commands of status 0 whose numbers were those of the whole run."""
    said: int = 0
    """Commands of status 0 with other numbers that said what is wrong."""
    memory: int = 0
    """Largest memory above the whole run's."""
    seconds: float = 0.0
    """Longest command."""
    longest: str = ""


class Battery:
    """Mutations of one run, each opened by every command."""

    def __init__(self, folder: Path, worker: Worker, text: Path) -> None:
        self.folder, self.worker, self.text = folder, worker, text
        self.case, self.counts = folder / "case", Counts()
        self.run, self.kept = self.case / "run", folder / "mutated"
        self.outside, self.scratch = folder / "outside", folder / "scratch"
        self.whole = [folder / name for name in ("whole", "seed", "tokenizer")]
        self._train()
        self.clean = self._clean()

    def _train(self) -> None:
        changes = ({}, {"seed": 7}, {})
        for out, change in zip(self.whole, changes, strict=True):
            argv = runs.flags(self.text, self.run, steps=STEPS, eval_every=2, muon_lr=0.2, **change)
            if out.name == "tokenizer":
                argv += ["--data.tokenizer=bpe", "--data.vocab-size=280"]
            answer = self.worker.run(["train.py", *argv])
            assert answer["status"] == 0, answer
            self.run.rename(out)
        shutil.copy(self.text, self.folder / "text_before")

    def _clean(self) -> Clean:
        numbers: dict[str, list[Any]] = {}
        lines, grown = set(), {}
        for _ in range(2):  # programs are compiled the first time
            self._place(self.whole[0])
            for name, argv in self._commands().items():
                answer = self.worker.run(argv)
                assert answer["status"] == 0, answer
                assert not answer["err"], answer["err"]
                numbers[name] = [self._numbers(name, answer)]
                lines |= set(answer["out"].splitlines())
                grown[name] = max(answer["grown"] or 0, 0)
        self._place(self.whole[0])
        shutil.rmtree(self.run / "checkpoints")  # as a mutation may: then the whole run is trained again
        answer = self.worker.run(self._commands()["train --resume"])
        assert answer["status"] == 0, answer
        grown["train --resume"] = max(grown["train --resume"], answer["grown"] or 0)
        self._place(self.whole[0])
        for step in sorted((self.run / "checkpoints").iterdir()):
            for name in ("generate", "evaluate"):
                answer = self.worker.run([*self._commands()[name], "--step", str(int(step.name[5:]))])
                numbers[name].append(self._numbers(name, answer))
        assert numbers["generate"][1] != numbers["generate"][2], numbers
        assert all(numbers[name][0] is not None for name in ("generate", "evaluate", "train --resume")), numbers
        return Clean(numbers, lines, grown)

    def _commands(self) -> dict[str, list[str]]:
        return commands(self.run, self.scratch, self.text)

    def _place(self, source: Path) -> None:
        """Copy a run, links and pipes included, to where the commands find it."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir(exist_ok=True)
        _copy(source, self.run)

    def check(self, seed: int, number: int) -> list[str]:
        """Mutate, run every command, and say what is wrong: nothing if all is well."""
        for folder in (self.kept, self.outside, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)
        self.scratch.mkdir()
        shutil.copytree(self.whole[0], self.outside)
        (self.outside / "notes").write_text("theirs\n")
        self._place(self.whole[0])
        case = Case(self.run, self.whole[1:], self.outside, random.Random(f"{seed}/{number}"))
        mutation = run_mutations.mutate(case, seed, number)
        _copy(self.run, self.kept)
        self.counts.mutations += 1
        wrong = []
        for name, argv in self._commands().items():
            if name in OWN_COPY:
                self._place(self.kept)
            before = self._watched()
            answer = self.worker.run(argv)
            wrong += [f"{mutation}: {name}: {fault}" for fault in self._judge(name, mutation, answer)]
            after = self._watched()
            if after != before:
                changed = sorted(set(after.items()) ^ set(before.items()))[:3]
                wrong.append(f"{mutation}: {name}: changed outside of the run: {changed}")
        return wrong

    def _watched(self) -> dict[str, Any]:
        """Everything beside the run: names, contents, times."""
        found: dict[str, Any] = {str(self.text): self.text.read_bytes()}
        folders = [self.outside, *self.whole]
        for path in [*(p for folder in folders for p in (folder, *folder.rglob("*"))), *self.case.iterdir()]:
            if path != self.run:
                status = path.lstat()
                regular = path.is_file() and status.st_size < 2**26 and path.is_relative_to(self.outside)
                found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_size)
                found[f"{path} content"] = path.read_bytes() if regular else b""
        return found

    def _judge(self, name: str, mutation: Mutation, answer: dict[str, Any]) -> list[str]:
        self.counts.commands += 1
        if "died" in answer:
            return [answer["died"]]
        faults = []
        status, out, err = answer["status"], answer["out"], answer["err"]
        self.counts.statuses[status] = self.counts.statuses.get(status, 0) + 1
        if answer["escaped"] or "Traceback" in out + err:
            return [f"a traceback: {(answer['escaped'] or err)[-1500:]}"]
        if status not in (0, 1, 2):
            faults.append(f"status {status}")
        faults += _judge_lines(name, status, out, err)
        if answer["seconds"] > self.counts.seconds:
            self.counts.seconds, self.counts.longest = answer["seconds"], f"{name}, {mutation}"
        if answer["seconds"] > MAX_SECONDS:
            faults.append(f"{answer['seconds']:.1f} s")
        above = (answer["grown"] or 0) - self.clean.grown[name]
        self.counts.memory = max(self.counts.memory, above)
        if above > MAX_BYTES:
            faults.append(f"{above / 2**20:.0f} MiB more than the whole run")
        if status == 0 and not mutation.forged:
            faults += self._judge_numbers(name, mutation, answer)
        return faults

    def _judge_numbers(self, name: str, mutation: Mutation, answer: dict[str, Any]) -> list[str]:
        numbers, clean = self._numbers(name, answer), self.clean.numbers[name]
        if numbers == clean[0]:
            self.counts.numbers += numbers is not None
            return []
        said = [
            x for x in (answer["out"] + answer["err"]).splitlines() if _SAID.search(x) and x not in self.clean.lines
        ]
        self.counts.said += 1
        if said or ((mutation.sealed or mutation.gone) and numbers in clean):
            return []
        return [f"other numbers, silently: {numbers} for {clean[0]}; {answer['out'][-500:]}{answer['err']}"]

    def _numbers(self, name: str, answer: dict[str, Any]) -> Any:
        """What must be equal to the last digit: texts, losses, the digest of the trained state."""
        if name == "generate":
            return answer["out"]
        if name == "evaluate":
            values = json.loads(answer["out"].splitlines()[-1])
            return repr({k: v for k, v in values.items() if k != "text_has_changed"})
        if name == "train --resume":
            newest = self.run / "checkpoints" / f"step_{MORE_STEPS:08d}" / "manifest.json"
            return json.loads(newest.read_text())["state"] if newest.exists() else None
        return None


def _judge_lines(name: str, status: int, out: str, err: str) -> list[str]:
    """A failure is one short line; besides it, only lines that say which checkpoints were skipped, and warnings."""
    lines = [line for line in err.splitlines() if not line.startswith("tokenizing ")]
    errors = [line for line in lines if line.startswith("error: ")]
    faults = [f"a line of {len(line)} characters: {line[:200]}" for line in lines if len(line) > MAX_LINE]
    other = [line for line in lines if line not in errors and not _SAID.search(line)]
    if other:
        faults.append(f"stderr: {other[:3]}")
    findings = name.startswith("doctor") and status == 1 and not errors and _SAID.search(out)
    if len(errors) != (status in (1, 2)) and not findings:
        faults.append(f"status {status} with {len(errors)} lines of error: {err[-500:]}{out[-300:]}")
    return faults


def _copy(source: Path, target: Path) -> None:
    """Copy a folder. Links stay links, pipes pipes, holes holes."""
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
