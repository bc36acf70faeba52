"""Random command lines of train.py, over every flag that it has: valid and wrong values, and combinations of them.

The flags and their types come from the configuration, so a new flag is drawn without a change here. A line is a
function of (seed, number), so one that fails can be repeated alone. Sizes are tiny, because accepted lines are trained.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.cli.arguments import Argument
from moe_jax.cli.train import Train
from moe_jax.config import ConfigError
from moe_jax.config.presets import preset
from moe_jax.system.files import json_text

type Key = tuple[str, str]

SIZES: dict[Key, tuple[Any, ...]] = {
    ("model", "seq_len"): (8, 16, 2, 3, 24),
    ("model", "layers"): (1, 1, 2),
    ("model", "width"): (8, 16, 8, 16, 4, 6),
    ("model", "heads"): (1, 2, 1, 2, 1, 2, 4),
    ("model", "experts"): (4, 5, 4, 3, 2, 1),
    ("model", "expert_hidden"): (8, 4, 1),
    ("model", "shared_experts"): (0, 0, 1),
    ("model", "vocab_size"): (0, 0, 0, 0, 300),
    ("routing", "top_k"): (1, 2, 1, 2, 1, 2, 3),
    ("data", "vocab_size"): (257, 270, 300),
    ("data", "stories"): (40, 2, 1),
    ("data", "eval_tokens"): (50, 2, 400),
    ("train", "steps"): (4, 1, 2, 3, 5, 6, 8),
    ("train", "batch_size"): (1, 2, 3),
    ("train", "grad_accum"): (1, 1, 2, 3),
}
"""Values of the flags that a line always has: a preset's own would take minutes."""
LARGE = ("seed", "stories_seed", "patience", "warmup_steps", "log_every", "eval_every", "save_every")
"""Whole numbers that may be large without more work."""
SHARES = {"tensorboard": 0.01, "wandb": 0.01, "trackio": 0.01, "dry_run": 0.03, "resume": 0.1, "preset": 0.3}
SHARES |= dict.fromkeys(("upcycle", "init_from", "base", "format", "lora_rank", "lora_alpha", "train_router"), 0.0)
"""How often a flag is given, where it is not GIVEN."""
BLOCK = 4
"""So many lines in a row have the same model, text and precision: most programs are then compiled once for all."""
SHARED = ("model", "routing", "data", "execution")
"""The sections that they share."""
GIVEN, WRONG, FILE, UPCYCLE = 0.2, 0.2, 0.15, 0.05
"""Share of the other flags in a line; and of the lines with a wrong word, a settings file, a dense run to start on."""
OUTS = ("run", "run", "run", "", "a run", "läuft", "deep/er/run", "-run")
WRONG_OUTS = ("file", "file/run", "r" * 300, "link", "run\0", "run\udcff")
TINY = preset("nano").override({key: values[0] for key, values in SIZES.items()})


@dataclass(frozen=True)
class Line:
    """A command line of train.py, and where its second run is interrupted."""

    seed: int
    number: int
    argv: tuple[str, ...]
    share: float
    """The step before which it is interrupted, as a share of its steps."""
    dies: bool
    """Whether the process is lost then. Else it is asked to stop, and saves."""
    settings: str = ""
    """Content of the file settings.toml, if --config names it."""

    def __str__(self) -> str:
        return f"seed {self.seed} number {self.number}: {' '.join(map(ascii, self.argv))}\n{self.settings}"


@dataclass(frozen=True)
class Places:
    """What the lines may name."""

    texts: tuple[str, ...]
    """Files and folders of text, and names of corpora."""
    dense: tuple[str, ...]
    """Dense runs, to be upcycled."""


def draw(seed: int, number: int, places: Places) -> Line:
    """The line of a number."""
    rng = random.Random(f"{seed}/{number}")
    shared = random.Random(f"{seed}/block {number // BLOCK}")
    upcycled = rng.random() < UPCYCLE
    arguments = {a.key: a for a in Train.arguments()}
    values = (_upcycled_values if upcycled else _values)(rng, shared, arguments, places)
    argv, in_file = [], {}
    from_file = rng.random() < FILE
    for key, value in values.items():
        if from_file and key != ("", "dry_run") and rng.random() < 0.5:
            in_file[key] = value
        else:
            argv += _typed(rng, arguments[key], value)
    if from_file:
        argv += ["--config", "settings.toml"]
    if rng.random() < WRONG:
        argv += _wrong(rng, arguments)
    return Line(seed, number, tuple(argv), rng.random(), rng.random() < 0.5, _toml(in_file))


def _source(key: Key, rng: random.Random, shared: random.Random) -> random.Random:
    return shared if key[0] in SHARED else rng


def _values(
    rng: random.Random, shared: random.Random, arguments: dict[Key, Argument], places: Places
) -> dict[Key, Any]:
    """A value for every size, and for some of the other flags. `shared` draws what the lines of a block share."""
    found: dict[Key, Any] = {}
    for key in [key for key in SIZES if key in arguments]:
        found[key] = _source(key, rng, shared).choice(SIZES[key])
    found["data", "source"] = shared.choice(places.texts)
    found["data", "tokenizer"] = shared.choice(("bpe", "byte") * 12 + ("gpt2",))
    found["", "out"] = rng.choice(OUTS)
    for key, argument in arguments.items():
        source = _source(key, rng, shared)
        if key not in found and key[1] != "config" and source.random() < SHARES.get(key[1], GIVEN):
            found[key] = _value(source, argument)
    return dict(sorted(found.items(), key=lambda _: rng.random()))


