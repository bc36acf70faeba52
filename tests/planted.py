"""Bugs planted into moe_jax, each with the check that must catch it.

A bug is an edit of a function's source: the text it replaces must be there, so a bug whose place has moved is noticed
and not silently planted nowhere.
"""

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests import checks


@dataclass(frozen=True)
class Bug:
    """Replace `old` by `new` in a function, named `moe_jax.module:function` or `moe_jax.module:Class.method`."""

    name: str
    where: str
    old: str
    new: str
    check: Callable[[], None]

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module_name, _, qualified = self.where.partition(":")
        module = importlib.import_module(module_name)
        owner: Any = module
        *path, name = qualified.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(original))
        assert source.count(self.old) == 1, f"{self.name}: {self.where} has {source.count(self.old)} x {self.old!r}"
        tree = ast.parse(source.replace(self.old, self.new))
        namespace: dict[str, Any] = dict(vars(module))
        # The globals of the edited function are the module's own, so that other patches reach it.
        exec(compile(tree, f"<planted: {self.name}>", "exec"), vars(module), namespace)
        edited = namespace[name]
        if path:
            monkeypatch.setattr(owner, name, edited)
            return
        for other in [m for key, m in sys.modules.items() if key.startswith(("moe_jax", "tests."))]:
            for attribute, value in list(vars(other).items()):
                if value is original:
                    monkeypatch.setattr(other, attribute, edited)


