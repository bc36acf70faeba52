"""`moe-jax evaluate`."""

import dataclasses
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe_jax.cli.command import Command, check_range, check_run_folder, refuse_tuned
from moe_jax.cli.result import print_json, print_next
from moe_jax.config import ConfigError, DataConfig, UserError
from moe_jax.system import environment
from moe_jax.system.console import step_progress, working
from moe_jax.system.terminal_text import say

if TYPE_CHECKING:
    import numpy as np

    from moe_jax.config import DataFormat
    from moe_jax.data.baselines import CorpusBaselines
    from moe_jax.training.evaluate import Evaluation


PAIRS = 1_000
"""Minimal pairs that are scored. A row of n of them is uncertain by about 1 / sqrt(n), in 19 of 20 cases."""


COPIES_TOKENS = 400
"""Longest text that is written to be searched for copies, in tokens."""
MOST_TEXTS = 10_000


@dataclass(frozen=True)
class Evaluate(Command):
    """Measure loss, bits per byte and drops of a trained model on a text, beside n-gram models of its training text.

    Of conversations, only the assistant's answers are scored. A tuned run takes them (rows with `messages`) as --data.

    The last line of the output is JSON if it is asked for, or if the output is a file or a pipe.
    """

    interrupted: ClassVar[str] = "the text was not scored to its end; no result"

    run: str
    """Folder of a run."""
    data: str = ""
    """A file, which is scored whole; or a folder or corpus, of which the validation part is scored. Empty: the run's
    validation text."""
    pairs: bool = False
    """Score minimal pairs instead: texts of the embedded corpus beside the same texts with one wrong word."""
    copies: int = 0
    """Let the model write this many texts instead, and find the longest passages that they share with its training
    text."""
    tasks: str = ""
    """Ask these tasks of lm-evaluation-harness instead, such as `blimp,arc_easy`. Needs the extra `tasks`."""
    task_files: str = ""
    """A folder with further tasks, as YAML files of lm-evaluation-harness."""
    shots: int | None = None
    """Solved examples before each question of a task. The task's own number unless given."""
    limit: int = 0
    """Ask only so many questions of each task. 0 asks all."""
    step: int | None = None
    """Step of the checkpoint to load. The best one unless given."""
    json: bool = False
    """Print the result as JSON too."""

    def execute(self) -> int:
        self._check()
        if self.tasks:
            return self._ask_tasks()
        if self.pairs:
            return self._minimal_pairs()
        return self._copies() if self.copies else self._score_text()

    def _check(self) -> None:
        """Raise ConfigError for a value that cannot be."""
        check_run_folder(self.run, self.step)
        check_range("--copies", self.copies, 0, MOST_TEXTS)
        check_range("--limit", self.limit, 0, 1 << 31)
        check_range("--shots", self.shots or 0, 0, 1000)
        given = [
            flag
            for flag, value in (("--tasks", self.tasks), ("--pairs", self.pairs), ("--copies", self.copies))
            if value
        ]
        if given and self.data:
            raise ConfigError(f"{given[0]}: has texts of its own; leave --data out")
        if self.copies:
            refuse_tuned("--copies", self.run)
        if len(given) > 1:
            raise ConfigError(f"{given[1]}: has a result of its own; leave {given[0]} out")
        for flag, value, is_given in (
            ("--task-files", self.task_files, bool(self.task_files)),
            ("--shots", self.shots, self.shots is not None),
            ("--limit", self.limit, self.limit > 0),
        ):
            if is_given and not self.tasks:
                raise ConfigError(f"{flag} {value}: is for --tasks only; name tasks, or leave it out")
        if self.tasks and not self._task_names():
            raise ConfigError(f"--tasks {self.tasks}: must name a task, such as arc_easy")
        if self.task_files and not Path(self.task_files).is_dir():
            raise ConfigError(f"--task-files {self.task_files}: no such folder")

    def _score_text(self) -> int:
        """Loss, bits per byte and drops on a text."""
        from moe_jax.data.beginning import check_beginning
        from moe_jax.data.corpora import check_source, scored_documents

        form: DataFormat = "text"
        if self.data:
            form = _form_of(self.run, self.data)
            check_source(self.data, form)
            check_beginning(DataConfig(source=self.data, format=form), seq_len=0)
        environment.prepare_environment()
        with working(f"loading {self.run}"):
            from moe_jax.data.baselines import corpus_baselines
            from moe_jax.data.streams import token_stream
            from moe_jax.runs.load import open_run
            from moe_jax.training.evaluate import evaluate, make_evaluation_step

            run = open_run(self.run, self.step)
        if self.data:
            stream, changed = token_stream(scored_documents(self.data, form), run.tokenizer), ""
            baselines = None
            if run.config.data.format == form == "text":
                baselines = _baselines_of(run.config.data, scored_documents(self.data))
        else:
            store, changed = run.validation_text()
            stream, baselines = store.valid.stream, corpus_baselines(run.config.data, store)
        if changed:
            print(f"warning: {changed}", file=sys.stderr)
        scored = evaluate(
            make_evaluation_step(run.graphdef),
            run.params,
            stream.tokens,
            seq_len=run.config.model.seq_len,
            token_bytes=run.tokenizer.token_bytes(),
            answers=stream.answers,
            progress=lambda batches: step_progress("scoring", batches),
        )
        answers = stream.answers is not None
        what = "tokens of answers (no other token counts)" if answers else "tokens"
        say(f"{scored.tokens:,} {what}, {scored.bytes:,} bytes, checkpoint of step {run.checkpoint.step}")
        say(f"loss {scored.loss:.4f} nats per token, {scored.bits_per_byte:.4f} bits per byte")
        if baselines:
            say(f"to compare: {baselines.describe()}")
        print_next(f"uv run python -m moe_jax inspect --run {shlex.quote(self.run)}")
        self._print_score(scored, baselines, answers, None if self.data else bool(changed))
        return 0

    def _print_score(
        self, scored: "Evaluation", baselines: "CorpusBaselines | None", answers: bool, changed: bool | None
    ) -> None:
        """The score as JSON."""
        result = {
            "val_loss": scored.loss,
            "val_bits_per_byte": scored.bits_per_byte,
            "val_drop_fraction": scored.drop_fraction,
            "tokens": scored.tokens,
            "scored": "answers" if answers else "all tokens",
            "text_has_changed": changed,
            "baselines_bits_per_byte": dataclasses.asdict(baselines) if baselines else None,
        }
        print_json(result, self.json)

    def _minimal_pairs(self) -> int:
        """Which of two texts is the likelier one, by kind of word and by distance."""
        environment.prepare_environment()
        with working(f"loading {self.run}"):
            from rich.table import Table

            from moe_jax.data.synthetic.minimal_pairs import minimal_pairs
            from moe_jax.experiments import minimal_pairs as experiment
            from moe_jax.runs.load import open_run
            from moe_jax.system.rich_console import Console

            run = open_run(self.run, self.step)
        pairs = list(minimal_pairs(run.config.data.stories_seed, PAIRS))
        texts = [*(pair.good for pair in pairs), *(pair.bad for pair in pairs)]
        scores = experiment.text_scores(
            experiment.make_score_step(run.graphdef),
            run.params,
            texts,
            run.tokenizer,
            run.config.model.seq_len,
            lambda batches: step_progress("scoring", batches),
        )
        found = experiment.table(pairs, scores, _ngram_scores(run.config.data, texts))
        rows = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("right of two", "pairs", "model", "5-gram"):
            rows.add_column(name, justify="left" if name == "right of two" else "right", no_wrap=True)
        for row in found:
            beside = "" if row.ngram is None else f"{row.ngram:.1%}"
            rows.add_row(row.row, f"{row.pairs:,}", f"{row.model:.1%}", beside)
        Console().print(rows, "")
        say(
            f"checkpoint of step {run.checkpoint.step}; guessing is right in 50 %",
            "of 100 pairs, 10 % either way may be chance",
        )
        if run.config.data.source != "stories":
            say("the run was trained on another text than the embedded stories")
        print_json({"pairs": [dataclasses.asdict(row) for row in found]}, self.json)
        return 0

    def _task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def _ask_tasks(self) -> int:
        """The scores of tasks of lm-evaluation-harness."""
        if not importlib.util.find_spec("lm_eval"):
            raise UserError(
                "--tasks needs the package lm-eval: `uv run --extra tasks python -m moe_jax evaluate --tasks ...`"
            )
        environment.prepare_environment()
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # the package would say that PyTorch is missing
        with working(f"loading {self.run} and lm-evaluation-harness"):
            from rich.table import Table

            from moe_jax.experiments.tasks import ask
            from moe_jax.runs.load import open_run
            from moe_jax.system.rich_console import Console

            run = open_run(self.run, self.step)
        found = ask(run, self._task_names(), folder=self.task_files, shots=self.shots, limit=self.limit)
        rows = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("task", "metric", "value", "standard error"):
            rows.add_column(name, justify="left" if name in ("task", "metric") else "right", no_wrap=True)
        for score in found:
            rows.add_row(
                score.task, score.metric, f"{score.value:.4f}", "" if score.error is None else f"{score.error:.4f}"
            )
        Console().print(rows, "")
        say(
            f"checkpoint of step {run.checkpoint.step}", *(["a part of each task only (--limit)"] if self.limit else [])
        )
        print_json({"tasks": [score._asdict() for score in found]}, self.json)
        return 0

    def _copies(self) -> int:
        """The longest passages of the training text in texts of the model."""
        environment.prepare_environment()
        with working(f"loading {self.run}"):
            from moe_jax.data.streams import stored_documents
            from moe_jax.experiments import copies
            from moe_jax.experiments.samples import write_text
            from moe_jax.inference.generate import TextGenerator
            from moe_jax.inference.sampling import Sampling
            from moe_jax.runs.load import open_run

            run = open_run(self.run, self.step)
            generator = TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len)
            generator.compile()
        store, changed = run.validation_text()
        if changed:
            print(f"warning: {changed}", file=sys.stderr)
        texts = []
        with step_progress("writing texts", self.copies) as advance:
            for number in range(self.copies):
                text = write_text(generator, "", Sampling(), seed=0, number=number, limit=COPIES_TOKENS)
                texts.append(run.tokenizer.encode(text))
                advance()
        documents = (run.tokenizer.encode(text) for text in stored_documents(store.valid.tokens, run.tokenizer))
        pieces = copies.pieces_of(documents, [len(text) for text in texts])
        with working("searching the training text"):
            own, beside = copies.measure(texts, pieces, store.train.tokens, run.tokenizer)
        say(own.describe("texts of the model"))
        if beside is not None:
            say(beside.describe("pieces of the validation text, cut to the same lengths"))
        say(f"the longest passage of the model: {own.passage!r}", f"checkpoint of step {run.checkpoint.step}")
        if len(store.train.tokens) > copies.MOST_TOKENS:
            say(f"only the first {copies.MOST_TOKENS:,} of {len(store.train.tokens):,} training tokens were searched")
        result = {"model": own.to_json(), "validation": None if beside is None else beside.to_json()}
        print_json({"copies": result}, self.json)
        return 0


