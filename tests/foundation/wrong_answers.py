"""Answers that learners plausibly give to a backward pass or an exercise, and that are wrong.

Each is the body of the function below the lines that the stub gives. They were written from the derivations' words and
letters, without a look at how `challenges/mistakes.py` makes its mistakes.
"""

from pathlib import Path


def varied(right: str, *changes: tuple[str, str]) -> list[str]:
    """A right body with one place changed, for each of the changes."""
    for old, _ in changes:
        assert old in right
    return [right.replace(old, new) for old, new in changes]


LAYERNORM = """\
d_n = d_y * scale
mean, along = jnp.mean(d_n, -1, keepdims=True), jnp.mean(d_n * n, -1, keepdims=True)
d_x = rstd * (d_n - mean - n * along)
return d_x, jnp.sum(d_y * n, (0, 1)), jnp.sum(d_y, (0, 1))"""
RMSNORM = """\
d_n = d_y * scale
along = jnp.mean(d_n * n, -1, keepdims=True)
return rrms * (d_n - n * along), jnp.sum(d_y * n, (0, 1))"""
ATTENTION = """\
d_kept = d_o @ jnp.swapaxes(v, -1, -2)
d_v = jnp.swapaxes(kept, -1, -2) @ d_o
d_s = softmax_backward(dropout_backward(d_kept, dropout_cache), softmax_cache) / math.sqrt(q.shape[-1])
return d_s @ k, jnp.swapaxes(d_s, -1, -2) @ q, d_v"""
CROSS_ENTROPY = """\
p = logsumexp_backward(jnp.ones(targets.shape), lse_cache)
onehot = jnp.arange(p.shape[-1]) == targets[..., None]
return d_loss / count * (p - onehot)"""

