"""A run of an earlier version: commit d25d821 made it, with config schema 1 and manifests of version 2."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.config import ConfigError, RunConfig, UserError, load_config
from moe_jax.config.migrations import SCHEMA_VERSION, migrate_config
from moe_jax.data.synthetic import stories
from moe_jax.data.token_store import prepare_token_store
from moe_jax.runs import manifest
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.doctor import examine
from moe_jax.runs.migrations import KNOWN_VERSIONS, MANIFEST_VERSION, RULES_OF_VERSION_2, migrate_manifest
from moe_jax.training import upcycle
from moe_jax.training.loop import finish, train
from moe_jax.training.programs import Programs
from moe_jax.training.session import Session
from tests.support import saved_run

OLD = Path(__file__).resolve().parents[1] / "support" / "run_of_version_1"
"""Embedded stories, Muon, 6 steps, one checkpoint; 7,472 parameters."""


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with saved_run.quick_training(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the old run."""
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path / "run"


def old_config() -> dict[str, Any]:
    return json.loads((OLD / "config.json").read_text())


def edit(path: Path, section: str, **changes: Any) -> None:
    document = json.loads(path.read_text())
    document[section] |= changes
    path.write_text(json.dumps(document))


def manifest_of(run: Path) -> dict[str, Any]:
    """The newest manifest as it is written, not as it is read."""
    newest = max((run / "checkpoints").glob("step_*"))
    return json.loads((newest / manifest.NAME).read_text())


def test_the_fixture_is_of_the_old_versions() -> None:
    assert old_config()["schema_version"] == 1
    document = manifest_of(OLD)
    assert (document["version"], document["step"]) == (2, 6)
    assert document["context"]["config"]["schema_version"] == 1


# The whole run


def test_an_old_run_opens_scores_tells_and_traces(run: Path) -> None:
    """Its numbers are those that the old program wrote into summary.json."""
    opened, summary = moe_jax.load_run(run), json.loads((OLD / "summary.json").read_text())
    assert opened.checkpoint.step == 6
    assert (opened.config.model.tie_value_output_init, opened.config.execution.compute_dtype) == (True, "float32")
    scored = opened.evaluate()
    assert scored.loss == pytest.approx(summary["val_loss"], rel=1e-6)
    assert scored.bits_per_byte == pytest.approx(summary["val_bits_per_byte"], rel=1e-6)
    assert (scored.tokens, scored.drop_fraction) == (summary["val_tokens"], summary["val_drop_fraction"])
    told = opened.generate("Once", max_tokens=8)
    assert told.startswith("Once")
    assert len(told) > len("Once")
    trace = opened.trace("Once upon a time")
    assert trace.expert_index.shape == (1, len(trace.tokens), 2)
    assert trace.load().sum() == 2 * len(trace.tokens)


def test_an_old_run_is_resumed_and_becomes_a_new_one(run: Path) -> None:
    saved = load_config(run)
    assert saved is not None
    saved = dataclasses.replace(saved, out=str(run))
    session = Session.open(dataclasses.replace(saved, train=dataclasses.replace(saved.train, steps=8)), saved)
    assert (session.progress.resumed_from, session.notes) == (6, ["resumed at step 6: train.steps 6 -> 8"])
    train(session)
    assert finish(session)["steps"] == 8
    document = json.loads((run / "config.json").read_text())
    assert document["schema_version"] == SCHEMA_VERSION == 3
    assert RunConfig.from_dict(document) == session.config
    assert [entry["resumed_at_step"] for entry in document["history"]] == [6]
    written = manifest_of(run)
    assert (written["version"], written["step"], written["context"]["config"]["schema_version"]) == (3, 8, 3)
    assert written["version"] == MANIFEST_VERSION
    assert [c.step for c in CheckpointStore(run).list()] == [6, 8]
    # From here on it is resumed as any run: by the digest of its tokens.
    again = Session.open(session.config, load_config(run))
    assert again.progress.resumed_from == 8


def test_the_first_steps_after_the_resume_are_logged_behind_the_old_ones(run: Path) -> None:
    saved = load_config(run)
    assert saved is not None
    saved = dataclasses.replace(saved, out=str(run))
    train(Session.open(dataclasses.replace(saved, train=dataclasses.replace(saved.train, steps=7)), saved))
    old = (OLD / "metrics.jsonl").read_text().splitlines()
    new = (run / "metrics.jsonl").read_text().splitlines()
    assert new[: len(old)] == old
    assert [(r["step"], r["split"]) for r in map(json.loads, new[len(old) :])] == [(7, "train"), (7, "val")]


