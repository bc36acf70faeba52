"""Random damage to the folder of a run: any file or folder of it, any kind of damage.

A mutation is a function of (seed, number) and of the runs it is made from, so a failing one can be repeated alone.
"""

import json
import os
import random
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import UserError
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.runs import manifest

DEEP = 200_000
_HOLE = "@@hole@@"


class Impossible(Exception):
    """A kind of damage that this file cannot have. Another one is drawn."""


@dataclass
class Case:
    """A copy of a run, which is to be damaged."""

    run: Path
    others: list[Path]
    """Whole runs of other seeds and tokenizers."""
    outside: Path
    """A folder of somebody else, to which links may point."""
    rng: random.Random


@dataclass(frozen=True)
class Mutation:
    """What was done."""

    seed: int
    number: int
    path: str
    kind: str
    sealed: str = ""
    """The digests that were written anew, so that they are right: "files", "manifest", "tokenizer", "config"."""

    gone: bool = False
    """Whether a checkpoint is not there any more. Nothing says that it was: another one is the best one then."""

    @property
    def forged(self) -> bool:
        """Whether the run says of itself that it is another one: other numbers are then right."""
        return self.sealed in ("tokenizer", "config")

    def __str__(self) -> str:
        sealed = f", digests of {self.sealed} made right" if self.sealed else ""
        return f"seed {self.seed} number {self.number}: {self.path}: {self.kind}{sealed}"


def mutate(case: Case, seed: int, number: int) -> Mutation:
    """Damage one file or folder of a run, perhaps with the digests made right afterwards."""
    before = _checkpoints(case.run)
    while True:
        kind = case.rng.choice(list(KINDS))
        path = _draw_path(case)
        name = path.relative_to(case.run).as_posix()
        try:
            KINDS[kind](case, path)
        except Impossible:
            continue
        sealed = _seal(case, path) if case.rng.random() < 0.5 else ""
        return Mutation(seed, number, name, kind, sealed, gone=_checkpoints(case.run) < before)


def _checkpoints(run: Path) -> set[str]:
    return {p.name for p in run.glob("checkpoints/*")}


def _draw_path(case: Case) -> Path:
    """A file or folder. Groups are drawn evenly first: the many files of a checkpoint would hide the others."""
    groups: dict[str, list[Path]] = {}
    for path in _sorted(case.run):
        name = path.relative_to(case.run).as_posix()
        group = "folder" if path.is_dir() else re.sub(r"\d{8}", "", name)
        for part in ("arrays", "report"):
            group = part if f"{part}/" in name and not path.is_dir() else group
        groups.setdefault(group, []).append(path)
    return case.rng.choice(groups[case.rng.choice(sorted(groups))])


def _sorted(run: Path) -> list[Path]:
    """Everything below a folder. Orbax gives its files random names, so their sizes come first."""

    def order(path: Path) -> tuple[str, int, str]:
        return _plain_name(run, path), path.lstat().st_size, path.name

    return sorted(run.rglob("*"), key=order)


def _plain_name(run: Path, path: Path) -> str:
    """The name below a run, without what orbax draws at random."""
    return re.sub(r"[0-9a-f]{32}", "", path.relative_to(run).as_posix())


# Bytes


def _content(path: Path) -> bytes:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise Impossible
    return path.read_bytes()


def flip(case: Case, path: Path) -> None:
    content = bytearray(_content(path))
    if not content:
        raise Impossible
    for _ in range(case.rng.choice((1, 1, 3, 30))):
        content[case.rng.randrange(len(content))] ^= 1 << case.rng.randrange(8)
    path.write_bytes(content)


def truncate(case: Case, path: Path) -> None:
    content = _content(path)
    if not content:
        raise Impossible
    path.write_bytes(content[: case.rng.randrange(len(content))])


def empty(_: Case, path: Path) -> None:
    _content(path)
    path.write_bytes(b"")


def append(case: Case, path: Path) -> None:
    content = _content(path)
    garbage = (b"\0" * 64, b"}\n", b"[" * DEEP, b"\xff\xfe\x80", content, case.rng.randbytes(300), b"1" * 5000 + b"\n")
    path.write_bytes(content + case.rng.choice(garbage))


def replace_bytes(case: Case, path: Path) -> None:
    _content(path)
    path.write_bytes(case.rng.choice((b"null", b"[]", b"{}", b'""', b"0", b"NaN", b"\xef\xbb\xbf{}", b"[" * DEEP)))


def grow(case: Case, path: Path) -> None:
    """A file of 8 GiB that takes no room on the disk."""
    _content(path)
    with path.open("ab") as file:
        file.truncate(2**33)


# Kinds of files


def _away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def delete(_: Case, path: Path) -> None:
    _away(path)


def to_folder(case: Case, path: Path) -> None:
    _content(path)
    path.unlink()
    path.mkdir()
    if case.rng.random() < 0.5:
        (path / "file").write_text("theirs\n")


def to_file(_: Case, path: Path) -> None:
    if not path.is_dir():
        raise Impossible
    shutil.rmtree(path)
    path.write_text("theirs\n")


def to_pipe(_: Case, path: Path) -> None:
    _away(path)
    os.mkfifo(path)


def to_device(case: Case, path: Path) -> None:
    """/dev/zero never ends, /dev/full cannot be written."""
    _away(path)
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, case.rng.choice((3, 5, 7))))
    except OSError:
        path.symlink_to("/dev/zero")


def link_outside(case: Case, path: Path) -> None:
    """To what somebody else has; or to the same content, moved there."""
    targets = [p for p in _sorted(case.outside) if p.is_dir() == path.is_dir()]
    target = case.rng.choice([case.outside / "moved", *targets])
    if target.name == "moved" and not target.exists():
        shutil.move(path, target)
    else:
        _away(path)
    path.symlink_to(target)