def _upcycled_values(
    rng: random.Random, shared: random.Random, arguments: dict[Key, Argument], places: Places
) -> dict[Key, Any]:
    """The same without what must be as in the dense run."""
    found = _values(rng, shared, arguments, places)
    own = {k: v for k, v in found.items() if k[0] not in ("model", "data") and k != ("", "preset")}
    return own | {("", "upcycle"): rng.choice(places.dense), ("model", "experts"): rng.choice((3, 4))}


def _value(rng: random.Random, argument: Argument) -> Any:
    """A value that the flag may have, where the other values are usual."""
    default = argument.default
    if argument.kind is bool:
        return rng.random() < 0.7
    if argument.choices:
        # --preset auto chooses for a new run: the same line with --resume is refused.
        return rng.choice([c for c in argument.choices if (argument.flag, c) != ("--preset", "auto")])
    if argument.kind is str:
        return default
    for _ in range(20):
        if argument.kind is int:
            large = (1000, 10**6, 2**31 - 1) if argument.name in LARGE else ()
            value = rng.choice((0, 1, 2, 3, 5, default, *large))
        else:
            near = default * rng.choice((0.1, 0.5, 2, 3))
            usual = (0.0, default, near, near, 0.5, 1.0, 1e-3, round(rng.random(), 3))
            value = rng.choice(usual) if rng.random() < 0.9 else rng.choice((1e-30, 1e-12, 0.999999, 1e3, 1e6, 1e30))
        if _allowed(argument.key, value):
            return value
    return default


def _allowed(key: Key, value: Any) -> bool:
    if key[0] == "" and not hasattr(TINY, key[1]):  # a flag of the command
        return True
    try:
        TINY.override({key: value})
    except ConfigError:
        return False
    return True


def _typed(rng: random.Random, argument: Argument, value: Any) -> list[str]:
    """A flag with its value, by one of its names and in one of its forms."""
    if argument.kind is bool:
        return [rng.choice(argument.flags if value else argument.off_flags)]
    flag, text = rng.choice(argument.flags), repr(value) if argument.kind is float else str(value)
    return [flag, text] if rng.random() < 0.5 and not text.startswith("--") else [f"{flag}={text}"]


NUMBERS = (
    "-1",
    "x",
    "",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1.5",
    "0x10",
    "9" * 5000,
    "8589934592",
    "1,5",
    "- 1",
    "\u0663",
)
WORDS = ("nonsense", "", "MUON", "byte ", "none,", "\u202e", "\x1b[2J", "0")


def _wrong(rng: random.Random, arguments: dict[Key, Argument]) -> list[str]:
    """Words that most lines cannot have."""
    kind = rng.choice(("value", "value", "value", "word", "out", "memory", "source"))
    if kind == "word":
        return rng.choice(WRONG_WORDS)
    if kind == "out":
        return [f"--out={rng.choice(WRONG_OUTS)}"]
    if kind == "memory":
        return rng.choice(TOO_LARGE)
    if kind == "source":
        return [f"--data={rng.choice(('nowhere.txt', '', 'file', 'tinystories', 'link', 'd' * 300))}"]
    argument = rng.choice([a for a in arguments.values() if a.kind is not str or a.choices])
    if argument.kind is bool:
        return rng.choice(([f"{argument.flag}=yes"], [argument.flag, "true"], [f"{argument.flag}="]))
    return [f"{argument.flag}={rng.choice(WORDS if argument.choices else NUMBERS)}"]


WRONG_WORDS = (
    ["--model.nonsense=3"],
    ["--stpes", "3"],
    ["stray"],
    ["--steps"],
    ["--no-steps"],
    ["-steps", "3"],
    ["--"],
    [""],
    ["--config", "nowhere.toml"],
    ["--upcycle", "nowhere"],
    ["--steps=2", "--steps=3"],
    ["--help"],
)
TOO_LARGE = (
    ["--model.layers=4096", "--model.width=131072", "--model.expert-hidden=131072"],
    ["--seq-len=1048576", "--batch-size=65536"],
    ["--experts=4096", "--model.expert-hidden=131072", "--model.width=131072", "--model.heads=1"],
    ["--set=model.vocab_size=16777216", "--model.width=131072", "--model.heads=1"],
)


def _toml(values: dict[Key, Any]) -> str:
    """A settings file."""
    lines = []
    for section in dict.fromkeys(sorted(key[0] for key in values)):
        lines += [f"[{section}]"] if section else []
        lines += [f"{name} = {json_text(value)}" for (s, name), value in values.items() if s == section]
    return "\n".join(lines) + "\n" if lines else ""


def prepare(folder: Path) -> None:
    """What some lines name beside texts and runs: a file, and a link to nothing."""
    (folder / "file").write_bytes(b"\x00\x01")
    (folder / "link").symlink_to("nothing")
