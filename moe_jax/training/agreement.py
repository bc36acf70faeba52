"""What all processes of a run must have in common, compared before the first step."""

import hashlib
from pathlib import Path

import moe_jax
from moe_jax.config import RunConfig
from moe_jax.config.section import flag_of
from moe_jax.data.token_store import TokenStore
from moe_jax.model.precision import Policy
from moe_jax.parallel.processes import ANSWER_SECONDS, agree_on, several
from moe_jax.system.machine import versions

_OWN = (("", "out"),)
"""Settings that may differ: the folder of the run may be mounted under another path."""


def check_same_program(config: RunConfig, saved: RunConfig | None) -> None:
    """Raise ConfigError in every process unless all have the same settings, the same code and the same packages."""
    if not several():
        return
    facts = {flag_of(section, name): value for section, name, value in config.settings() if (section, name) not in _OWN}
    facts["a run in --out"] = saved is not None
    facts |= {f"version of {name}": version for name, version in versions().items()}
    agree_on(facts | {"code of moe_jax": code_digest()}, ANSWER_SECONDS)


def check_same_data(config: RunConfig, store: TokenStore, policy: Policy) -> None:
    """Raise ConfigError in every process unless all have the same text, tokenizer and precision."""
    facts = {
        f"--data {config.data.source}": store.digest,
        "tokenizer": store.tokenizer.digest,
        "--precision": policy.compute,
    }
    agree_on(facts)


def code_digest() -> str:
    """SHA-256 of the files of this package, 16 digits of it."""
    digest = hashlib.sha256()
    package = Path(moe_jax.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