def link_inside(case: Case, path: Path) -> None:
    others = [p for p in _sorted(case.run) if p.is_dir() == path.is_dir() and p != path]
    target = case.rng.choice([p for p in others if not p.is_relative_to(path)] or [case.run])
    _away(path)
    path.symlink_to(target)


def link_dangling(case: Case, path: Path) -> None:
    _away(path)
    path.symlink_to(case.rng.choice((case.outside / "new", path, Path("nothing"))))


def mode(case: Case, path: Path) -> None:
    if os.geteuid() == 0:
        raise Impossible  # permissions do not stop root
    path.chmod(case.rng.choice((0, 0o111, 0o200, 0o444)))


# Swaps


def swap_runs(case: Case, path: Path) -> None:
    """The file or folder of another run."""
    other, name = case.rng.choice(case.others), _plain_name(case.run, path)
    theirs = next((p for p in _sorted(other) if _plain_name(other, p) == name), None)
    if theirs is None or theirs.is_dir() != path.is_dir():
        raise Impossible
    _away(path)
    if theirs.is_dir():
        shutil.copytree(theirs, path)
    else:
        shutil.copyfile(theirs, path)


def swap_within(case: Case, path: Path) -> None:
    others = [p for p in _sorted(case.run) if p.is_dir() == path.is_dir() and p != path]
    others = [p for p in others if not p.is_relative_to(path) and not path.is_relative_to(p)]
    other, third = case.rng.choice(others), case.run / "third"
    path.rename(third)
    other.rename(path)
    third.rename(other)


# JSON


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), -0.0),
    *("", "NaN", "text", "\ud800", "\0", "x" * 10_000, [], {}, [[]], [None], {"a": 1}, [10**400]),
    _HOLE,
)
HOLES = ("[" * DEEP + "]" * DEEP, "[" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "1" + "0" * 5000, "1e999", "-1" * 3)


def edit(case: Case, path: Path) -> None:
    """Change one value of a JSON document, or of one line of JSON: another value, a key less, a key more."""
    content = _content(path)
    if path.suffix not in (".json", ".jsonl") and path.name != "_METADATA":
        raise Impossible
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    number = case.rng.randrange(len(lines))
    try:
        document = json.loads(lines[number])
    except ValueError:
        raise Impossible from None
    places = list(_places(document))
    owner, key = case.rng.choice(places)
    how = case.rng.choice(("value", "value", "value", "missing", "more"))
    if how == "missing":
        del owner[key]
    elif how == "more" and isinstance(owner, dict):
        owner[case.rng.choice(("more", "", "x" * 3000, "__class__"))] = case.rng.choice(VALUES)
    else:
        owner[key] = case.rng.choice(VALUES)
    lines[number] = _render(case, path, document).encode("utf-8", "surrogatepass")
    path.write_bytes(b"\n".join(lines) + (b"\n" if len(lines) > 1 else b""))


def _places(value: Any) -> Any:
    """(container, key) of every value in a document. Each container is as likely as another is large."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


def _render(case: Case, path: Path, document: Any) -> str:
    """The document as text, with what JSON's writer would not write in its place."""
    hole = case.rng.choice(HOLES)
    if path.name == manifest.NAME and case.rng.random() < 0.7:
        return manifest.render(document).replace(f'"{_HOLE}"', hole)
    return json.dumps(document, indent=None if path.suffix == ".jsonl" else 1).replace(f'"{_HOLE}"', hole)


KINDS: dict[str, Callable[[Case, Path], None]] = {
    "bytes flipped": flip,
    "cut short": truncate,
    "emptied": empty,
    "garbage at its end": append,
    "another content": replace_bytes,
    "8 GiB long": grow,
    "deleted": delete,
    "a folder in its place": to_folder,
    "a file in its place": to_file,
    "a pipe in its place": to_pipe,
    "a device in its place": to_device,
    "a link to the outside": link_outside,
    "a link to the inside": link_inside,
    "a link to nothing": link_dangling,
    "other permissions": mode,
    "taken from another run": swap_runs,
    "swapped within the run": swap_within,
    "a value of its JSON": edit,
    "one more value of its JSON": edit,
    "yet another value of its JSON": edit,
}
"""JSON has more ways to be wrong than bytes have, so its kind is there more often."""


# Digests


def _seal(case: Case, path: Path) -> str:
    """Make the digests right that know a file. Returns which, or nothing where there are none, or none can be made."""
    step = next((p for p in path.parents if p.parent == case.run / "checkpoints"), None)
    with suppress(OSError, ValueError, UserError, RecursionError, AttributeError, KeyError, TypeError):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 2**26:
            return ""
        if path.name == manifest.NAME:
            path.write_text(manifest.render(json.loads(path.read_text())))
            return "manifest"
        if step is not None:
            _change(step, lambda m: m.update(files=_files(step)))
            return "files"
        if path.name == "tokenizer.json":
            digest = load_tokenizer(path).digest
            for folder in (case.run / "checkpoints").iterdir():
                _change(folder, lambda m: m["context"].update(tokenizer=digest))
            return "tokenizer"
        if path.name == "config.json":
            config = json.loads(path.read_text())
            for folder in (case.run / "checkpoints").iterdir():
                _change(folder, lambda m: m["context"].update(config=config))
            return "config"
    return ""


def _files(step: Path) -> dict[str, Any]:
    return {name: entry for name, entry in manifest.describe_files(step).items() if name != manifest.NAME}


def _change(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((folder / manifest.NAME).read_text())
    change(document)
    (folder / manifest.NAME).write_text(manifest.render(document))