WRONG_ANSWERS: dict[str, list[str]] = {
    "sigmoid": ["return d_y * y", "return d_y * (1.0 - y)", "return d_y * (1.0 - y**2)", "return y * (1.0 - y)"],
    "gelu": [
        "u = _GELU_SCALE * (1.0 + _GELU_CUBIC * x**2)\nreturn d_y * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t**2) * u)",
        "return d_y * 0.5 * (1.0 + t)",
        "return d_y * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t**2))",
        "u = _GELU_SCALE * (1.0 + 3 * _GELU_CUBIC * x**2)\nreturn d_y * (0.5 * (1.0 + t) + 0.5 * (1.0 - t**2) * u)",
        "u = _GELU_SCALE * (1.0 + 3 * _GELU_CUBIC * x**2)\nreturn d_y * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t) * u)",
    ],
    "silu": [
        "return d_y * s",
        "return d_y * s * (1.0 - s)",
        "return d_y * x * s * (1.0 - s)",
        "return d_y * (s + s * (1.0 - s))",
        "return d_y * s * (1.0 + x * s)",
    ],
    "linear": [
        "return d_y @ kernel.T, x.T @ d_y / len(x), jnp.sum(d_y, 0)",
        "return d_y @ kernel.T, d_y.T @ x, jnp.sum(d_y, 0)",
        "return d_y @ kernel.T, x.T @ d_y, jnp.mean(d_y, 0)",
        "return d_y @ kernel.T, x.T @ d_y, d_y",
        "return d_y @ kernel.T, x.T @ d_y, jnp.sum(d_y, -1)",
        "return d_y @ kernel.T / len(x), x.T @ d_y, jnp.sum(d_y, 0)",
    ],
    "dropout": [
        "return jnp.where(keep, d_y, 0.0)",
        "return d_y / (1.0 - rate)",
        "return jnp.where(keep, d_y * (1.0 - rate), 0.0)",
        "return jnp.where(keep, d_y / rate, 0.0)",
    ],
    "softmax": [
        "return p * d_p",
        "return p * (d_p - jnp.sum(p * d_p))",
        "return p * (d_p - jnp.sum(p * d_p, axis=0, keepdims=True))",
        "return p * (1.0 - p) * d_p",
        "return p * (d_p - jnp.sum(d_p, axis=-1, keepdims=True))",
        "return d_p - jnp.sum(p * d_p, axis=-1, keepdims=True)",
        "return p * (d_p - jnp.mean(p * d_p, axis=-1, keepdims=True))",
        "return p * (d_p + jnp.sum(p * d_p, axis=-1, keepdims=True))",
        "return p * (d_p - p * d_p)",
    ],
    "cross_entropy": varied(
        CROSS_ENTROPY,
        (" / count", ""),
        ("p - onehot", "p + onehot"),
        ("p - onehot", "p"),
        ("p - onehot", "onehot - p"),
        ("(p - onehot)", "p - onehot"),
    ),
    "layernorm": varied(
        LAYERNORM,
        ("d_n - mean - n * along", "d_n - n * along"),
        ("d_n - mean - n * along", "d_n - mean"),
        ("d_n - mean - n * along", "d_n"),
        ("d_n - mean - n * along", "d_n - mean - along"),
        ("d_n - mean - n * along", "d_n - mean + n * along"),
        ("d_n = d_y * scale", "d_n = d_y"),
        ("d_n = d_y * scale\n", "d_n = d_y\nrstd = rstd * scale\n"),
        ("rstd * (", "("),
        ("jnp.mean", "jnp.sum"),
        ("jnp.sum(d_y * n,", "jnp.sum(d_y,"),
        ("jnp.sum(d_y * n,", "jnp.sum(d_n * n,"),
        ("jnp.sum(d_y * n,", "jnp.mean(d_y * n,"),
        ("jnp.sum(d_y, (0, 1))", "jnp.mean(d_y, (0, 1))"),
        ("jnp.sum(d_y, (0, 1))", "jnp.sum(d_n, (0, 1))"),
    ),
    "rmsnorm": varied(
        RMSNORM,
        ("d_n - n * along", "d_n"),
        ("d_n - n * along", "d_n - n * jnp.mean(d_n, -1, keepdims=True)"),
        ("d_n - n * along", "d_n - jnp.mean(d_n, -1, keepdims=True) - n * along"),
        ("jnp.mean(d_n * n", "jnp.mean(d_y * n"),
        ("d_n = d_y * scale", "d_n = d_y"),
        ("d_n = d_y * scale\n", "d_n = d_y\nrrms = rrms * scale\n"),
        ("jnp.mean", "jnp.sum"),
        ("d_y * n, (0, 1)", "d_y * n / rrms, (0, 1)"),
    ),
    "rope": [
        "a, b = jnp.split(d_y, 2, -1)\nc, s = jnp.cos(angles), jnp.sin(angles)\n"
        "return jnp.concatenate([a * c - b * s, a * s + b * c], -1)",
        "return d_y",
        "a, b = jnp.split(d_y, 2, -1)\nc = jnp.cos(angles)\nreturn jnp.concatenate([a * c, b * c], -1)",
        "a, b = jnp.split(d_y, 2, -1)\nc, s = jnp.cos(angles), jnp.sin(angles)\n"
        "return jnp.concatenate([a * c - b * s, b * c - a * s], -1)",
        "a, b = d_y[..., ::2], d_y[..., 1::2]\nc, s = jnp.cos(angles), jnp.sin(angles)\n"
        "return jnp.stack([a * c + b * s, b * c - a * s], -1).reshape(d_y.shape)",
    ],
    "attention": varied(
        ATTENTION,
        (" / math.sqrt(q.shape[-1])", ""),
        ("q.shape[-1]", "q.shape[-2]"),
        ("math.sqrt(q.shape[-1])", "q.shape[-1]"),
        ("jnp.swapaxes(d_s, -1, -2) @ q", "d_s @ q"),
        ("jnp.swapaxes(kept, -1, -2)", "kept"),
        ("jnp.swapaxes(kept, -1, -2) @ d_o", "d_o"),
        ("softmax_backward(dropout_backward(d_kept, dropout_cache), softmax_cache)", "d_kept"),
        ("softmax_backward(dropout_backward(d_kept, dropout_cache), softmax_cache)", "kept * d_kept"),
        ("d_s @ k, jnp.swapaxes(d_s, -1, -2) @ q", "d_s @ q, jnp.swapaxes(d_s, -1, -2) @ k"),
        ("d_s @ k, jnp.swapaxes(d_s, -1, -2) @ q", "jnp.swapaxes(d_s, -1, -2) @ k, d_s @ q"),
        ("d_s @ k, jnp.swapaxes(d_s, -1, -2) @ q", "jnp.swapaxes(d_s, -1, -2) @ q, d_s @ k"),
    ),
}
"""{operation: bodies}. `d_y`, the cache and what the stub imports are there."""

