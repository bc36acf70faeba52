"""The command line: what is wrong is said in one line, with status 2, before jax is imported and nothing is written.

Each command line runs in a process of its own, as a person would type it, with an import of jax made to fail.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.cli.settings import Settings
from moe_jax.cli.train import Train
from moe_jax.config import SECTIONS, ConfigError
from moe_jax.config.flags import SHORT_FLAGS
from moe_jax.config.presets import preset

ROOT = Path(__file__).resolve().parents[2]

# (arguments of train.py, what the line must name)
BAD_TRAIN = [
    (["--top-k", "9"], ["--top-k", "9", "8"]),
    (["--top-k", "0"], ["--top-k", "0"]),
    (["--top-k=-1"], ["--top-k", "-1"]),
    (["--experts", "1"], ["--top-k", "2", "--experts 1"]),
    (["--experts", "0"], ["--experts", "0"]),
    (["--experts", "2.5"], ["--experts", "2.5"]),
    (["--experts"], ["--experts"]),
    (["--model.heads", "3"], ["--model.heads", "3", "128"]),
    (["--model.heads", "0"], ["--model.heads", "0"]),
    (["--model.width", "100", "--model.heads", "20"], ["--model.heads", "20", "RoPE"]),
    (["--model.width", "-8"], ["--model.width", "-8"]),
    (["--steps", "-5"], ["--steps", "-5"]),
    (["--steps", "0"], ["--steps", "0"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--capacity-factor", "0"], ["--capacity-factor", "0"]),
    (["--capacity-factor", "inf"], ["--capacity-factor", "inf"]),
    (["--capacity-factor", "nan"], ["--capacity-factor", "nan"]),
    (["--capacity-factor=-1.25"], ["--capacity-factor", "-1.25"]),
    (["--model.dropout", "1"], ["--model.dropout", "1"]),
    (["--model.dense", "half"], ["--model.dense", "half", "active", "total"]),
    (["--model.norm", "batchnorm"], ["--model.norm", "batchnorm", "rmsnorm"]),
    (["--model.layers", "0"], ["--model.layers", "0"]),
    (["--dispatch", "scatter"], ["--dispatch", "scatter", "capacity", "blocks"]),
    (["--seq-len", "1"], ["--seq-len", "1"]),
    (["--batch-size", "0"], ["--batch-size", "0"]),
    (["--grad-accum", "-2"], ["--grad-accum", "-2"]),
    (["--lr", "0"], ["--lr", "0"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--lr", "inf"], ["--lr", "inf"]),
    (["--train.beta2", "1"], ["--train.beta2", "1"]),
    (["--optimizer", "sgd"], ["--optimizer", "sgd", "adamw"]),
    (["--precision", "float8"], ["--precision", "float8", "bfloat16"]),
    (["--seed", "-1"], ["--seed", "-1"]),
    (["--eval-every", "0"], ["--eval-every", "0"]),
    (["--save-every", "x"], ["--save-every", "x"]),
    (["--tokenizer", "wordpiece"], ["--tokenizer", "wordpiece", "bpe"]),
    (["--data.vocab-size", "10"], ["--data.vocab-size", "10"]),
    (["--data.eval-tokens", "65537"], ["--data.eval-tokens", "65537"]),
    (["--preset", "giant"], ["--preset", "giant", "nano"]),
    (["--data", "no/such/path"], ["--data", "no/such/path", "tinystories"]),
    (["--data", ""], ["--data"]),
    (["--experst", "4"], ["--experst", "--experts"]),
    (["stray"], ["stray"]),
    (["--resume", "maybe"], ["--resume maybe", "takes no value"]),
    (["--resume=yes"], ["--resume yes", "takes no value"]),
    (["--no-model.bais"], ["--no-model.bais", "perhaps --no-model.bias"]),
    (["--lr", "-1e-3"], ["--lr -0.001"]),
    (["--lr", "fast"], ["--lr fast", "is not a number"]),
    (["--steps", "--lr", "1"], ["--steps", "needs a value"]),
    (["--model.top-k", "2"], ["--model.top-k", "is called --top-k now"]),
    (["--config", "no.toml"], ["--config no.toml", "TOML", "No such file"]),
    (["--verify-resume"], ["--verify-resume", "no such flag"]),
    (["--model.qk-norm"], ["--model.qk-norm", "no switch any more", "type --model.qk-norm head"]),
    (["--model.qk-norm", "--steps", "3"], ["--model.qk-norm", "type --model.qk-norm head"]),
    (["--model.no-qk-norm"], ["--model.no-qk-norm", "type --model.qk-norm none"]),
    (["--no-model.qk-norm"], ["--no-model.qk-norm", "type --model.qk-norm none"]),
    (["--model.qk-norm", "both"], ["--model.qk-norm both", "one of none, head, full"]),
    (["--model.kv-heads", "2"], ["--model.kv-heads 2", "--model.no-tie-value-output-init"]),
    (["--model.head-size", "16"], ["--model.head-size 16", "--model.no-tie-value-output-init"]),
    (["--mesh", "tensor=2"], ["--mesh tensor=2", "data, fsdp and expert"]),
    (["--mesh", "data=3"], ["--mesh data=3", "3 devices; --batch-size 8 is not a multiple of 3"]),
    (["--train.clip", "2"], ["--train.clip", "is called --train.max-grad-norm now"]),
    (["--train.remat"], ["--train.remat", "is called --execution.remat now"]),
    (["--upcycle", "no/such/run"], ["--upcycle no/such/run", "--model.dense active"]),
]

# (arguments of python -m moe_jax, what the line must name)
BAD_COMMANDS = [
    (["paint"], ["paint", "generate"]),
    ([], ["COMMAND", "train", "completion"]),
    (["--run"], ["--run", "command"]),
    (["train", "--steps", "0"], ["--steps 0"]),
    (["verify-resume", "--steps", "0"], ["--steps 0"]),
    (["verify-resume", "--dry-run"], ["--dry-run"]),
    (["completion"], ["SHELL", "bash", "zsh", "tcsh"]),
    (["completion", "fish"], ["SHELL fish", "bash"]),
    (["plan", "--gpu", "abacus"], ["--gpu abacus", "rtx3050-4gb"]),
    (["plan", "--gpu", "/bin/ls"], ["--gpu /bin/ls", "does not describe a GPU"]),
    (["plan", "--gpu", "held/config.json"], ["--gpu held/config.json", "does not describe a GPU"]),
    (["generate", "--run", "held", "--step", "0.5"], ["--step 0.5", "is not a whole number"]),
    (["generate"], ["--run", "must be given"]),
    (["generate", "--run", "no/such/run"], ["--run", "no/such/run"]),
    (["generate", "--run", "held", "--temperature", "-1"], ["--temperature", "-1"]),
    (["generate", "--run", "held", "--top-p", "0"], ["--top-p", "0"]),
    (["generate", "--run", "held", "--num-stories", "0"], ["--num-stories", "0"]),
    (["evaluate", "--run", "held", "--data", "no/such/text"], ["--data", "no/such/text"]),
    (["inspect", "--run", "no/such/run"], ["--run", "no/such/run"]),
    (["inspect", "--run", "held", "--file", "no/such/text"], ["--file", "no/such/text"]),
    (["inspect", "--run", "held", "--file", "held"], ["--file", "held"]),
    (["inspect", "--run", "held", "--file", "a", "--text", "b"], ["--file", "--text"]),
    (["inspect", "--run", "held", "--out", "held"], ["--out", "held"]),
    (["plot", "--run", "held", "--run", "no/such/run"], ["--run", "no/such/run"]),
    (["certify", "--run", "no/such/run"], ["--run", "no/such/run"]),
    (["certify", "--preset", "giant"], ["--preset", "giant"]),
    (["certify", "--batch-size", "0"], ["--batch-size", "0"]),
    (["certify", "--mesh", "data=0"], ["--mesh data=0", "data=2,expert=4"]),
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that trains refuses a folder of the present one that holds a run."""
    monkeypatch.chdir(tmp_path)


