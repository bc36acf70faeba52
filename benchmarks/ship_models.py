"""Makes the models that come with the package (`moe_jax/models`), each from a run.

    uv run train.py                                                            runs/nano
    uv run train.py --preset story-cpu --data FOLDER --out runs/stories        FOLDER/train.txt, FOLDER/valid.txt
    uv run moe-jax sft --run nano --data FOLDER --steps 3000 --batch-size 16 --optimizer muon --lr 0.002 \\
        --train.muon-lr 0.01 --eval-every 500 --out runs/nano-chat             FOLDER by `synthetic.talk.write_talks`
    uv run python benchmarks/ship_models.py nano runs/nano

A shipped model is a run as `quantize --to int8` writes it, without its records of training: config.json,
tokenizer.json, summary.json, and one checkpoint whose weights are in weights.safetensors alone. It names no path
of the machine that trained it. The cards, `README.md`, are written by hand and stay.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moe_jax.runs import manifest
from moe_jax.runs.catalog import SHIPPED
from moe_jax.system.files import json_text
from moe_jax.system.machine import versions
from moe_jax.training.quantize import quantize_run

TEXTS = {"nano": "stories", "stories": "tinystories-sample", "nano-chat": "talks"}
"""Name of a model -> the `--data` of its config.json: an embedded corpus, or a name that no `--data` has, because the
text does not ship."""
OPENINGS = {"nano-chat": ["Tell me a story.", "Who are you?"]}
"""What `chat` proposes to type, where the beginnings of the validation text are not what one would."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TEXTS)
    parser.add_argument("run", type=Path, help="the run that it is made of")
    arguments = parser.parse_args()
    ship(arguments.name, arguments.run, SHIPPED / arguments.name)


def ship(name: str, run: Path, out: Path) -> None:
    """Write the model `name` of a run into the folder `out`. Its card, if there is one, stays."""
    with tempfile.TemporaryDirectory() as folder:
        made = quantize_run(run, "int8", Path(folder) / name)
        assert made.before is not None, made.not_scored
        assert made.after is not None
        print(f"{name}: {made.before.bits_per_byte:.4f} bits per byte before, {made.after.bits_per_byte:.4f} after")
        source = Path(folder) / name
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        for file in ("config.json", "tokenizer.json", "summary.json"):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, out / file)
        checkpoint = out / "checkpoints" / made.checkpoint.name
        shutil.copytree(made.checkpoint, checkpoint)
    config = json.loads((out / "config.json").read_text())
    _generalise(config, name)
    config["history"] = []
    (out / "config.json").write_text(json_text(config, indent=2) + "\n")
    if name in OPENINGS:
        summary = json.loads((out / "summary.json").read_text()) | {
            "opening": OPENINGS[name][0],
            "openings": OPENINGS[name],
        }
        (out / "summary.json").write_text(json_text(summary, indent=2) + "\n")
    document = manifest.read(checkpoint)
    _generalise(document["context"]["config"], name)
    document["context"]["quantized"]["made_from"] = f"runs/{name}"
    if origin := document["context"].get("origin"):
        origin["tuned_from"] = Path(origin["tuned_from"]).name
    manifest.write(checkpoint, document | {"versions": versions()})


def _generalise(config: dict[str, Any], name: str) -> None:
    """Replace the paths of the machine that has trained the run."""
    config["out"], config["data"]["source"] = name, TEXTS[name]


if __name__ == "__main__":
    main()
