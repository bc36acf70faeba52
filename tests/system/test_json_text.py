"""Every line and every file of JSON comes from one function, and holds no NaN."""

import ast
import json
import math
from pathlib import Path

from moe_jax.system.json_text import json_text

PACKAGE = Path(__file__).resolve().parents[2] / "moe_jax"
OTHERS = {
    "benchmarks/mixtral.py": 2,  # a program that imports nothing of this project; it prints times
    "data/hf_tokenizers.py": 1,  # an error names a value
    "data/synthetic/stories.py": 1,  # a fingerprint
    "data/token_store.py": 1,
    "data/tokenizers.py": 1,
    "interop/pretrained.py": 1,
    "interop/pretrained_shape.py": 2,  # errors that name a value
    "parallel/processes.py": 2,  # messages between processes
    "runs/manifest.py": 2,  # a manifest ends with the digest of its own text, whatever version has written it
    "runs/safetensors_file.py": 1,  # a header whose bytes are those of another library
    "runs/verify_resume.py": 1,
    "system/json_text.py": 1,
}
"""Calls of json.dumps elsewhere: most make a text that is digested, which must never change."""


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"loss": math.nan, "deep": [1.5, (math.inf, -math.inf)], "step": 3, "ok": True, "text": "NaN"}
    text = json_text(value)
    assert text == '{"loss": null, "deep": [1.5, [null, null]], "step": 3, "ok": true, "text": "NaN"}'
    assert json.loads(json_text(value, indent=2)) == json.loads(text)


def test_nobody_else_writes_json() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and node.attr in ("dumps", "dump")
        ]
        if calls:
            found[path.relative_to(PACKAGE).as_posix()] = len(calls)
    assert found == OTHERS