def test_another_seed_of_the_stories_is_another_text(run: Path) -> None:
    edit(run / "config.json", "data", stories_seed=1)
    edited = load_config(run)
    assert edited is not None
    with pytest.raises(UserError, match=r"^--data stories: not the text that the run in .* was trained on"):
        Session.open(dataclasses.replace(edited, out=str(run)), edited)
    assert json.loads((run / "config.json").read_text())["schema_version"] == 1, "a refused resume changed the run"


def test_an_old_dense_run_is_known_to_be_of_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upcycled run takes parameters from its dense run only where the text is the same."""
    config, checkpoint = load_config(OLD), CheckpointStore(OLD).newest()
    assert config is not None
    assert checkpoint is not None
    monkeypatch.setattr(upcycle, "copy_dense_params", lambda fresh, dense: dense)
    store = prepare_token_store(config.data, progress=False)
    source = upcycle.UpcycleSource("", config, checkpoint, store.tokenizer)
    programs = Programs.of(config)
    assert jax.tree.structure(source.params(programs, store)) == jax.tree.structure(programs.param_shapes)
    other = prepare_token_store(dataclasses.replace(config.data, stories_seed=1), progress=False)
    with pytest.raises(UserError, match="not the text"):
        source.params(programs, other)


# Its manifest


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"val_loss": 5.98757994408701', '"val_loss": 5.98757994408702'),
        ('"stories_seed": 0', '"stories_seed": 1'),
        ('"version": 2', '"version": 3'),
        ('"digest": "5', '"digest": "6'),
    ],
    ids=["loss", "context", "version", "digest"],
)
def test_an_old_manifest_that_was_changed_is_refused(before: str, after: str, run: Path) -> None:
    path = run / "checkpoints" / "step_00000006" / manifest.NAME
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    said: list[str] = []
    assert CheckpointStore(run, say=said.append).newest() is None
    assert [line.rpartition(": ")[2] for line in said] == ["skipped, its manifest was changed"]
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        moe_jax.load_run(run)


@pytest.mark.parametrize("version", [1, 4])
def test_a_manifest_of_an_unknown_version_is_refused(version: int, run: Path) -> None:
    """With a right digest, as the program of that version would have written it."""
    path = run / "checkpoints" / "step_00000006" / manifest.NAME
    path.write_text(manifest.render(json.loads(path.read_text()) | {"version": version}))
    with pytest.raises(manifest.CheckpointCorrupted, match=f"of version {version}, this program reads 2 and 3"):
        manifest.read(path.parent)


def reseal(run: Path, **context: Any) -> Path:
    """Change the context of the old manifest, which then has a right digest again. Returns its folder."""
    path = run / "checkpoints" / "step_00000006" / manifest.NAME
    document = json.loads(path.read_text())
    document["context"] |= context
    path.write_text(manifest.render(document))
    return path.parent


@pytest.mark.parametrize(
    "config",
    [None, [], "text", {}, {"schema_version": 7}, {"schema_version": [1]}]
    + [{"schema_version": 1, "model": odd} for odd in ("text", 3, [1], {"dispatch": "scatter"}, {"dispatch": []})]
    + [{"schema_version": 1, "data": odd} for odd in ("text", 3, [1], {"source": "stories", "stories_seed": [[]]})],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_left_to_its_reader(config: Any, run: Path) -> None:
    """With a right digest: reading the manifest neither fails nor makes something up, and a resume looks on."""
    folder = reseal(run, config=config)
    found = manifest.read(folder)
    assert found["version"] == 3
    assert found["context"]["config"] == (config if not _migrates(config) else migrate_config(config))
    saved = load_config(run)
    assert saved is not None
    with pytest.raises(UserError, match=r"every checkpoint is damaged|not the text|was saved with"):
        Session.open(dataclasses.replace(saved, out=str(run)), saved)


def _migrates(config: Any) -> bool:
    return isinstance(config, dict) and config.get("schema_version") == 1 and "model" not in config


# Its configuration


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_n_grams_are_refused(run: Path) -> None:
    edit(run / "config.json", "model", ngrams=2)
    with pytest.raises(UserError, match=r"model\.ngrams is not 1.*use moe-jax 0\.1\.0") as caught:
        moe_jax.load_run(run)
    one_line(caught.value)


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_an_unknown_schema_is_refused(version: Any, run: Path) -> None:
    document = old_config() | {"schema_version": version}
    (run / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"schema version {version}, this program reads 1 to 3") as caught:
        load_config(run)
    one_line(caught.value)


def test_an_unknown_dispatch_and_an_unknown_field_are_refused(run: Path) -> None:
    edit(run / "config.json", "model", dispatch="scatter")
    with pytest.raises(UserError, match=r"model\.dispatch 'scatter' is not known"):
        load_config(run)
    edit(run / "config.json", "model", dispatch="gather", wings=2)
    with pytest.raises(UserError, match="model has the unknown field 'wings'"):
        load_config(run)
    edit(run / "config.json", "train", clip=-1)
    edit(run / "config.json", "model", dispatch="gather")
    document = json.loads((run / "config.json").read_text())
    del document["model"]["wings"]
    (run / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"--train\.max-grad-norm -1"):
        load_config(run)


# Its doctor


def test_the_doctor_calls_an_old_run_good_and_leaves_it_alone(run: Path) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert {f.what: f.state for f in examine(run, repair=True)} == dict.fromkeys(
        ("step_00000006", "config.json", "tokenizer.json", "metrics.jsonl"), "good"
    )
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_the_doctor_repairs_no_configuration_with_one_that_cannot_be_read(run: Path) -> None:
    """A run with n-gram tables: its checkpoint holds the same configuration as its config.json."""
    edit(run / "config.json", "model", ngrams=2)
    reseal(run, config=old_config() | {"model": old_config()["model"] | {"ngrams": 2}})
    before = (run / "config.json").read_bytes()
    for repair in (False, True):
        (found,) = [f for f in examine(run, repair=repair) if f.what == "config.json"]
        assert found.state == "damaged"
        assert "use moe-jax 0.1.0" in found.detail
        assert "--repair" not in found.detail
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_the_doctor_writes_a_present_configuration_from_an_old_checkpoint(harm: str, run: Path) -> None:
    expected = load_config(run)
    path = run / "config.json"
    path.unlink() if harm == "gone" else path.write_text('{"schema_version": 1, "mod')
    assert {f.what: f.state for f in examine(run, repair=True)}["config.json"] == "repaired"
    document = json.loads(path.read_text())
    assert document["schema_version"] == SCHEMA_VERSION
    assert load_config(run) == expected
    np.testing.assert_array_equal(moe_jax.load_run(run).logits("a"), moe_jax.load_run(OLD).logits("a"))


# Manifests, without a run


def version_2(**data: Any) -> dict[str, Any]:
    config = {"schema_version": 1, "data": {"source": "stories", "stories_seed": 3, "stories": 70} | data}
    return {"version": 2, "step": 1, "context": {"data": "old", "run": "kept", "config": config}}


def test_the_stories_of_version_2_are_known_by_their_fingerprint() -> None:
    old = version_2()
    given = copy.deepcopy(old)
    new = migrate_manifest(old)
    assert old == given, "what was given was changed"
    assert (new["version"], new["step"], new["context"]["run"]) == (3, 1, "kept")
    assert new["context"]["data"] == f"fingerprint:{stories.fingerprint(3, 70, RULES_OF_VERSION_2)}"
    assert new["context"]["config"] == migrate_config(given["context"]["config"])
    assert migrate_manifest(new) == new


def test_numbers_that_version_2_did_not_write_count_as_0() -> None:
    old = version_2()
    old["context"]["config"]["data"] = {"source": "stories"}
    expected = f"fingerprint:{stories.fingerprint(0, 0, RULES_OF_VERSION_2)}"
    assert migrate_manifest(old)["context"]["data"] == expected


def test_other_texts_keep_the_digest_of_their_tokens() -> None:
    assert migrate_manifest(version_2(source="book.txt"))["context"]["data"] == "old"
    for config in (None, 7, {}, {"data": 7}, {"data": {}}):
        old = {"version": 2, "context": {"data": "old", "config": config}}
        assert migrate_manifest(old)["context"] == {"data": "old", "config": config}
    assert migrate_manifest({"version": 3, "context": {}})["context"] == {}


@pytest.mark.parametrize(
    "config",
    [
        None,
        7,
        [],
        {"schema_version": 9},
        {"schema_version": 1, "model": 7},
        {"schema_version": 1, "model": {"ngrams": 2}},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_converted_stays(config: Any) -> None:
    context = {"config": config, "other": 1}
    assert migrate_manifest({"version": 3, "context": context})["context"] == context


def test_which_versions_are_known() -> None:
    assert (MANIFEST_VERSION, tuple(KNOWN_VERSIONS)) == (3, (2, 3))
