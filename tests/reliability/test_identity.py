"""A checkpoint, a tokenizer, a text and a folder belong to one run, and none is taken for that of another run."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_jax
from moe_jax.config import RunConfig, UserError, load_config
from moe_jax.data.streams import stored_documents
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.inspection.report import write_report
from moe_jax.interop.source import open_source
from moe_jax.runs import manifest
from moe_jax.runs.doctor import examine
from moe_jax.runs.folder import locked_for_training
from moe_jax.runs.load import open_run
from moe_jax.training import initial_weights
from moe_jax.training.session import Session
from moe_jax.training.start import new_start
from tests.reliability import states
from tests.support import saved_run
from tests.support.saved_run import resuming

pytestmark = pytest.mark.reliability


@pytest.fixture
def trained(
    whole: tuple[Path, dict[str, Any]], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, RunConfig]:
    """A copy of the run that nobody interrupted, and its configuration."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(cache))
    shutil.copytree(whole[0], tmp_path / "trained")
    config = load_config(tmp_path / "trained")
    assert config is not None
    return tmp_path / "trained", dataclasses.replace(config, out=str(tmp_path / "trained"))


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's manifest, with a right digest."""
    document = json.loads((folder / manifest.NAME).read_text())
    change(document)
    (folder / manifest.NAME).write_text(manifest.render(document))


def edit(run: Path, **changes: Any) -> None:
    document = json.loads((run / "config.json").read_text())
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (document[section] if section else document)[field] = value
    (run / "config.json").write_text(json.dumps(document))


# The tokenizer


def resume(run: Path) -> Session:
    saved = load_config(run)
    return Session.open(dataclasses.replace(saved, out=str(run)), resuming(saved))


OPENINGS: dict[str, Callable[[Path], Any]] = {
    "generate, evaluate, certify, chat, serve, merge, quantize": lambda run: open_run(run),
    "export": lambda run: open_source(run),
    "sft": lambda run: initial_weights.of_tuned_run(str(run)),
    "inspect": lambda run: write_report(run, run / "page.html", text="Once"),
    "load_run": lambda run: moe_jax.load_run(run),
    "--resume": lambda run: resume(run),
}


def another_tokenizer(run: Path) -> None:
    merges = [[ord("a"), ord(letter)] for letter in "bcd"]
    Tokenizer.from_dict(Tokenizer.from_dict(_sealed({"kind": "bpe", "merges": merges})).to_dict()).save(
        run / "tokenizer.json"
    )


def _sealed(definition: dict[str, Any]) -> dict[str, Any]:
    from moe_jax.data import tokenizers

    return definition | {"digest": tokenizers._digest(definition)}


@pytest.mark.parametrize("opening", OPENINGS)
def test_another_tokenizer_is_blamed_by_name(opening: str, run: Path) -> None:
    another_tokenizer(run)
    with pytest.raises(UserError, match=r"tokenizer\.json: is not the tokenizer that the run was") as caught:
        OPENINGS[opening](run)
    assert "\n" not in str(caught.value)
    assert "--data" not in str(caught.value)


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_tokenizer_with_more_entries_than_the_model_is_refused(opening: str, run: Path) -> None:
    """Its digest was made right everywhere."""
    another_tokenizer(run)
    digest = json.loads((run / "tokenizer.json").read_text())["digest"]
    for path in (run / "checkpoints").iterdir():
        reseal(path, lambda m: m["context"].update(tokenizer=digest))
    with pytest.raises(UserError, match=r"has 260 entries, and the model of the run knows 257"):
        OPENINGS[opening](run)


def test_another_tokenizer_of_a_dense_run_is_blamed(tmp_path: Path) -> None:
    dense = saved_run.save_run(tmp_path, dense="active")
    another_tokenizer(dense)
    config = load_config(dense)
    assert config is not None
    sparse = dataclasses.replace(
        config,
        upcycle=str(dense),
        model=dataclasses.replace(config.model, dense="none", expert_hidden=config.model.dense_hidden),
    )
    with pytest.raises(UserError, match="is not the tokenizer that the run was trained with"):
        new_start(sparse).weights(sparse)


# The validation text


