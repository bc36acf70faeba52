"""The name of the embedded corpus follows what the corpus says, and not how its source is laid out.

Copies of the three files, changed in one place each, are imported as a package of their own in another process.
"""

import ast
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


def with_other_comments(source: str) -> str:
    """The source with every docstring changed, comments at both ends, and one after every import."""
    lines = source.splitlines()
    documented = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]
    assert documented
    for docstring in documented:
        line = lines[docstring.lineno - 1]
        assert line.strip().startswith('"""'), line
        lines[docstring.lineno - 1] = line.replace('"""', '"""Said otherwise. ', 1)
    lines = [f"{line}  # a comment" if line.startswith(("import ", "from ")) else line for line in lines]
    return "\n".join(["# A comment.", *lines, "# Another.", ""])


def test_a_copy_has_the_fingerprint_of_the_original(tmp_path: Path) -> None:
    assert told(tmp_path)[0] == fingerprint(0, 100)


@pytest.mark.parametrize("name", FILES)
def test_comments_and_docstrings_change_nothing(name: str, tmp_path: Path) -> None:
    assert told(tmp_path, name, with_other_comments)[0] == fingerprint(0, 100)


def test_the_lines_of_a_rule_may_be_broken_elsewhere(tmp_path: Path) -> None:
    old, new = "{friend} ate <near> the {spot}, and", "{friend} ate <near>\n            the {spot}, and"
    assert told(tmp_path, "stories.py", lambda source: source.replace(old, new))[0] == fingerprint(0, 100)


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


def test_seed_and_number_of_stories_count() -> None:
    settings = ((0, 100), (1, 100), (0, 101), (1, 11), (11, 1))
    assert len({fingerprint(seed, count) for seed, count in settings}) == len(settings)
