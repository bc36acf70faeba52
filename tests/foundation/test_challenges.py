"""A right derivation passes, and a wrong one is told what is wrong with it, whatever it is."""

import ast
from pathlib import Path

import numpy as np
import pytest

from foundation.__main__ import main
from foundation.challenges.catalogue import CHALLENGES, Unusable
from foundation.challenges.diagnosis import Finding, Named, examine, judge
from foundation.chapters import CHAPTERS, OPERATIONS

QUICK = {"softmax", "layernorm"}
FIRST = {
    next((name for name in chapter.operations if name in CHALLENGES and name != "router"), "") for chapter in CHAPTERS
}
"""A challenge of each chapter."""


def run(folder: Path, *arguments: str) -> int:
    return main([*arguments, "--folder", str(folder)])


def when(operation: str) -> list[pytest.MarkDecorator]:
    if operation in QUICK:
        return []
    return [pytest.mark.reliability, *([] if operation in FIRST else [pytest.mark.slow])]


@pytest.mark.parametrize("operation", [pytest.param(name, marks=when(name)) for name in CHALLENGES])
def test_a_stub_is_not_tried_yet_and_the_real_function_is_right(
    operation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "derive", operation) == 0
    path, challenge = tmp_path / f"{operation}.py", CHALLENGES[operation]
    body = ast.unparse(next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)))
    assert body.count("\n") <= 2  # the signature, the cache, and no answer
    assert run(tmp_path, "check", operation) == 1
    assert "not tried yet" in capsys.readouterr().out
    with path.open("a") as file:
        file.write(f"\n\nfrom foundation.{challenge.module} import {challenge.backward}\n")
    assert main(["check", str(path)]) == 0  # by its path
    *_, so_far, following = capsys.readouterr().out.splitlines()
    assert so_far == f"{operation}: right in every case. Derived so far: 1 of {len(CHALLENGES)}."
    assert following.startswith("The next one: uv run python -m foundation derive ")
    assert following.split()[-1] in CHALLENGES.keys() - {operation}


def test_every_challenge_is_an_operation_of_the_table() -> None:
    assert set(CHALLENGES) <= set(OPERATIONS)
    assert {len(challenge.hints) for challenge in CHALLENGES.values()} == {3}


def test_a_file_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "linear.py").write_text("my work")
    assert run(tmp_path, "derive", "linear") == 0
    assert (tmp_path / "linear.py").read_text() == "my work"
    assert "stays as it is" in capsys.readouterr().out


WRONG = {
    "def softmax_backward(d_p, cache):\n    return 'text'": "of type str",
    "def softmax_backward(d_p, cache):\n    return d_p, d_p": "2 results, and 1 are asked for: d_logits",
    "def softmax_backward(d_p, cache):\n    return d_p.T": "transposed",
    "def softmax_backward(d_p, cache):\n    return 3.0": "has shape [], and [4, 6] is asked for",
    "def softmax_backward(d_p, cache):\n    return [[1], [2, 3]]": "of type list",
    "def softmax_backward(d_p, cache):\n    return 1j * d_p": "an array of numbers",
    "def softmax_backward(d_p, cache):\n    return d_p * float('nan')": "not a finite number",
    "def softmax_backward(d_p, cache):\n    return d_p @ d_p": "line 2: TypeError",
    "def softmax_backward(d_p):\n    return d_p": "TypeError",
    "def softmax_backward(d_p, cache):\n    exit()": "SystemExit",
    "def softmax_backward(d_p, cache):\n    return softmax_backward(d_p, cache)": "RecursionError",
    "def softmax_backward(d_p, cache):\n    (p,) = cache\n    return p * d_p": "the cross terms are forgotten",
    "softmax_backward = 7": "has no function softmax_backward",
    "def softmax_backward(d_p, cache:": "line 1: SyntaxError",
    "exit(3)": "SystemExit",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_answer_of_any_kind_is_told_what_is_wrong(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "softmax.py").write_text(text)
    assert run(tmp_path, "check", "softmax") == 1
    out, err = capsys.readouterr()
    assert WRONG[text] in out
    assert "--hint" in out.splitlines()[-1]
    assert "Traceback" not in out + err


def test_files_that_cannot_be_read_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "check", "softmax") == 1
    assert "python -m foundation derive softmax" in capsys.readouterr().out
    (tmp_path / "softmax.py").write_bytes(b"\xff\xfe\x00")
    assert run(tmp_path, "check", "softmax") == 1
    for text in ("[1, 2", "[" * 100_000):
        (tmp_path / "score.json").write_text(text)
        assert run(tmp_path, "check", "softmax", "--hint") == 0
    (tmp_path / "file").write_text("")
    for folder in ("file", "a" * 300):
        assert run(tmp_path / folder, "derive", "softmax") == 1
    assert "Traceback" not in capsys.readouterr().err


