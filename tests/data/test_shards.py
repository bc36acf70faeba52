"""An array in shards: the same numbers as one array, verified at the first access, and an index that lies."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import UserError
from moe_jax.data import shards
from moe_jax.data.shards import Shard, ShardedArray, check_index, indexed

U2 = np.dtype("<u2")


def written(folder: Path, pieces: list[np.ndarray]) -> ShardedArray:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, piece in enumerate(pieces):
        path = folder / f"{number}.bin"
        path.write_bytes(piece.tobytes())
        found.append(Shard(path, len(piece), xxhash.xxh3_128_hexdigest(piece.tobytes())))
    return ShardedArray(found, U2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    numbers = iter(range(10**6))
    return lambda: tmp_path_factory.mktemp("arrays") / str(next(numbers))


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any), data=st.data())
def test_every_access_is_that_of_one_array(folders: Any, lengths: list[int], data: st.DataObject) -> None:
    """Also over empty shards, and with few maps at a time."""
    whole = np.arange(sum(lengths), dtype=U2) * 7
    array = written(folders(), np.split(whole, np.cumsum(lengths)[:-1]))
    n = len(whole)
    ends = st.none() | st.integers(-n - 2, n + 2)
    assert len(array) == n
    assert array.dtype == U2
    np.testing.assert_array_equal(np.asarray(array), whole)
    changed = np.array(array, np.int32)
    changed[:] = 0  # a copy
    part = slice(data.draw(ends), data.draw(ends), data.draw(st.sampled_from([None, 1, 2, -1])))
    np.testing.assert_array_equal(array[part], whole[part])
    assert array[part].dtype == U2
    index = np.array(data.draw(st.lists(st.integers(-n, n - 1), max_size=12)), np.int64)
    np.testing.assert_array_equal(array[index], whole[index])
    if len(index) % 2 == 0:
        np.testing.assert_array_equal(array[index.reshape(2, -1)], whole[index.reshape(2, -1)])
    mask = whole % 2 == 0
    np.testing.assert_array_equal(array[mask], whole[mask])
    assert array[n - 1] == whole[-1] == array[-1]


@pytest.mark.parametrize("index", [5, -6, [0, 5], [[-6]]])
def test_an_index_out_of_range_is_refused(tmp_path: Path, index: Any) -> None:
    array = written(tmp_path, [np.zeros(2, U2), np.ones(3, U2)])
    with pytest.raises(IndexError, match="the array has 5 entries"):
        array[index]


def test_few_files_are_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MOST_MAPS", 2)
    array = written(tmp_path, [np.full(2, i, U2) for i in range(9)])
    assert array[:].tolist() == [i for i in range(9) for _ in range(2)]
    assert array._map.cache_info().currsize == 2


def test_a_shard_is_read_when_it_is_asked_for_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    true = shards.digest_of
    monkeypatch.setattr(shards, "digest_of", lambda path: read.append(path.name) or true(path))
    array = written(tmp_path, [np.full(4, i, U2) for i in range(4)])
    assert read == []
    assert array[5:7].tolist() == [1, 1]
    assert array[np.array([4, 12, 7])].tolist() == [1, 3, 1]
    assert read == ["1.bin", "3.bin"]
    assert array[:].tolist() == [i for i in range(4) for _ in range(4)]
    assert read == ["1.bin", "3.bin", "0.bin", "2.bin"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_flipped_bit_is_found_at_the_first_access_to_its_shard(tmp_path: Path, number: int) -> None:
    array = written(tmp_path, [np.full(4, i, U2) for i in range(3)])
    path = tmp_path / f"{number}.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 16
    path.write_bytes(content)
    for other in {0, 1, 2} - {number}:
        assert array[4 * other] == other
    with pytest.raises(UserError) as error:
        array[4 * number + 1]
    assert str(error.value) == (
        f"{path}: damaged, its digest does not match; it was removed; start again: only this shard is prepared again"
    )
    assert not path.exists()
    with pytest.raises(UserError, match=f"^{path}: missing; start again: only this shard is prepared again$"):
        array[4 * number + 1]


def test_a_damaged_shard_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = written(tmp_path, [np.zeros(4, U2)])
    (tmp_path / "0.bin").write_bytes(bytes(7))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"damaged.*; remove it \(Permission denied: .*\) and start again: only"):
        array.verify(0)


def test_a_read_error_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = written(tmp_path, [np.zeros(4, U2)])

    def fail(_: Path) -> str:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "digest_of", fail)
        with pytest.raises(UserError, match=r"0\.bin: cannot be read \(Input/output error\); check the disk"):
            array[0]
    assert array[0] == 0


# The index


def entry(folder: Path, split: str, pieces: list[bytes]) -> dict[str, Any]:
    """The index of files that are written here, of two entries a byte string of 4 bytes."""
    found = []
    for number, piece in enumerate(pieces):
        (folder / f"{split}.{number:05d}.bin").write_bytes(piece)
        digest = xxhash.xxh3_128_hexdigest(piece)
        found.append({"tokens": len(piece) // 2, "stories": 1, "bytes": 3, "digest": digest})
    sums = {key: sum(one[key] for one in found) for key in ("tokens", "stories", "bytes")}
    return {**sums, "digest": xxhash.xxh3_128_hexdigest(b"".join(pieces)), "shards": found}


def test_an_index_names_its_files_in_order(tmp_path: Path) -> None:
    good = entry(tmp_path, "train", [b"abcd", b"ef", b"ghijkl"])
    assert indexed(tmp_path, "train", good, U2)[:].tobytes() == b"abcdefghijkl"
    (tmp_path / "valid.bin").write_bytes(b"xy")
    one = {"tokens": 1, "stories": 1, "bytes": 1, "digest": xxhash.xxh3_128_hexdigest(b"xy")}
    assert indexed(tmp_path, "valid", one, U2)[:].tobytes() == b"xy"


LIES: dict[str, tuple[Any, str]] = {
    "wrong length": (
        lambda e: e["shards"][1].update(tokens=2),
        "tokens of train is 3, must be 4, the sum over its shards",
    ),
    "wrong sum": (lambda e: e.update(bytes=7), "bytes of train is 7, must be 6"),
    "both": (lambda e: (e["shards"][1].update(tokens=2), e.update(tokens=4)), "has 2 bytes, not those of 2 entries"),
    "negative": (lambda e: e["shards"][0].update(tokens=-1), "tokens of train, shard 0 is -1, must be a number from 0"),
    "huge": (lambda e: e["shards"][0].update(tokens=10**30), "tokens of train, shard 0 is 10000"),
    "huge sum": (lambda e: e.update(stories=10**30), "stories of train is 1000"),
    "float": (lambda e: e["shards"][0].update(tokens=2.0), "tokens of train, shard 0 is 2.0"),
    "true": (lambda e: e["shards"][0].update(stories=True), "stories of train, shard 0 is True"),
    "text": (lambda e: e["shards"][0].update(bytes="3"), "bytes of train, shard 0 is 3"),
    "no count": (lambda e: e["shards"][0].pop("bytes"), "bytes of train, shard 0 is None"),
    "no digest": (lambda e: e["shards"][0].pop("digest"), "digest of train, shard 0 is None"),
    "short digest": (lambda e: e["shards"][0].update(digest="ab"), "digest of train, shard 0 is ab, must be 32 hex"),
    "null": (lambda e: e.update(shards=None), "shards of train is None, must be a list"),
    "no shards": (lambda e: e.update(shards=[]), r"shards of train is \[\], must be a list"),
    "an object": (lambda e: e.update(shards={"0": 1}), "shards of train is .*, must be a list"),
    "a shard that is none": (lambda e: e["shards"].append(3), "train, shard 2 is 3, must be an object"),
    "one more": (lambda e: e["shards"].append(dict(e["shards"][0])), "tokens of train is 3, must be 5"),
    "one less": (lambda e: e["shards"].pop(), "tokens of train is 3, must be 2"),
    "answers of one": (
        lambda e: e["shards"][0].update(answers={"tokens": 1, "bytes": 1, "digest": "0" * 32}),
        "answers of train, shard 0 is .*, must be there for all shards or none",
    ),
    "answers that are none": (lambda e: e.update(answers=[]), r"answers of train is \[\], must be an object"),
    "answers without count": (lambda e: e.update(answers={}), r"answers\.tokens of train is None"),
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_lies_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    lie, said = LIES[name]
    bad = copy.deepcopy(entry(tmp_path, "train", [b"abcd", b"ef"]))
    lie(bad)
    with pytest.raises(UserError, match=said) as error:
        indexed(tmp_path, "train", bad, U2)
    assert str(error.value).endswith("; prepare the data again")
    assert "\n" not in str(error.value)


def test_a_lie_is_found_without_the_files(tmp_path: Path) -> None:
    good = entry(tmp_path, "train", [b"abcd", b"ef"])
    check_index(tmp_path / "gone", "train", good)
    with pytest.raises(UserError, match="must be an object"):
        check_index(tmp_path, "train", "x")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    good = entry(tmp_path, "train", [b"abcd", b"ef"])
    (tmp_path / "train.00001.bin").unlink()
    with pytest.raises(UserError, match=rf"^{tmp_path}/train\.00001\.bin: missing; prepare the data again$"):
        indexed(tmp_path, "train", good, U2)


def test_shards_in_the_wrong_order_are_noticed(tmp_path: Path) -> None:
    good = entry(tmp_path, "train", [b"abcd", b"efgh"])
    good["shards"].reverse()
    with pytest.raises(UserError, match="damaged"):
        indexed(tmp_path, "train", good, U2)[0]
