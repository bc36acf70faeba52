"""Peak host memory of an import, of a real process: the parameters once, in their training dtype, and one more."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.interop.made import SHAPE, byte_tokenizer
from tests.reliability import runs

pytestmark = pytest.mark.interop

WIDTH, HIDDEN, LAYERS = 512, 8192, 4
SLACK = 8 << 20
"""Bytes for everything else: half a parameter of the float32 model."""
READS = """
import json, sys
from pathlib import Path
import jax, numpy as np
from moe_jax.interop.pretrained import Pretrained
from moe_jax.model.transformer import abstract_model

def status(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

found = Pretrained.open(Path(sys.argv[1]), "--init-from")
shapes = abstract_model(found.shape.model, param_dtype=sys.argv[2])[1]
jax.block_until_ready(jax.device_put(np.zeros(1000, np.float32)))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
params, _ = found.params(shapes)
sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print(json.dumps({"peak": status("VmHWM") - before, "model": sum(sizes), "largest": max(sizes)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 55 million parameters, in bfloat16."""
    folder = tmp_path_factory.mktemp("hf")
    config = SHAPE | {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": WIDTH}
    config |= {"intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (260, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (WIDTH, HIDDEN)}
    save_file({n: np.ones(s, ml_dtypes.bfloat16) for n, s in shapes.items()}, folder / "model.safetensors")
    byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_is_the_model_and_one_parameter(dtype: str, folder: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux says the peak memory of a part of a process")
    done = subprocess.run(
        [sys.executable, "-c", READS, str(folder), dtype],
        env=runs.environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["model"] > 10 * found["largest"]
    assert found["model"] <= found["peak"] + SLACK
    assert found["peak"] <= found["model"] + found["largest"] + SLACK
