"""What the pages speak of, made once: runs of a tiny model, and a text."""

from pathlib import Path

import pytest

from moe_jax.data.synthetic.talk import write_chats
from tests.interop.made import llama
from tests.support.saved_run import save_run


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/nano, runs/dense, hf/llama, book.txt and chats.jsonl."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "runs").mkdir()
    for name, changes in (("nano", {}), ("dense", {"dense": "active"})):
        made = tmp_path_factory.mktemp(name)
        save_run(made, **changes).rename(folder / "runs" / name)
    write_chats(folder / "chats.jsonl", 200)
    llama(folder / "hf" / "llama")
    (folder / "book.txt").write_text("A book of its own. It has two sentences, again and again. " * 100)
    return folder