def _form_of(run: str, data: str) -> "DataFormat":
    """How a file is read: a tuned run reads JSON lines of conversations as such. Everything else is text."""
    from moe_jax.config import load_config
    from moe_jax.data.chat_rows import holds_chats

    config = load_config(Path(run))
    tuned = config is not None and config.data.format == "chat"
    return "chat" if tuned and holds_chats(Path(data)) else "text"


def _ngram_scores(trained: "DataConfig", texts: list[str]) -> "np.ndarray | None":
    """The scores of texts under an n-gram model of the run's training text. None if that text is not here, or if it is
    conversations."""
    if trained.format == "chat":
        return None
    from moe_jax.data.baselines import training_documents
    from moe_jax.experiments.minimal_pairs import ngram_scores

    try:
        with working("scoring an n-gram model of the training text, to compare with"):
            return ngram_scores(training_documents(trained), texts)
    except (ConfigError, UserError):  # it has moved, or needs a network
        return None


def _baselines_of(trained: "DataConfig", documents: Iterator[str]) -> "CorpusBaselines | None":
    """The scores of n-gram models of the run's training text on other documents. None if that text is not here."""
    from moe_jax.data.baselines import VALID_BYTES, first_documents, ngram_baselines, training_documents

    try:
        with working("scoring n-gram models of the training text, to compare with"):
            return ngram_baselines(training_documents(trained), first_documents(documents, VALID_BYTES))
    except (ConfigError, UserError):  # it has moved, or needs a network
        return None
