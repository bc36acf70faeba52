"""`moe-jax` with presets of tiny models on a text: commands that train or measure a preset end within seconds.

`MOE_JAX_TINY_TEXT` names the text.
"""

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_jax.cli.main import main, run_command
from moe_jax.config import presets
from moe_jax.config.run import RunConfig
from tests.reliability import runs


def tiny(name: str) -> RunConfig:
    from moe_jax.cli.train import Train

    text = os.environ["MOE_JAX_TINY_TEXT"]
    flags = [flag for flag in runs.flags(Path(text), Path("unused")) if not flag.startswith("--train.muon")]
    return dataclasses.replace(Train.parse(flags).settings.config, preset=name, out="")


if __name__ == "__main__":
    for preset_name in list(presets.PRESETS):
        made = tiny(preset_name)
        presets.PRESETS[preset_name] = lambda made=made: made
    sys.exit(main(run_command))
