"""Convert a manifest of an earlier version to the present one: one function for each earlier version.

`manifest.read` checks the digest before this, on the original text.
"""

from collections.abc import Callable
from typing import Any

from moe_jax.config import UserError
from moe_jax.config.migrations import migrate_config
from moe_jax.data.synthetic import stories

MANIFEST_VERSION = 3


def migrate_manifest(document: dict[str, Any]) -> dict[str, Any]:
    """The same manifest in the present version, its configuration included.

    A context that cannot be converted is left as it is. The code that uses it reports the error.
    """
    while document["version"] != MANIFEST_VERSION:
        document = _MIGRATIONS[document["version"]](document)
    return document | {"context": _with_present_config(document["context"])}


def _from_version_2(old: dict[str, Any]) -> dict[str, Any]:
    """Version 2 identified the embedded stories by a digest of the program's source text.

    A changed comment changed this digest. It is replaced by the fingerprint of the stories that version 2 generated.
    The rules of the stories did not change while version 2 was written, so these rules are the right ones.
    """
    context = dict(old["context"])
    config = context.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    if isinstance(data, dict) and data.get("source") == "stories":
        told = stories.fingerprint(data.get("stories_seed", 0), data.get("stories", 0), RULES_OF_VERSION_2)
        context["data"] = f"fingerprint:{told}"
    return old | {"version": 3, "context": context}


RULES_OF_VERSION_2 = "ce0644c10fe80271f982acc2d4b65b1a"
"""`stories.rules_digest()` of the program that wrote manifests of version 2."""

_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {2: _from_version_2}
"""Version -> the function that converts a manifest of this version to the next version."""
KNOWN_VERSIONS = (*_MIGRATIONS, MANIFEST_VERSION)


def _with_present_config(context: dict[str, Any]) -> dict[str, Any]:
    try:
        return context | {"config": migrate_config(context["config"])}
    except (LookupError, TypeError, ValueError, AttributeError, UserError):
        return context
