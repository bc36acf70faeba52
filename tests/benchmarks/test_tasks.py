"""Tasks of lm-evaluation-harness: made tasks on disk, and each number computed again from the model's logits."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the group `tasks`: uv run --group tasks pytest")

import tasks
from lm_eval.api.instance import Instance
from tasks import RunModel

from moe_jax.api import Run, load_run
from tests.support import saved_run

CHOICES = [
    {"question": "The cat said", "choices": [" hello", " cake", " up"], "answer": 1},
    {"question": "Once upon", "choices": [" a time", " the dragon"], "answer": 0},
    {"question": "", "choices": ["A dragon", "B"], "answer": 0},
]
TEXTS = [{"text": saved_run.STORY.strip()}, {"text": "a cake"}]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
CHOICE = """
task: made_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
WHOLE = """
task: made_whole
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, str]]:
    """A run with T = 64, and the folder of the tasks."""
    root = tmp_path_factory.mktemp("tasks")
    with saved_run.quick_training(root / "cache", samples=False) as patch:
        patch.setenv("HF_HOME", str(root / "hub"))
        patch.setenv("HF_DATASETS_CACHE", str(root / "datasets"))
        for name, text, rows in (("choice", CHOICE, CHOICES), ("whole", WHOLE, TEXTS)):
            file = root / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            (root / f"{name}.yaml").write_text(text + COMMON.format(file=file))
        (root / "gone.yaml").write_text(CHOICE.replace("made_choice", "made_gone") + COMMON.format(file=root / "gone"))
        yield load_run(saved_run.save_run(root, seq_len=64)), str(root)


def logprob(run: Run, context: str, continuation: str) -> tuple[float, bool]:
    """From the logits of the whole text, in float64; and whether every token of the continuation is the likeliest."""
    tokens = run.tokenizer.encode(context + continuation)
    logits = np.float64(run.logits(context + continuation))[: len(tokens), : run.tokenizer.vocab_size]
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scored = range(len(run.tokenizer.encode(context)), len(tokens))
    return sum(logs[i, tokens[i]] for i in scored), all(logs[i].argmax() == tokens[i] for i in scored)


def test_an_answer_is_chosen_by_its_log_probability(made: tuple[Run, str]) -> None:
    run, folder = made
    right = []
    for row in CHOICES:
        scores = [logprob(run, row["question"], choice)[0] for choice in row["choices"]]
        right.append(int(np.argmax(scores)) == row["answer"])
    (score,) = tasks.ask(run, ["made_choice"], folder=folder)
    assert (score.task, score.metric) == ("made_choice", "acc")
    assert score.value == pytest.approx(np.mean(right))
    assert score.error == pytest.approx(np.std(right, ddof=1) / np.sqrt(3))
    (first,) = tasks.ask(run, ["made_choice"], folder=folder, limit=1)
    assert first.value == right[0]


def test_bits_per_byte_of_whole_texts(made: tuple[Run, str]) -> None:
    """The first text is longer than the context: 92 tokens in windows of 63. The others of the second window are scored
    after the tokens before them."""
    run, folder = made
    model = RunModel(run)
    long = run.tokenizer.encode(TEXTS[0]["text"])
    assert len(long) > 63
    rolling = [Instance("loglikelihood_rolling", {}, (row["text"],), 0) for row in TEXTS]
    first, second = model.loglikelihood_rolling(rolling)
    assert second == pytest.approx(logprob(run, "", TEXTS[1]["text"])[0], abs=1e-4)
    text = run.tokenizer.decode(long[:63])
    begin = logprob(run, "", text)[0]
    rest = len(long) - 63
    window = [0, *long[-63 - 1 :]]  # the separator only fills a place: `_score` reads the last T tokens
    assert first == pytest.approx(begin + model._score(window[:-rest], window[-rest:])[0], abs=1e-4)
    (score,) = tasks.ask(run, ["made_whole"], folder=folder)
    size = sum(len(row["text"].encode()) for row in TEXTS)
    assert score.value == pytest.approx(-(first + second) / size / np.log(2), rel=1e-5)