ROUTER = """\
batch, tokens, _ = d_gates.shape
onehot = experts[..., None] == jnp.arange(share.shape[-1])
d_p = d_balance * share.shape[-1] * share[:, None, :] / (batch * tokens)
d_p = jnp.broadcast_to(d_p, (batch, tokens, share.shape[-1]))
chosen = softmax_backward(d_gates, gate_cache)
d_z_gates = jnp.sum(onehot * chosen[..., None], axis=2)
d_z_balance = softmax_backward(d_p, softmax_cache)
d_z_z = logsumexp_backward(d_z * 2.0 * log_total / (batch * tokens), lse_cache)
d_logits = d_z_gates + d_z_balance + d_z_z
return linear_backward(d_logits, linear_cache)[:2]"""
WRONG_ANSWERS["router"] = varied(
    ROUTER,
    ("softmax_backward(d_gates, gate_cache)", "d_gates"),
    ("d_z_gates + d_z_balance + d_z_z", "d_z_balance + d_z_z"),
    ("d_z_gates + d_z_balance + d_z_z", "d_z_gates + d_z_z"),
    ("d_z_gates + d_z_balance + d_z_z", "d_z_gates + d_z_balance"),
    ("d_z * 2.0 * log", "d_z * log"),
    ("d_z * 2.0 * log_total", "jnp.full_like(log_total, d_z * 2.0)"),
    ("log_total / (batch * tokens)", "log_total"),
    ("log_total / (batch * tokens)", "log_total / tokens"),
    ("softmax_backward(d_p, softmax_cache)", "d_p"),
    ("softmax_backward(d_p, softmax_cache)", "softmax_cache[0] * d_p"),
    ("d_balance * share.shape[-1] * share", "d_balance * share"),
    ("[:, None, :] / (batch * tokens)", "[:, None, :] / tokens"),
)
COMBINE = """\
d_gates = jnp.sum(d_y[:, :, None, :] * picked, axis=-1)
d_picked = gates[..., None] * d_y[:, :, None, :]
d_h = jnp.zeros((batch, experts_total * places + 1, width))
d_h = d_h.at[jnp.arange(batch)[:, None, None], slot].set(d_picked)
return d_h[:, :-1].reshape(batch, experts_total, places, width), d_gates"""
WRONG_ANSWERS["combine"] = varied(
    COMBINE,
    ("gates[..., None] * d_y[:, :, None, :]", "jnp.ones_like(gates)[..., None] * d_y[:, :, None, :]"),
    ("jnp.sum(d_y[:, :, None, :] * picked, axis=-1)", "gates * jnp.sum(d_y[:, :, None, :] * picked, axis=-1)"),
    ("jnp.sum(d_y[:, :, None, :] * picked, axis=-1)", "jnp.mean(d_y[:, :, None, :] * picked, axis=-1)"),
    ("jnp.sum(d_y[:, :, None, :] * picked, axis=-1)", "jnp.sum(picked, axis=-1)"),
)

WRONG_FUNCTIONS: dict[str, list[str]] = {}
"""{exercise: functions}, as text. `softmax` is there."""
for line in Path(__file__).with_name("wrong_functions.txt").read_text(encoding="utf-8").splitlines():
    number, _, text = line.partition(" ")
    WRONG_FUNCTIONS.setdefault(number, []).append(text)