def test_another_validation_text_is_said(saved: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """By `evaluate`, by `load_run(...).evaluate()`, and in the report."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    assert open_run(run).validation_text(progress=False).warning == ""
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"Another story, number {i}." for i in range(60)))
    edit(run, data__source=str(text))
    opened = open_run(run)
    found = opened.validation_text(progress=False)
    assert "has changed since the run was trained" in found.warning
    assert len(list(stored_documents(found.store.valid.tokens, opened.tokenizer))) > 0
    with pytest.warns(UserWarning, match="has changed since the run was trained"):
        moe_jax.load_run(run).evaluate()
    write_report(run, tmp_path / "page.html", text="Once")
    assert "has changed since the run was trained" in capsys.readouterr().err
    assert "has changed since the run was trained" in (tmp_path / "page.html").read_text()


# The run


def test_a_run_has_an_id_in_its_settings_its_checkpoints_and_its_lock(trained: tuple[Path, RunConfig]) -> None:
    run, config = trained
    run_id = json.loads((run / "config.json").read_text())["run_id"]
    assert len(run_id) == 16
    for path in (run / "checkpoints").glob("step_*"):
        assert manifest.read(path)["context"]["run_id"] == run_id
    with locked_for_training(run) as lock:
        session = Session.open(config, resuming(config), lock)
        assert (run / ".lock").read_text().splitlines()[1] == run_id
        assert session.run_id == run_id
    assert json.loads((run / "config.json").read_text())["run_id"] == run_id, "a resume keeps the id"


@pytest.mark.parametrize("place", ["newest", "oldest"])
def test_a_checkpoint_of_another_run_is_refused_by_name(place: str, trained: tuple[Path, RunConfig]) -> None:
    """A checkpoint of seed 7 in the folder of seed 0, as if it had been copied there."""
    run, config = trained
    steps = sorted((run / "checkpoints").glob("step_*"))
    foreign = steps[-1 if place == "newest" else 0]
    reseal(foreign, lambda m: m["context"].update(run_id="0123456789abcdef"))
    before = {p: p.read_bytes() for p in states.files(run)}
    with pytest.raises(UserError, match=f"{foreign.name}: was saved by another run") as caught:
        Session.open(config, resuming(config))
    assert "move it out of the folder" in str(caught.value)
    with pytest.raises(UserError, match="was saved by another run"):
        open_run(run, int(foreign.name[5:]))
    assert {f.what: f.state for f in examine(run, repair=True)}[foreign.name] == "foreign"
    assert {p: p.read_bytes() for p in states.files(run)} == before


def test_the_best_checkpoint_is_not_chosen_beside_one_of_another_run(trained: tuple[Path, RunConfig]) -> None:
    """The copied checkpoint has taken the place of the best one. Without a word the second best would be opened."""
    run, config = trained
    foreign = open_run(run).checkpoint.path
    for path in set((run / "checkpoints").iterdir()) - {foreign}:
        reseal(path, lambda m: m.update(val_loss=9.0))
    reseal(foreign, lambda m: (m["context"].update(run_id="0123456789abcdef"), m.update(val_loss=1e3)))
    with pytest.raises(UserError, match=f"{foreign.name}: was saved by another run"):
        open_run(run)
    model = dataclasses.replace(config.model, dense="active")
    edit(run, model__dense="active")
    started = dataclasses.replace(config, model=dataclasses.replace(model, dense="none"), upcycle=str(run))
    expert = dataclasses.replace(started.model, expert_hidden=model.dense_hidden)
    sparse = dataclasses.replace(started, model=expert)
    with pytest.raises(UserError, match=f"{foreign.name}: was saved by another run"):
        new_start(sparse).weights(sparse)


def test_a_run_of_an_earlier_version_has_no_id_and_gets_one(trained: tuple[Path, RunConfig]) -> None:
    run, config = trained
    for path in (run / "checkpoints").glob("step_*"):
        reseal(path, lambda m: m["context"].pop("run_id", None))
    document = json.loads((run / "config.json").read_text())
    document.pop("run_id", None)
    (run / "config.json").write_text(json.dumps(document))
    assert open_run(run).checkpoint is not None
    session = Session.open(config, resuming(config))
    assert json.loads((run / "config.json").read_text())["run_id"] == session.run_id != ""
    assert Session.open(config, resuming(config)).run_id == session.run_id


def test_an_id_that_was_lost_is_taken_from_the_checkpoints(trained: tuple[Path, RunConfig]) -> None:
    run, config = trained
    run_id = json.loads((run / "config.json").read_text())["run_id"]
    edit(run, run_id=None)
    assert Session.open(config, resuming(config)).run_id == run_id


# The folder


def test_a_folder_made_anew_is_not_touched(trained: tuple[Path, RunConfig], tmp_path: Path) -> None:
    """The first process goes on training while somebody removes the folder and trains there again."""
    run, config = trained
    with locked_for_training(run) as lock:
        session = Session.open(config, resuming(config), lock)
        run.rename(tmp_path / "away")
        shutil.copytree(tmp_path / "away", run)
        with locked_for_training(run):
            before = {p: p.read_bytes() for p in states.files(run)}
            for change in (
                lambda: session.save(14, None),
                lambda: session.folder.add_sample(14, "text"),
                lambda: session.folder.add_trace(14, {}),
                lambda: session.folder.write_summary({}),
                lambda: session.folder.truncate_logs_after(0, 0),
                lambda: session.checkpoints.mark_damaged(run / "checkpoints" / "step_00000012"),
                lambda: session.checkpoints.remove_interrupted_saves(),
                lambda: session.diagnose(14),
            ):
                (run / "checkpoints" / "tmp_1").mkdir(exist_ok=True)
                with pytest.raises(UserError, match="was removed or made anew while this process used it") as caught:
                    change()
                assert "\n" not in str(caught.value)
            assert {p: p.read_bytes() for p in states.files(run)} == before


def test_training_in_a_folder_that_is_gone_ends_with_one_line(trained: tuple[Path, RunConfig], tmp_path: Path) -> None:
    from moe_jax.training.loop import train

    run, config = trained
    with locked_for_training(run) as lock:
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=14))
        session = Session.open(longer, resuming(config), lock)
        batch = vars(session.data).setdefault("batch", session.data.batch)

        def remove(step: int) -> Any:
            if run.exists():
                run.rename(tmp_path / "away")
            return batch(step)

        saved_run.replace_batch(session, remove)
        with pytest.raises(UserError, match="was removed or made anew"):
            train(session)
    assert not run.exists()


# The settings


def test_an_edit_of_the_settings_by_hand_is_recorded(trained: tuple[Path, RunConfig]) -> None:
    """The history of resumes says what changed since the checkpoint, by a flag or by hand."""
    run, _ = trained
    edit(run, train__lr=0.001, train__steps=16, execution__remat=True)
    edited = load_config(run)
    assert edited is not None
    config = dataclasses.replace(edited, out=str(run), train=dataclasses.replace(edited.train, patience=3))
    session = Session.open(config, resuming(edited))
    (entry,) = json.loads((run / "config.json").read_text())["history"]
    assert entry["changed"] == {
        "train.steps": [12, 16],
        "train.lr": [0.005, 0.001],
        "train.patience": [0, 3],
        "execution.remat": [False, True],
    }
    assert "train.lr 0.005 -> 0.001" in session.notes[0]
