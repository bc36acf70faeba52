"""The code that a notebook shows is the module's own."""

import ast
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from foundation import attention, softmax

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "foundation/notebooks").glob("[0-9]*.ipynb"))


def test_what_is_shown_runs_and_gives_what_the_module_gives() -> None:
    pytest.importorskip("matplotlib", reason="the extra lessons is not installed")
    # Imported here, because this module sets float64, which would hold for the tests of `moe_jax` too.
    from foundation.lessons.notebook import shown

    scope = {**vars(softmax)}
    text = repr(shown(softmax.softmax_forward, softmax.softmax_backward))
    exec(text, scope)
    logits, d_p = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([[0.3, -1.0, 2.0]])
    _, cache = scope["softmax_forward"](logits)
    np.testing.assert_array_equal(
        scope["softmax_backward"](d_p, cache), softmax.softmax_backward(d_p, softmax.softmax_forward(logits)[1])
    )
    assert text.startswith("def softmax_forward(logits, mask=None):\n    if mask is not None:")
    assert "# -inf - (-inf) is NaN" in text  # comments stay
    assert "\n\n\ndef softmax_backward(d_p, cache):\n    (p,) = cache\n" in text
    assert shown(softmax.softmax_backward)._repr_markdown_().startswith("```python\ndef softmax_backward(")
    assert "rate=0.0):" in repr(shown(attention.attention_forward))


@pytest.mark.parametrize("stored", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_shows_the_code_of_today(stored: Path) -> None:
    """Of its cells, only the imports and those that show code are run."""
    pytest.importorskip("matplotlib", reason="the extra lessons is not installed")
    from foundation.lessons.notebook import shown

    scope = {"shown": shown}
    for cell in json.loads(stored.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec("\n".join(map(ast.unparse, imports)), scope)
        if source.startswith("shown("):
            (output,) = cell["outputs"]
            assert "".join(output["data"]["text/markdown"]) == eval(source, scope)._repr_markdown_()
