"""Tiny runs that are fine-tuned: a base run with random weights, and conversations that can be learned by heart."""

import json
from pathlib import Path

from moe_jax.config import RunConfig
from tests.support import saved_run
from tests.support.commands import sft_settings

ANSWERS = {"cat": "meow", "dog": "woof", "cow": "moo", "owl": "hoot"}


def write_conversations(path: Path, rows: int = 60) -> Path:
    """Each asks what an animal says."""
    names = list(ANSWERS)
    chats = [
        {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": ANSWERS[name]}]}
        for name in (names[i % len(names)] for i in range(rows))
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def base_run(folder: Path, **model: object) -> Path:
    """A base run with T = 32 and one layer."""
    folder.mkdir(parents=True, exist_ok=True)
    return saved_run.save_run(folder, **({"seq_len": 32, "layers": 1} | model))


def settings(base: Path, data: Path, out: Path, *flags: str) -> RunConfig:
    """The settings of `sft`, for 6 steps."""
    given = ["--run", str(base), "--data", str(data), "--out", str(out), "--steps", "6", "--batch-size", "4"]
    given += ["--eval-every", "3", "--save-every", "3", "--train.log-every", "1"]
    return sft_settings(*given, *flags)[0]
