"""Record the plans of presets on described cards, for `moe-jax plan`: all pairs, or those that are named.

    uv run --isolated --extra gpu-plan python benchmarks/record_plans.py
    uv run --isolated --extra gpu-plan python benchmarks/record_plans.py seed-158m:rtx3050-4gb nano:h100-80gb

All pairs take hours of processor time. What an earlier plan has compiled is looked up.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence

from moe_jax.cli.main import main
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.planning.plans import RECORDED, digest
from moe_jax.planning.target import described_gpus, load_target
from moe_jax.system import environment
from moe_jax.system.files import json_text

PAIRS = [f"{name}:{gpu}" for name in PRESETS for gpu in described_gpus()]


def run(argv: Sequence[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # as `plan` does
    environment.prepare_environment()
    from moe_jax.planning.ladder import Room, walk

    for pair in argv or PAIRS:
        name, _, gpu = pair.partition(":")
        config, target = with_vocabulary(preset(name)), load_target(gpu)
        plans = [plan.to_json() for plan in walk(config, Room.on(target))]
        found = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        compiler = {"digest": digest(config, target), "jaxlib": importlib.metadata.version("jaxlib")}
        found[f"{name} {gpu}"] = compiler | {"plans": plans}
        lines = [f"{json.dumps(key)}: {json_text(found[key])}" for key in sorted(found)]
        RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")  # a pair a line
        print(pair, plans[-1]["setting"], plans[-1]["programs"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