BUGS = [
    Bug(
        "no causal mask",
        "moe_jax.model.attention:_softmax",
        "jnp.where(visible, scores, -jnp.inf)",
        "scores",
        checks.check_causal,
    ),
    Bug(
        "choice-major order",
        "moe_jax.model.routing:positions_in_expert",
        "before = jnp.cumsum(hits, axis=1) - hits",
        """one = jax.nn.one_hot(expert, experts, dtype=jnp.int32)
    queue = one.swapaxes(1, 2).reshape(expert.shape[0], -1, experts)
    queue = (jnp.cumsum(queue, axis=1) - queue).reshape(one.swapaxes(1, 2).shape).swapaxes(1, 2)
    return (queue * one).sum(-1)""",
        checks.check_causal,
    ),
    Bug(
        "choice-major order, by the worked case",
        "moe_jax.model.routing:positions_in_expert",
        "before = jnp.cumsum(hits, axis=1) - hits",
        """one = jax.nn.one_hot(expert, experts, dtype=jnp.int32)
    queue = one.swapaxes(1, 2).reshape(expert.shape[0], -1, experts)
    queue = (jnp.cumsum(queue, axis=1) - queue).reshape(one.swapaxes(1, 2).shape).swapaxes(1, 2)
    return (queue * one).sum(-1)""",
        checks.check_three_tokens,
    ),
    Bug(
        "the batch is one group",
        "moe_jax.model.routing:positions_in_expert",
        "before = jnp.cumsum(hits, axis=1) - hits",
        """flat = hits.reshape(-1, experts)
    before = (jnp.cumsum(flat, axis=0) - flat).reshape(hits.shape)""",
        checks.check_rows_are_independent,
    ),
    Bug(
        "top-K by probability",
        "moe_jax.model.routing:route",
        "jax.lax.stop_gradient(logits if bias is None else probs + bias)",
        "jax.lax.stop_gradient(probs)",
        checks.check_far_logits,
    ),
    Bug(
        "the single gate is the constant 1",
        "moe_jax.model.routing:route",
        "if top_k == 1 else",
        "if False else",
        checks.check_single_gate,
    ),
    Bug(
        "gates are not renormalised",
        "moe_jax.model.routing:route",
        "if top_k == 1 else",
        "if True else",
        checks.check_renormalised_gates,
    ),
    Bug(
        "a NaN token takes a slot",
        "moe_jax.model.routing:choice_counts",
        "hits * valid[..., None]",
        "hits",
        checks.check_invalid_token,
    ),
    Bug(
        "a NaN token passes unrouted",
        "moe_jax.model.moe:MoE.__call__",
        "y = jnp.where(routing.valid[..., None], y, jnp.nan)",
        "pass",
        checks.check_invalid_token,
    ),
    Bug(
        "one slot too many",
        "moe_jax.model.dispatch:plan_capacity",
        "position < capacity",
        "position <= capacity",
        checks.check_three_tokens,
    ),
    Bug(
        "sequences collide in one slot",
        "moe_jax.model.dispatch:plan_capacity",
        "routing.expert * batch + sequence",
        "routing.expert * batch",
        checks.check_layer_with_drops,
    ),
    Bug(
        "capacity from the binary factor",
        "moe_jax.config:capacity",
        "Fraction(str(capacity_factor))",
        "Fraction(capacity_factor)",
        checks.check_capacity,
    ),
    Bug(
        "keep mask from the gate",
        "moe_jax.model.dispatch:plan_capacity",
        "& routing.valid[..., None]",
        "& (routing.gate > 0)",
        checks.check_underflown_gate_keeps_its_slot,
    ),
    Bug(
        "gates renormalised after drops",
        "moe_jax.model.dispatch:_sum_of_choices",
        "gate = jnp.where(plan.keep, gate, 0).astype(rows.dtype)",
        """gate = jnp.where(plan.keep, gate, 0).astype(rows.dtype)
        gate = gate / jnp.maximum(gate.sum(-1, keepdims=True), 1e-9)""",
        checks.check_layer_with_drops,
    ),
    Bug(
        "the first expert serves all",
        "moe_jax.model.dispatch:plan_per_token",
        "routing.expert.reshape(-1))",
        "0 * routing.expert.reshape(-1))",
        checks.check_cached_decoding,
    ),
    Bug(
        "balance loss divided by K twice",
        "moe_jax.model.balance:expert_load",
        "/ (tokens * top_k)",
        "/ (tokens * top_k * top_k)",
        checks.check_balance_loss,
    ),
    Bug(
        "balance loss over the batch as one group",
        "moe_jax.model.balance:balance_loss",
        "(routing.logits.shape[-1] * (share * mean_prob).sum(-1)).mean()",
        "routing.logits.shape[-1] * (share.mean(0) * mean_prob.mean(0)).sum()",
        checks.check_balance_loss,
    ),
    Bug("z-loss not squared", "moe_jax.model.balance:z_loss", "jnp.square(", "(", checks.check_z_loss),
    Bug(
        "rotary positions one off in decoding",
        "moe_jax.model.attention:Attention.decode",
        "self._project(x, index[None])",
        "self._project(x, index[None] + 1)",
        checks.check_cached_decoding,
    ),
    Bug(
        "a decoded token does not see itself",
        "moe_jax.model.attention:Attention.decode",
        "<= index",
        "< index",
        checks.check_cached_decoding,
    ),
    Bug(
        "prefill drops tokens",
        "moe_jax.inference.decode:prefill",
        "Mode.GENERATE",
        "Mode.TRAIN",
        checks.check_cached_decoding,
    ),
    Bug(
        "dropout not scaled",
        "moe_jax.model.layers:dropout",
        "x / (1 - rate)",
        "x",
        checks.check_dropout_is_scaled,
    ),
    Bug(
        "attention dropout not scaled",
        "moe_jax.model.attention:Attention.__call__",
        "masks, 1 - rate)",
        "masks, 1.0)",
        checks.check_attention_dropout_is_scaled,
    ),
    Bug(
        "gradient divided by the micro-batches twice",
        "moe_jax.training.step:gradients",
        "else count * scale",
        "else count * count * scale",
        checks.check_accumulation,
    ),
    Bug(
        "metrics summed over micro-batches",
        "moe_jax.training.step:gradients",
        "lambda m: m / count, metrics",
        "lambda m: m, metrics",
        checks.check_accumulation,
    ),
    Bug(
        "loss scale left in the gradient",
        "moe_jax.training.step:gradients",
        "else count * scale",
        "else count",
        checks.check_loss_scale_cancels,
    ),
    Bug(
        "auxiliary losses in the reported loss",
        "moe_jax.training.loss:training_loss",
        "Metrics(loss, *reported",
        "Metrics(loss + extra, *reported",
        checks.check_reported_loss,
    ),
    Bug(
        "auxiliary losses summed over layers",
        "moe_jax.training.loss:auxiliary",
        "stats.balance_loss.mean(), stats.z_loss.mean()",
        "stats.balance_loss.sum(), stats.z_loss.sum()",
        checks.check_reported_loss,
    ),
    Bug(
        "a NaN step is taken",
        "moe_jax.training.step:make_step",
        "finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss)",
        "finite = jnp.array(True)",
        checks.check_bad_gradient_is_skipped,
    ),
    Bug(
        "the loss scale never grows",
        "moe_jax.training.state:next_scale",
        "old.scale * 2",
        "old.scale",
        checks.check_loss_scale_moves,
    ),
    Bug(
        "vectors decay too",
        "moe_jax.training.optimizer:_decayed",
        "p.ndim >= 2",
        "p.ndim >= 0",
        checks.check_optimizer,
    ),
    Bug(
        "gradients are not clipped",
        "moe_jax.training.step:clip_factor",
        "jnp.minimum(1, limit / norm)",
        "jnp.ones_like(norm)",
        checks.check_optimizer,
    ),
    Bug(
        "the last window counts all its tokens again",
        "moe_jax.data.batches:_evaluation_rows",
        "(done, end))",
        "(window + start, end))",
        checks.check_evaluation,
    ),
    Bug(
        "every window starts without context",
        "moe_jax.data.batches:_evaluation_rows",
        "window + seq_len // 2",
        "window + seq_len",
        checks.check_evaluation,
    ),
    Bug(
        "evaluation drops tokens",
        "moe_jax.training.evaluate:make_evaluation_step",
        "Mode.EVALUATE",
        "Mode.TRAIN",
        checks.check_evaluation,
    ),
    Bug(
        "top-p leaves out the token that reaches p",
        "moe_jax.inference.sampling:adjusted_logits",
        "jnp.cumsum(descending, axis=-1) - descending, rank",
        "jnp.cumsum(descending, axis=-1), rank",
        checks.check_filters,
    ),
    Bug(
        "filters act before the temperature",
        "moe_jax.inference.sampling:adjusted_logits",
        "probs = jax.nn.softmax(logits, axis=-1)",
        "probs = jax.nn.softmax(logits * jnp.where(greedy, 1.0, settings.temperature), axis=-1)",
        checks.check_filters,
    ),
]
