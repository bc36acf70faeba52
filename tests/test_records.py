"""Records do not change: a dataclass is frozen, so that a configuration, a checkpoint or a result can be passed on."""

import dataclasses
import importlib
import inspect
import pkgutil

import moe_jax

MUTABLE = {
    "runs.orbax_state.SaveArgs",
    "serving.engine._Row",
    "serving.texts.TextRequest",
    "training.state.RunCounters",
    "training.session.Session",
}
"""These hold the state of something that goes on; orbax makes its own records so."""
EXTRAS = {"lm_eval", "pydantic", "starlette", "uvicorn"}
"""Packages of extras that modules import at their top."""


def test_every_record_is_frozen() -> None:
    found = set()
    for module in pkgutil.walk_packages(moe_jax.__path__, "moe_jax."):
        if module.name != "moe_jax.__main__":  # importing it runs the program
            for value in vars(_imported(module.name)).values():
                own = inspect.isclass(value) and value.__module__ == module.name
                if own and dataclasses.is_dataclass(value) and not value.__dataclass_params__.frozen:  # pyright: ignore
                    found.add(f"{module.name}.{value.__name__}".removeprefix("moe_jax."))
    assert found == MUTABLE


def _imported(name: str) -> object:
    """A module, or nothing if it needs a package of an extra that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in EXTRAS:
            return object
        raise