def run_without_jax(folder: Path, program: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program in `folder`, where importing jax raises."""
    (folder / "poison").mkdir(exist_ok=True)
    (folder / "poison" / "jax.py").write_text("raise SystemExit('jax was imported')\n")
    absent = "import sys\nsys.modules |= dict.fromkeys(['tensorboardX', 'wandb'])\n"  # where an extra installed them
    (folder / "poison" / "sitecustomize.py").write_text(absent)
    paths = [str(folder / "poison"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MOE_JAX_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def make_held(folder: Path, routing: dict[str, object] | None = None, **model_changes: object) -> None:
    """A folder that holds a run, as far as its names go."""
    (folder / "held" / "checkpoints" / "step_00000010").mkdir(parents=True)
    values = preset("nano").to_dict()
    values["model"] |= model_changes
    values["routing"] |= routing or {}
    (folder / "held" / "config.json").write_text(json.dumps(values))


def _settings(argv: list[str]) -> Settings:
    return Train.parse(argv).settings


def assert_refused(result: subprocess.CompletedProcess[str], names: list[str]) -> None:
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for name in names:
        assert name in lines[0]


@pytest.mark.parametrize(("arguments", "names"), BAD_TRAIN, ids=lambda x: " ".join(x)[:40])
def test_bad_training_arguments(tmp_path: Path, arguments: list[str], names: list[str]) -> None:
    assert_refused(run_without_jax(tmp_path, [str(ROOT / "train.py"), *arguments]), names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["poison"]


@pytest.mark.parametrize(("arguments", "names"), BAD_COMMANDS, ids=lambda x: " ".join(x)[:40])
def test_bad_commands(tmp_path: Path, arguments: list[str], names: list[str]) -> None:
    make_held(tmp_path)
    assert_refused(run_without_jax(tmp_path, ["-m", "moe_jax", *arguments]), names)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [(["paint"], ["paint"]), (["moe", "--rounds", "0"], ["--rounds", "0"]), (["--preset", "giant"], ["giant"])],
)
def test_bad_benchmarks(tmp_path: Path, arguments: list[str], names: list[str]) -> None:
    assert_refused(run_without_jax(tmp_path, [str(ROOT / "benchmark.py"), *arguments]), names)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["--out held", "already holds a run", "--resume"]),
        (["--resume", "--experts", "4"], ["--experts 4", "8"]),
        (["--resume", "--tokenizer", "byte"], ["--tokenizer byte", "bpe"]),
        (["--resume", "--optimizer", "adamw"], ["--optimizer adamw", "muon"]),
        (["--resume", "--preset", "story"], ["--preset story", "nano"]),
        (["--resume", "--steps", "-1"], ["--steps", "-1"]),
        (["--resume", "--tensorboard"], ["--tensorboard", "uv run --extra tensorboard", "--no-tensorboard"]),
        (["--resume", "--wandb"], ["--wandb", "uv run --extra wandb", "--no-wandb"]),
    ],
)
def test_a_folder_that_holds_a_run(tmp_path: Path, arguments: list[str], names: list[str]) -> None:
    make_held(tmp_path)
    before = (tmp_path / "held" / "config.json").read_bytes()
    result = run_without_jax(tmp_path, [str(ROOT / "train.py"), "--out", "held", *arguments])
    assert_refused(result, names)
    assert (tmp_path / "held" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model.expert-hidden", "128"], ["--model.expert-hidden 128", "259"]),
        (["--top-k", "1"], ["--top-k 1", "at least 2"]),
        (["--top-k", "8"], ["--top-k 8", "below --experts 8"]),
        (["--model.shared-experts", "1"], ["--model.shared-experts 1", "must be 0"]),
        (["--routing.no-renormalise-gates"], ["--routing.renormalise-gates False", "the gates sum to 1"]),
        (["--model.norm-eps", "1e-5"], ["--model.norm-eps 1e-05", "has 0.0"]),
        (["--model.dense", "total"], ["--model.dense total", "--upcycle"]),
        (["--model.heads", "8"], ["--model.heads 8", "has 4"]),
        (["--model.activation", "gelu"], ["--model.activation gelu", "has swiglu"]),
        (["--seq-len", "128"], ["--seq-len 128", "has 256"]),
        (["--tokenizer", "byte"], ["--tokenizer byte", "has bpe"]),
        (["--preset", "story"], ["--preset story", "has nano"]),
        (["--upcycle", "sparse"], ["--upcycle sparse", "has experts already"]),
    ],
)
def test_what_a_dense_run_cannot_be_upcycled_to(tmp_path: Path, arguments: list[str], names: list[str]) -> None:
    """The hidden width of nano's dense baseline: 2 x 128 + 8 / 3, rounded."""
    make_held(tmp_path)
    (tmp_path / "held").rename(tmp_path / "sparse")
    make_held(tmp_path, dense="active")
    result = run_without_jax(tmp_path, [str(ROOT / "train.py"), "--upcycle", "held", *arguments])
    assert_refused(result, names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held", "poison", "sparse"]


def test_an_upcycled_run_starts_from_the_dense_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts as wide as the dense FFN; what is typed differs; once it is there, it is resumed as any run."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path, dense="active", layers=2)
    config, saved = _settings(["--upcycle", "held", "--experts", "4", "--lr", "1e-4"])
    assert saved is None
    assert (config.model.dense, config.model.layers, config.model.expert_hidden) == ("none", 2, 259)
    assert (config.model.experts, config.train.lr, config.run_dir) == (4, 1e-4, "runs/nano-upcycled")
    (tmp_path / "runs").mkdir()
    shutil.copytree(tmp_path / "held", tmp_path / config.run_dir)
    (tmp_path / config.run_dir / "config.json").write_text(json.dumps(config.to_dict()))
    placed = dataclasses.replace(config, out=config.run_dir)
    assert _settings(["--upcycle", "held", "--resume"]) == (dataclasses.replace(placed, resume=True), placed)
    shutil.copytree(tmp_path / "held", tmp_path / "other")
    with pytest.raises(ConfigError, match="--upcycle other: the run in runs/nano-upcycled has held"):
        _settings(["--out", "runs/nano-upcycled", "--resume", "--upcycle", "other"])


def test_a_file_in_place_of_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    result = run_without_jax(tmp_path, [str(ROOT / "train.py"), "--out", "taken"])
    assert_refused(result, ["--out taken", "file"])


def test_help_names_every_field(tmp_path: Path) -> None:
    result = run_without_jax(tmp_path, [str(ROOT / "train.py"), "--help"])
    assert result.returncode == 0
    for section in SECTIONS:
        for name in vars(preset("nano").section(section)).keys() - {"routing"}:
            assert f"--{section}.{name.replace('_', '-')}" in result.stdout
    for short in SHORT_FLAGS:
        assert short in result.stdout


def test_short_names() -> None:
    """Each short name sets the field that its long name sets, in both spellings."""
    for short, long in SHORT_FLAGS.items():
        if "lora" in long or "router" in long:  # need a run to tune: tests/training/test_sft.py
            continue
        value = {"--data": "stories", "--tokenizer": "byte", "--optimizer": "adamw"}.get(short)
        value = value or {"--precision": "float32", "--dispatch": "blocks", "--mesh": "data=2"}.get(short, "2")
        if short == "--deterministic":
            assert _settings([short]) == _settings([long]) != _settings([])
            assert _settings(["--no-deterministic"]) == _settings(["--execution.no-deterministic"]) == _settings([])
        else:
            asked = [[short, value], [f"{short}={value}"], [long, value], [f"{long}={value}"]]
            assert len({repr(_settings(argv)) for argv in asked}) == 1
    config, saved = _settings(["--steps", "7", "--top-k=1", "--out", "nowhere"])
    assert (config.train.steps, config.model.routing.top_k, config.out, saved) == (7, 1, "nowhere", None)


def test_presets_are_where_settings_start_from() -> None:
    config, _ = _settings(["--preset", "seed-158m", "--lr", "1e-3", "--data", "stories"])
    assert config.model == preset("seed-158m").model
    assert config.train.lr == 1e-3
    assert config.train.beta2 == preset("seed-158m").train.beta2


def test_a_resumed_run_starts_from_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is typed differs from the saved configuration; an error in it still exits as a flag would."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path)
    values = preset("nano").to_dict()
    values["model"]["experts"] = 4
    values["train"]["lr"] = 0.5
    (tmp_path / "held" / "config.json").write_text(json.dumps(values))
    config, saved = _settings(["--out", "held", "--resume", "--steps", "4000"])
    assert saved is not None
    assert (config.model.experts, config.train.lr, config.train.steps) == (4, 0.5, 4000)
    assert saved.train.steps == preset("nano").train.steps
    with pytest.raises(ConfigError, match="--experts 8: the run in held has 4"):
        _settings(["--out", "held", "--resume", "--experts", "8"])


def test_flags_of_a_resumed_run_need_not_fit_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve of 16 experts; nano has 8. What does not fit the run itself is refused by the run's numbers."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path, {"top_k": 12}, experts=16)
    config, _ = _settings(["--out", "held", "--resume", "--top-k", "12"])
    assert (config.model.experts, config.model.routing.top_k) == (16, 12)
    with pytest.raises(ConfigError, match="--top-k 17: must be between 1 and --experts 16"):
        _settings(["--out", "held", "--resume", "--top-k", "17"])


def test_flags_of_an_upcycled_run_need_not_fit_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a dense run whose mixture would have 16 experts; and resumed, with more than the dense run says."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path, dense="active", experts=16)
    config, _ = _settings(["--upcycle", "held", "--top-k", "12"])
    assert (config.model.experts, config.model.routing.top_k) == (16, 12)
    config, _ = _settings(["--upcycle", "held", "--experts", "32", "--top-k", "20"])
    (tmp_path / "held").rename(tmp_path / "dense")
    make_held(tmp_path)
    values = dataclasses.replace(config, upcycle="dense").to_dict()
    (tmp_path / "held" / "config.json").write_text(json.dumps(values))
    config, _ = _settings(["--upcycle", "dense", "--out", "held", "--resume", "--top-k", "20"])
    assert (config.model.experts, config.model.routing.top_k) == (32, 20)


def test_a_copied_folder_is_resumed_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config.json names the folder that it was copied from."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path)
    values = preset("nano").to_dict() | {"out": "held"}
    (tmp_path / "held" / "config.json").write_text(json.dumps(values))
    shutil.copytree(tmp_path / "held", tmp_path / "copy")
    config, saved = _settings(["--out", "copy", "--resume"])
    assert saved is not None
    assert (config.run_dir, saved.run_dir) == ("copy", "copy")


def test_of_a_flag_given_twice_the_last_counts() -> None:
    config, _ = _settings(["--preset", "seed-158m", "--preset=story-cpu", "--data", "stories", "--out", "nowhere"])
    assert config.model == preset("story-cpu").model
