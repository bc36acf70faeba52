"""Limits of the process: known and said before jax could die of them."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.cli.train import Train
from moe_jax.config import ConfigError, UserError
from moe_jax.config.presets import PRESETS, preset
from moe_jax.model.step_memory import least_step_bytes
from moe_jax.model.transformer import abstract_model
from moe_jax.system import environment, limits
from moe_jax.training.optimizers.factory import make_optimizer, state_bytes
from tests.reliability import runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("limit", "named"), [("-v 1500000", "ulimit -v 1500000: 1.4 GiB"), ("-n 16", "ulimit -n 16: too few open files")]
)
def test_a_limit_below_what_jax_needs(limit: str, named: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", sys.executable, str(ROOT / "train.py"), "--out", "run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=runs.environment(tmp_path / "cache"),
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert named in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_limit_of_open_files_is_raised_where_it_can_be(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: asked[-1] if asked else (40, 512))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: asked.append(values))
    monkeypatch.setattr(limits, "address_space", lambda: None)
    limits.check_limits()
    assert asked == [(512, 512)]


@pytest.fixture
def small(monkeypatch) -> None:
    """A machine of 16 GiB, and a program that would not go past its first check."""
    monkeypatch.setattr("moe_jax.cli.memory.machine_memory", lambda: 16 * 2**30)
    monkeypatch.setattr(environment, "prepare_environment", lambda *_: pytest.fail("not refused"))


@pytest.mark.usefixtures("small")
def test_a_step_beyond_the_memory_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--seq-len 1048576, .* at least [\d,.]+ GiB, and this machine has 16.0 GiB"):
        Train.parse(["--seq-len", "1048576", "--batch-size", "16"]).execute()
    monkeypatch.setattr("moe_jax.cli.memory.address_space", lambda: 3 * 2**30)
    with pytest.raises(UserError, match=r"ulimit -v 3145728 allows 3\.0 GiB"):
        Train.parse(["--preset", "seed-158m"]).execute()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PRESETS)
def test_the_estimate_is_a_lower_bound(name: str) -> None:
    """Of the arrays that are surely there; and no preset is refused by a machine of 16 GiB, but for the large one."""
    config = preset(name)
    from moe_jax.config.presets import with_vocabulary

    sized = with_vocabulary(config)
    _, shapes = abstract_model(sized.model, "float32", sized.train.param_dtype)
    import jax

    leaves = jax.tree.leaves(shapes)
    count = sum(leaf.size for leaf in leaves)
    held = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    held += state_bytes(make_optimizer(sized.train), shapes) * count
    model, train = sized.model, sized.train
    weights = train.batch_size * model.heads * model.seq_len * (model.seq_len + 1) / 2 * model.layers * 4
    residual = train.batch_size * model.seq_len * model.width * model.layers * 4
    assert 0.1 * held < least_step_bytes(config) <= held + weights + residual
    assert least_step_bytes(config) < 16 * 2**30


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-bf16", "adamw-8bit", "adafactor", "muon"])
def test_the_state_of_every_optimizer_is_at_least_what_is_counted(optimizer: str) -> None:
    from moe_jax.model.step_memory import _STATE_BYTES
    from tests.support import tiny

    _, params = tiny.build(tiny.config())
    from moe_jax.config import TrainConfig

    counted, real = _STATE_BYTES[optimizer], state_bytes(make_optimizer(TrainConfig(optimizer=optimizer)), params)
    assert counted <= real + 1e-9


@pytest.mark.parametrize(
    ("command", "plain"),
    [
        ("python train.py --steps 3", True),
        ("/usr/bin/python3 -X importtime -W ignore -u ./train.py", True),
        ("python /home/me/.venv/bin/moe-jax generate --run x", True),
        ("python -m moe_jax generate", True),
        ("python benchmark.py -m pdb", True),
        ("python -m pdb train.py", False),
        ("python -m coverage run train.py", False),
        ("python /usr/bin/coverage run train.py", False),
        ("python launcher.py train.py", False),
        ("python -c pass train.py", False),
        ("python -i train.py", False),
        ("python", False),
        ("", False),
    ],
)
def test_only_a_plain_start_is_repeated(command: str, plain: bool) -> None:
    assert environment.is_plain_start(command.split()) == plain


def test_a_restart_has_one_heap_and_no_threads_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the program that takes this one's place. What the user has set stays."""
    for name in ("GLIBC_TUNABLES", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.41"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py"])
    monkeypatch.setattr(environment, "is_traced", lambda: False)
    started: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "os.execv", lambda *_: started.append((os.environ["GLIBC_TUNABLES"], os.environ["TOKENIZERS_PARALLELISM"]))
    )
    for given in ("", "true"):
        if given:
            monkeypatch.delenv("GLIBC_TUNABLES")
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", given)
        with pytest.raises(AssertionError):  # execv does not return
            environment.restart_with_malloc_settings()
    assert [("arena_max=1" in heaps, threads) for heaps, threads in started] == [(True, "false"), (True, "true")]


@pytest.mark.parametrize("refused", ["variable", "tracer", "launcher"])
def test_a_restart_can_be_refused(refused: str, monkeypatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.41"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "launcher.py" if refused == "launcher" else "train.py"])
    monkeypatch.setattr(environment, "is_traced", lambda: refused == "tracer")
    if refused == "variable":
        monkeypatch.setenv("MOE_JAX_RESTART", "0")
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("restarted"))
    (note,) = environment.restart_with_malloc_settings()
    assert "GLIBC_TUNABLES=glibc.malloc" in note