def test_hints_come_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(4):
        assert run(tmp_path, "check", "layernorm", "--hint") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" for ")[0] for line in said] == ["Hint 1 of 3", "Hint 2 of 3", "Hint 3 of 3", "Hint 3 of 3"]
    assert run(tmp_path, "check", "layernorm") == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("All hints are given. The derivation is in chapter 6: foundation/notebooks/06_")


@pytest.mark.parametrize("command", ["derive", "check"])
def test_an_unknown_operation_is_answered_with_the_near_ones(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, command, "layernrom") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "layernorm" in err


random = np.random.default_rng(0)
RIGHT, INPUT, SCALE = random.normal(size=(4, 5)), random.normal(size=(4, 5)), random.normal(size=5)
KNOWN = [Named("x", INPUT), Named("scale", SCALE), Named("wide", np.zeros((3, 4, 7)))]


@pytest.mark.parametrize(
    ("ours", "meaning"),
    [
        (2.0 * RIGHT, "a forgotten 1/2"),
        (0.5 * RIGHT, "a forgotten factor 2"),
        (-RIGHT, "a sign is wrong"),
        (RIGHT / 4, "a mean where a sum belongs, divided by 4, axis 0 of x"),
        (RIGHT * 5, "a sum where a mean belongs, not divided by 5, axis 1 of x"),
        (RIGHT / 12, "divided by 12, the rows of wide"),
        (RIGHT * 7**0.5, "a forgotten 1/sqrt of 7, axis 2 of wide"),
        (1.7 * RIGHT, "a constant factor is wrong"),
        (0.0 * RIGHT, "this way back is missing"),
        (RIGHT / SCALE, "multiply by scale"),
        (RIGHT * SCALE, "scale is multiplied in once too often"),
        (RIGHT - RIGHT.mean(-1, keepdims=True), "the same along each row"),
        (RIGHT - INPUT * random.normal(size=(4, 1)), "in each row it is x times one number"),
        (np.where(np.arange(4)[:, None] == 2, 0.0, RIGHT), "a contribution is lost"),
        (RIGHT + np.eye(4, 5), "80 % of the entries are right"),
        (INPUT * INPUT, "no simple pattern"),
        (INPUT + 1.0, "another order"),
        (RIGHT.astype(np.float32), "keep the type of the input"),
        (np.stack([RIGHT, RIGHT]), "an axis too many"),
        (RIGHT.reshape(2, 10), "in another shape"),
    ],
)
def test_what_a_wrong_array_usually_means(ours: object, meaning: str) -> None:
    finding = examine("d_x", ours, RIGHT, KNOWN, [Named("d_other", INPUT + 1.0)])
    assert meaning in finding.meaning
    assert finding.wrong.startswith("d_x")


def test_a_square_matrix_and_a_leak() -> None:
    square = RIGHT[:, :4]
    assert "transposed" in examine("d_w", square.T, square, KNOWN).meaning
    sparse = np.where(np.arange(4)[:, None] == 1, 0.0, RIGHT)
    assert "leaks" in examine("d_x", RIGHT, sparse, KNOWN).meaning
    assert examine("d_b", None, None, KNOWN).wrong == ""
    assert examine("d_b", 1.0, None, KNOWN).wrong != ""
    assert examine("d_x", RIGHT * (1 + 1e-13), RIGHT, KNOWN).wrong == ""


def test_a_result_of_several_named_arrays_is_judged_array_by_array() -> None:
    wanted = {"w_in": [1.0], "w_out": [2.0]}
    assert judge(["d_dense"], {"w_out": [3.0], "w_in": [1.0]}, (wanted,), []).wrong.startswith("d_dense['w_out'][0]: ")
    assert judge(["d_dense"], {"w_out": [2.0], "w_in": [1.0]}, (wanted,), []) == Finding()
    for answer, given in (([1.0], "of type list"), ({"w_in": [1.0]}, "a dict of w_in")):
        with pytest.raises(Unusable, match=f"^d_dense is {given}, and a dict of w_in, w_out is asked for$"):
            judge(["d_dense"], answer, (wanted,), [])


def test_the_first_wrong_entry_has_its_index_and_its_ratio() -> None:
    ours = RIGHT.copy()
    ours[2, 3] *= 1.5
    wrong = examine("d_x", ours, RIGHT, KNOWN).wrong
    assert wrong.startswith("d_x[2, 3]: yours ")
    assert "ratio 1.5 (1 of 20 entries are off)" in wrong
