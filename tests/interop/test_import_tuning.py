"""An imported model is fine-tuned: `sft --init-from`, with all weights and with adapters."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_jax.interop.export import export
from moe_jax.interop.pretrained import Pretrained
from moe_jax.interop.source import open_source
from moe_jax.model.costs import adapter_parameters
from moe_jax.runs.load import open_run
from moe_jax.training.run import finish, take_steps
from moe_jax.training.session import Session
from moe_jax.training.start import IMPORTED_LR
from tests.interop.made import llama
from tests.support import saved_run, tiny, tuning
from tests.support.commands import sft_settings

pytestmark = pytest.mark.runs

SEPARATOR = "</s>"


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with saved_run.quick_training(tmp_path_factory.mktemp("cache"), samples=False):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats.jsonl and with the model `hf`, whose tokenizer ends a text with `</s>`."""
    folder = tmp_path_factory.mktemp("place")
    llama(folder / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / "hf" / name
        path.write_text(path.read_text().replace("<|endoftext|>", SEPARATOR))
    tuning.write_conversations(folder / "chats.jsonl")
    return folder


@functools.cache
def tune(place: Path, *flags: str) -> tuple[Session, dict[str, Any]]:
    """A session after its last step, and its result. Trained once for each choice of flags."""
    out = place / "-".join(["run", *flags])
    argv = ["--init-from", str(place / "hf"), "--data", str(place / "chats.jsonl"), "--out", str(out)]
    argv += ["--steps", "4", "--batch-size", "2", "--seq-len", "32", "--eval-every", "2", "--save-every", "2"]
    argv += ["--precision", "float32"]  # four small steps change the loss by less than bfloat16 rounds it
    session = Session.open(*sft_settings(*argv, *flags))
    take_steps(session)
    return session, finish(session)


@pytest.mark.parametrize("flags", [pytest.param((), marks=pytest.mark.slow), ("--lora", "2")], ids=["whole", "lora"])
def test_an_imported_model_is_tuned_and_exported(flags: tuple[str, ...], place: Path, tmp_path: Path) -> None:
    """It starts with the imported weights, which adapters leave as they are; and its export has a template that ends
    turns as its tokenizer does."""
    session, result = tune(place, *flags)
    imported, _ = Pretrained.open(place / "hf", "--init-from").params(session.programs.param_shapes, None)
    start = session.score(session.data.store.valid.stream, imported)
    assert result["inherited_flops"] is None
    assert result["val_loss"] < start.loss
    assert (session.config.train.lr, session.config.train.optimizer) == (IMPORTED_LR, "adamw")
    if flags:
        tiny.assert_same_bits(session.state.params, imported)
        assert result["params_trained"] == adapter_parameters(session.config).total
    assert open_run(session.folder.path).tokenizer.digest == session.data.store.tokenizer.digest
    export(open_source(session.folder.path), "hf", "float32", tmp_path / "out", "export")
    template = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
    assert template.count(f"'{SEPARATOR}'") == 3
    assert "<|endoftext|>" not in template
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (place / "hf" / "tokenizer.json").read_bytes()


def test_the_template_gives_our_ids(place: Path, tmp_path: Path) -> None:
    """In transformers, whose text for the template is cut into tokens by the imported tokenizer."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: uv run --extra peers")
    from moe_jax.data.chats import answer_prompt
    from moe_jax.data.documents import Message

    session, _ = tune(place)
    export(open_source(session.folder.path), "hf", "float32", tmp_path / "out", "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": f"Who ate {SEPARATOR}the cake?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    harmless = Message("user", "Who ate </ s>the cake?")
    assert ids == answer_prompt(session.data.store.tokenizer, [harmless])
