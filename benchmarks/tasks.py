"""Tasks of lm-evaluation-harness (EleutherAI; the package `lm-eval`), asked of a run.

    uv run --group tasks python benchmarks/tasks.py blimp,arc_easy --run runs/nano --limit 100

The package has the tasks: where their data lies, how a question is put, and how answers are counted. This module
answers: the log-probability of one text after another, the log-probability of a whole text, and a text that goes on
after a prompt. The separator stands before each text, as in training and in `generate`.
"""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # the package would say that PyTorch is missing

import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe_jax.cli.main import main
from moe_jax.config import ConfigError, UserError
from moe_jax.inference.decode import TextGenerator
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.traced_pass import make_traced_pass
from moe_jax.model.moe.layer import Mode
from moe_jax.runs.load import LoadedRun, open_run
from moe_jax.system.files import json_text

NEW_TOKENS = 256
"""Longest answer where a task names no length: the package's own default."""
_SHORTEST = 16
"""Tokens of the shortest padded text."""


class Score(NamedTuple):
    """A measured number of one task."""

    task: str
    metric: str
    value: float
    error: float | None
    """Standard error. None where the package gives none."""


class RunModel(TemplateLM):
    """A run, as the package asks models.

    A text that is longer than the context T loses its beginning, as in the package's own models.
    """

    def __init__(self, run: LoadedRun) -> None:
        super().__init__()
        self._run, self._tokenizer, self._seq_len = run, run.tokenizer, run.config.model.seq_len
        self._pass = make_traced_pass(run.graphdef, Mode.GENERATE, predict=True, vocab_size=run.tokenizer.vocab_size)
        self._generator = TextGenerator(run.writer, run.params, run.tokenizer, self._seq_len)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.separator_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, after a separator unless `add_special_tokens` is False."""
        tokens = self._tokenizer.encode(string)
        return tokens if add_special_tokens is False else [self.eot_token_id, *tokens]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in nats. A text longer than the context is cut into windows: each token
        is scored once, those of a later window after the tokens that are left in it."""
        found = []
        for request in requests:
            found.append(sum(self._score(*window)[0] for window in self._windows(request.args[0])))
        return found

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._seq_len - 1, context_len=1)
        return map(make_disjoint_window, windows)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for _pair, context, continuation in requests:
            found.append(self._score(context, continuation))
        return found

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The log-probability of tokens after others, in nats, and whether each is the likeliest one at its place."""
        if len(continuation) >= self._seq_len:
            raise UserError(
                f"an answer has {len(continuation)} tokens, and the context is {self._seq_len}; "
                "take another task, or a model with a longer context"
            )
        tokens = (context + continuation)[-self._seq_len :]
        width = min(self._seq_len, max(_SHORTEST, 1 << (len(tokens) - 1).bit_length()))
        padded = np.zeros((1, width + 1), np.int32)
        padded[0, : len(tokens)] = tokens
        predicted = self._pass(self._run.params, padded).predictions
        assert predicted is not None
        before = slice(len(tokens) - len(continuation) - 1, len(tokens) - 1)  # a token is predicted by the one before
        greedy = np.array_equal(np.asarray(predicted.likeliest)[0, before, 0], continuation)
        return -float(np.asarray(predicted.loss, np.float64)[0, before].sum()), greedy

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on after prompts, each to the first of its stop strings."""
        texts = []
        for request in requests:
            texts.append(self._write(*request.args))
        return texts

    def _write(self, prompt: str, asked: dict[str, Any]) -> str:
        until = asked.get("until") or []
        stops = [until] if isinstance(until, str) else until
        settings = Sampling(float(asked.get("temperature", 0.0)) if asked.get("do_sample") else 0.0)
        limit = int(asked.get("max_gen_toks", NEW_TOKENS))
        text = ""
        for piece in self._generator.pieces(self.tok_encode(prompt), settings, seed=0, limit=limit):
            text += piece
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text


def ask(
    run: LoadedRun, names: Sequence[str], *, folder: str = "", shots: int | None = None, limit: int = 0
) -> list[Score]:
    """The numbers of the named tasks, in the package's order.

    `folder` has further tasks, as YAML files. `shots` are the solved examples before each question; None leaves that
    to the task. `limit` takes so many questions of each task only; 0 takes all.

    Raises ConfigError for a name that is not known, and UserError for data that cannot be loaded.
    """
    with _quiet():
        manager = _tasks(folder)
        for name in names:
            if name not in manager.all_tasks:
                near = " or ".join(difflib.get_close_matches(name, manager.all_tasks, n=2))
                raise ConfigError(f"{name}: no such task in lm-eval{near and f'; perhaps {near} was meant'}")
        try:
            found = evaluator.simple_evaluate(
                RunModel(run),
                tasks=list(names),
                num_fewshot=shots,
                limit=limit or None,
                log_samples=False,
                task_manager=manager,
            )
        except (OSError, ValueError) as error:  # of the package `datasets`, which loads what tasks name
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{','.join(names)}: the data could not be loaded: {reason}") from error
    return list(_scores(found.get("results", {}) if found else {}))


@lru_cache(maxsize=4)
def _tasks(folder: str) -> TaskManager:
    """All tasks of the package, and those of a folder. Reading their names takes seconds."""
    return TaskManager(include_path=folder or None)


def _scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Score]:
    """The package calls a number `metric,filter`, and its standard error `metric_stderr,filter`."""
    for task, numbers in results.items():
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            yield Score(task, name, float(value), float(error) if isinstance(error, float) else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's own messages."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run(argv: Sequence[str]) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("tasks", help="names of tasks, such as blimp,arc_easy")
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the best one unless given")
    parser.add_argument("--task-files", default="", help="a folder with further tasks, as YAML files of the package")
    parser.add_argument("--shots", type=int, help="solved examples before each question; the task's own unless given")
    parser.add_argument("--limit", type=int, default=0, help="ask only so many questions of each task; 0 asks all")
    asked = parser.parse_args(argv)
    if asked.task_files and not Path(asked.task_files).is_dir():
        raise ConfigError(f"--task-files {asked.task_files}: no such folder")
    names = [name.strip() for name in asked.tasks.split(",") if name.strip()]
    loaded = open_run(asked.run, asked.step)
    scores = ask(loaded, names, folder=asked.task_files, shots=asked.shots, limit=asked.limit)
    for score in scores:
        error = "" if score.error is None else f" +- {score.error:.4f}"
        print(f"{score.task}  {score.metric}  {score.value:.4f}{error}")
    part = f", {asked.limit} questions of each task" if asked.limit else ""
    print(f"checkpoint of step {loaded.checkpoint.step}{part}")
    print(json_text({"tasks": [score._asdict() for score in scores]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
