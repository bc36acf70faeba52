"""The name of the embedded corpus follows what the corpus says, and not how its source is laid out.

Copies of the three files, changed in one place each, are imported as a package of their own in another process.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_jax.data.synthetic
from moe_jax.data.synthetic.stories import fingerprint

FOLDER = Path(moe_jax.data.synthetic.__file__).parent
FILES = ("grammar.py", "stories.py", "vocabulary.py")
PRINT = "from copied.stories import fingerprint, generate; print(fingerprint(0, 100)); print(*generate(0, 'train', 3))"


def told(folder: Path, name: str = "", change: Callable[[str], str] = str) -> tuple[str, str]:
    """Fingerprint and first stories of a copy, one of whose files is changed."""
    package = folder / "copied"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for file in FILES:
        source = (FOLDER / file).read_text(encoding="utf-8")
        changed = change(source) if file == name else source
        assert (changed != source) == (file == name), "the change found nothing to change"
        (package / file).write_text(changed.replace("moe_jax.data.synthetic", "copied"), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    run = subprocess.run(
        [sys.executable, "-c", PRINT], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    digest, stories = run.stdout.splitlines()
    return digest, stories


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("vocabulary.py", "red blue green", "red teal green"),
        ("vocabulary.py", '"Baa", "pen", "clover"', '"Baa", "pen", "grass"'),
        ("vocabulary.py", '("honest",)', '("honest", "hat")'),
        ("stories.py", "[near|by|behind|beside]", "[near|by|behind|under]"),
        ("stories.py", "<opening> <plot> <closing> <supper>", "<opening> <plot> <supper> <closing>"),
        ("stories.py", "VALIDATION_STORIES = 600", "VALIDATION_STORIES = 601"),
        ("stories.py", 'f"{seed} {split} {i}"', 'f"{split} {seed} {i}"'),
        ("grammar.py", "index = int(random() * count)", "index = count - 1 - int(random() * count)"),
    ],
    ids=["a word", "a form", "an article", "a rule", "an order", "the validation", "the seeds", "the draw"],
)
def test_another_text_is_another_corpus(name: str, old: str, new: str, tmp_path: Path) -> None:
    def change(source: str) -> str:
        assert source.count(old) == 1
        return source.replace(old, new)

    assert told(tmp_path, name, change)[0] != fingerprint(0, 100)


def test_comments_and_the_lines_of_a_rule_change_nothing(tmp_path: Path) -> None:
    def change(source: str) -> str:
        lines = source.replace("{friend} ate <near> the", "{friend} ate <near>\n            the").splitlines()
        return "\n".join(f"{line}  # a comment" if line.startswith(("import ", "from ")) else line for line in lines)

    assert told(tmp_path, "stories.py", change)[0] == fingerprint(0, 100)
    assert len({fingerprint(*settings) for settings in ((0, 100), (1, 100), (0, 101), (1, 11), (11, 1))}) == 5
