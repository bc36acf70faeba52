"""`--config FILE.toml`: it changes what the preset says, flags change it, and its errors name the file and the key."""

import json
from pathlib import Path

import pytest

from moe_jax.cli.settings import Settings
from moe_jax.cli.train import Train
from moe_jax.config import ConfigError
from moe_jax.config.presets import preset
from tests.cli.test_cli import make_held

FILE = """
preset = "seed-158m"
out = "elsewhere"

[model]
experts = 4
tied-head = true

[routing]
top_k = 1
capacity_factor = 2

[data]
source = "stories"

[train]
lr = 1e-3

[execution]
compute_dtype = "float32"
"""


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text(FILE)


def settings(*argv: str) -> Settings:
    return Train.parse(argv).settings


def test_a_file_changes_the_preset_that_it_names_and_flags_change_the_file() -> None:
    config, start = settings("--lr", "0.5", "--config", "my.toml", "--set", "model.tied_head=false")
    assert start.saved is None
    assert (config.preset, config.out, config.model.layers) == ("seed-158m", "elsewhere", 6)
    assert (config.model.experts, config.model.routing.top_k, config.model.routing.capacity_factor) == (4, 1, 2.0)
    assert type(config.model.routing.capacity_factor) is float
    assert (config.data.source, config.data.tokenizer) == ("stories", "gpt2")
    assert config.execution.compute_dtype == "float32"
    assert (config.train.lr, config.model.tied_head) == (0.5, False)


def test_a_preset_that_is_typed_is_where_settings_start_from() -> None:
    config, _ = settings("--config=my.toml", "--preset", "nano")
    assert (config.preset, config.model.layers, config.model.experts) == ("nano", preset("nano").model.layers, 4)


def test_values_need_to_fit_only_together(tmp_path: Path) -> None:
    """Twelve experts a token: more than nano has, and than the file has, but not more than is typed."""
    (tmp_path / "my.toml").write_text("[routing]\ntop_k = 12\n")
    config, _ = settings("--config", "my.toml", "--experts", "16")
    assert (config.model.experts, config.model.routing.top_k) == (16, 12)


def test_a_file_changes_a_resumed_run(tmp_path: Path) -> None:
    make_held(tmp_path)
    (tmp_path / "my.toml").write_text('out = "held"\nresume = true\n[train]\nsteps = 4000\n')
    config, start = settings("--config", "my.toml")
    assert start.saved is not None
    assert (config.train.steps, start.saved.train.steps) == (4000, preset("nano").train.steps)
    (tmp_path / "my.toml").write_text('out = "held"\nresume = true\n[model]\nexperts = 4\n')
    with pytest.raises(ConfigError, match=r"^my.toml: \[model\] experts = 4: the run in held has 8"):
        settings("--config", "my.toml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[model\n", "--config my.toml: must be a TOML file; "),
        ("[model]\nexperst = 4\n", "my.toml: [model] experst: no such setting; perhaps experts"),
        ("experts = 4\n", "my.toml: experts: no such setting; perhaps [model] experts was meant"),
        ("[model.routing]\ntop_k = 1\n", "my.toml: [model] routing: no such setting; perhaps [routing] was meant"),
        ("model = 3\n", "my.toml: model = 3: must be a table [model]"),
        ("preset = 'giant'\n", "my.toml: preset = 'giant': must be one of nano, "),
        ("[train]\nsteps = 'many'\n", "my.toml: [train] steps = 'many': is not a whole number"),
        ("[train]\nsteps = 0\n", "my.toml: [train] steps = 0: must be between 1 and"),
        ("out = 3\n", "my.toml: out = 3: is not a text in quotes"),
        ("[routing]\ntop_k = 9\n", "my.toml: [routing] top_k = 9: must be between 1 and --experts 8"),
        ("[model]\nexperts = 1\n", "my.toml: --top-k 2: must be between 1 and --experts 1"),
        ("[data]\nsource = 'no/such'\n", "my.toml: --data no/such: must be an existing file or folder"),
    ],
    ids=lambda x: x.strip()[:30],
)
def test_what_is_wrong_in_a_file(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        settings("--config", "my.toml")
    assert str(error.value).startswith(sentence)


def test_a_wrong_flag_is_not_blamed_on_the_file() -> None:
    with pytest.raises(ConfigError, match=r"^--top-k 5: must be between 1 and --experts 4"):
        settings("--config", "my.toml", "--top-k", "5")
    with pytest.raises(ConfigError, match=r"^--data no/such: must be"):
        settings("--config", "my.toml", "--data", "no/such")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"out = '\xe9'")
    for name in ("missing.toml", "latin.toml", "."):
        with pytest.raises(ConfigError, match=f"--config {name}: must be a TOML file"):
            settings("--config", name)


def test_a_configuration_is_a_settings_file_but_for_its_schema(tmp_path: Path) -> None:
    """Every field of every section can be set by a file: all of seed-158m, over nano."""
    values = preset("seed-158m").to_dict()
    del values["schema_version"]
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for section, fields in values.items():
        if isinstance(fields, dict):
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items())]
    (tmp_path / "my.toml").write_text("\n".join(lines))
    assert settings("--config", "my.toml").config == preset("seed-158m")


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "0x1" + "0" * 6000])
@pytest.mark.parametrize("name", ["lr", "steps"])
def test_a_number_of_more_than_64_bits_is_refused(name: str, number: str) -> None:
    """Python's integers have no limit. As a float it overflows, and one of 4300 digits cannot be printed."""
    Path("large.toml").write_text(f"[train]\n{name} = {number}\n")
    with pytest.raises(ConfigError, match=rf"^large.toml: \[train\] {name}: a whole number of more than 64 bits"):
        settings("--config", "large.toml")
