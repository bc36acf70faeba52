"""`moe-jax inspect`, `plot` and `doctor`: what a run did, in a page, in pictures, and on the disk."""

import collections
import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_jax.cli.command import Command, ModelCommand, check_out_file, check_out_folder, check_run_folder
from moe_jax.config import ConfigError, PresetName
from moe_jax.planning import card
from moe_jax.planning.card import Finding
from moe_jax.runs.catalog import is_shipped, run_folder
from moe_jax.system import environment
from moe_jax.system.files import Folder, json_text, write_output
from moe_jax.system.terminal import say, working


@dataclass(frozen=True, kw_only=True)
class Inspect(ModelCommand):
    """Write the routing report: one HTML file that shows where every token of a text went.

    With --trace, write instead every decision on a whole text of any length, for programs of your own, and say what
    was counted, such as the hot set.
    """

    text: str = ""
    """The text to route. Empty: the beginning of the run's validation text."""
    file: str = ""
    """A file that holds the text, in place of --text. With --trace also a folder, whose files are kinds of text."""
    out: str = ""
    """The page to write. Empty: RUN/report/routing.html, or routing-of-a-text.html beside it with --text or --file; of
    a model that comes with moe-jax, routing-NAME.html here."""
    json: str = ""
    """Write the data behind the page to this file as well. With --trace: the counts."""
    trace: str = ""
    """Write every decision to this file: one line of JSON a token, or arrays if it ends in .npz. No page is written."""

    def execute(self) -> int:
        self.check()
        if self.trace and self.out:
            raise ConfigError(f"--out {self.out}: --trace {self.trace} writes no page; leave one of them out")
        for flag, value in (("--trace", self.trace), ("--out", self.out), ("--json", self.json)):
            if value:
                check_out_file(flag, value)
        texts = self._texts()
        environment.prepare_environment()
        return self._trace(texts) if self.trace else self._page(texts[0][1] if texts else "")

    def _texts(self) -> list[tuple[str, str]]:
        """(kind, text) of the texts that are given."""
        if not self.file:
            return [("text", self.text)] if self.text else []
        if self.text:
            raise ConfigError(f"--file {self.file}: --text is given too; give one of them")
        files, texts = [Path(self.file)], []
        if self.trace and files[0].is_dir():
            files = sorted(p for p in files[0].iterdir() if p.is_file() and not p.name.startswith("."))
        for file in files:
            try:
                texts.append((file.stem, file.read_text(encoding="utf-8")))
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--file {file}: must be a text in UTF-8 that can be read ({error})") from None
        if not any(text for _, text in texts):
            raise ConfigError(f"--file {self.file}: is empty; give a text")
        return texts

    def _page(self, text: str) -> int:
        with working(f"routing a text through {self.name}"):
            from moe_jax.inspection.report import report_path, write_report
        folder = Path(self.run)
        own = Path(f"routing-{self.name}.html") if is_shipped(folder) else report_path(folder, bool(text))
        path = Path(self.out) if self.out else own
        write_report(folder, path, text=text, step=self.step, json_out=Path(self.json) if self.json else None)
        say(f"{path}: the routing report; open it in a browser")
        return 0

    def _trace(self, named: list[tuple[str, str]]) -> int:
        with working(f"loading {self.name}"):
            from moe_jax.inspection.decisions import write_decisions
            from moe_jax.runs.load import open_run

            run = open_run(self.run, self.step)
            texts = [(kind, [run.tokenizer.separator_id, *run.tokenizer.encode(text)]) for kind, text in named]
            texts = texts or [("validation", run.validation_text(progress=False).store.valid.tokens.tolist())]
        counts = write_decisions(run, texts, Path(self.trace))
        say(f"{self.trace}: {counts.tokens:,} tokens", *counts.describe())
        if self.json:
            write_output(Path(self.json), json_text(counts.to_json()) + "\n")
        return 0


@dataclass(frozen=True)
class Plot(Command):
    """Draw pictures of a run, as PNG and SVG: loss, bits per byte, learning rate, throughput, load of the experts.

    With several runs, each picture compares them.
    """

    run: list[str]
    """Folder of a run. Repeat the flag to compare several."""
    out: str = ""
    """Folder for the pictures. Empty: RUN/report of the first run."""

    def execute(self) -> int:
        runs = [run_folder(run) for run in self.run]
        for run in runs:
            check_run_folder(str(run))
        if self.out:
            check_out_folder("--out", self.out)
        environment.prepare_environment()
        with working("drawing the pictures"):
            from moe_jax.plots.figures import run_figures, save_figures

            figures = run_figures(runs)
            if self.out:
                Path(self.out).mkdir(parents=True, exist_ok=True)
            out = Folder(Path(self.out)) if self.out else Folder(runs[0]).inner("report")
            paths = save_figures(figures, out)
        say(*paths)
        return 0


@dataclass(frozen=True)
class Doctor(Command):
    """Verify every checkpoint of a run, each array included; or look at this machine's NVIDIA card.

    With --gpu, what JAX needs of the machine is checked step by step. If nothing is missing, the card's products and
    bandwidth are measured, and the command that trains on it is printed.
    """

    run: str = ""
    """Folder of a run."""
    repair: bool = False
    """Repair what can be repaired. Damaged checkpoints are renamed, never removed."""
    gpu: bool = False
    """Look at the card, and not at a run."""
    preset: PresetName = "seed-158m"
    """With --gpu: the preset that is to be trained on the card."""

    def execute(self) -> int:
        """0 if nothing is damaged or missing, or if all damage was repaired."""
        if self.gpu == bool(self.run):
            raise ConfigError(
                f"--run {self.run or 'RUN'}: give either the folder of a run, or --gpu to look at the card"
            )
        if self.gpu:
            return self._examine_card()
        folder = run_folder(self.run)
        if not Folder(folder).exists("checkpoints"):
            raise ConfigError(f"--run {self.run}: is not the folder of a run; it has no folder `checkpoints`")
        environment.prepare_environment()
        with working(f"reading every checkpoint of {folder}"):
            from moe_jax.runs.doctor import ILL, examine
            from moe_jax.runs.folder import LOCK, locked_for_training

            trains = (folder / LOCK).exists() and os.access(folder, os.W_OK)
            with locked_for_training(folder) if trains or self.repair else contextlib.nullcontext():
                findings = examine(folder, self.repair)
        width = max(len(f.what) for f in findings)
        for finding in findings:
            say(f"{finding.what:<{width}}  {finding.state:<8}  {finding.detail}".rstrip())
        ill = collections.Counter(f.state for f in findings if f.state in ILL)
        if ill:
            counts = ", ".join(f"{count} {state}" for state, count in ill.items())
            say(counts + ("" if self.repair else "; --repair repairs what can be repaired"))
        return 1 if ill else 0

    def _examine_card(self) -> int:
        if not _said_all_good(card.needs()):
            say("put the first missing thing right, and try again")
            return 1
        for note in environment.prepare_environment():
            say(note)
        with working("starting JAX"):
            import jax

            device = jax.devices()[0]
        return 0 if _said_all_good(card.reached(device, self.preset)) else 1


def _said_all_good(findings: Iterable[Finding]) -> bool:
    """Print a line for each finding, as soon as it is made."""
    all_good = True
    for what, detail, good in findings:
        say(f"{what:<13}  {'good' if good else 'missing'}  {detail}")
        all_good &= good
    return all_good
