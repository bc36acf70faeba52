"""Bugs planted into training, optimizers and evaluation, each with the check that must catch it."""

from moe_jax.data import batches
from moe_jax.training import evaluate, gradients, loss, state, step
from moe_jax.training.optimizers import adam, factory, muon
from tests.support import training_checks as checks
from tests.support.planting import Bug

BUGS = [
    Bug("gradient divided by the micro-batches twice", gradients.gradients, checks.check_accumulation).edit(
        "else count * scale", "else count * count * scale"
    ),
    Bug("metrics summed over micro-batches", gradients.gradients, checks.check_accumulation).edit(
        "lambda m: m / count, metrics", "lambda m: m, metrics"
    ),
    Bug("loss scale left in the gradient", gradients.gradients, checks.check_loss_scale_cancels).edit(
        "else count * scale", "else count"
    ),
    Bug("auxiliary losses in the reported loss", loss.training_loss, checks.check_reported_loss).edit(
        "Metrics(loss, *reported", "Metrics(loss + extra, *reported"
    ),
    Bug("auxiliary losses summed over layers", loss.auxiliary, checks.check_reported_loss).edit(
        "stats.balance_loss.mean(), stats.z_loss.mean()", "stats.balance_loss.sum(), stats.z_loss.sum()"
    ),
    Bug("a NaN step is taken", step.make_step, checks.check_bad_gradient_is_skipped).edit(
        "finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss)", "finite = jnp.array(True)"
    ),
    Bug("the loss scale never grows", state.next_scale, checks.check_loss_scale_moves).edit(
        "old.scale * 2", "old.scale"
    ),
    Bug("vectors decay too", factory._decayed, checks.check_optimizer).edit("p.ndim >= 2", "p.ndim >= 0"),
    Bug("gradients are not clipped", step.clip_factor, checks.check_optimizer).edit(
        "jnp.minimum(1, limit / norm)", "jnp.ones_like(norm)"
    ),
    Bug("the last window counts all its tokens again", batches.evaluation_windows, checks.check_evaluation).edit(
        "first - begin :", "0 :"
    ),
    Bug("the windows do not overlap", batches.evaluation_windows, checks.check_evaluation).edit(
        "positions, seq_len // 2)", "positions, seq_len)"
    ),
    Bug("evaluation drops tokens", evaluate.make_evaluation_step, checks.check_evaluation).edit(
        "Mode.EVALUATE", "Mode.TRAIN"
    ),
    Bug("micro-batches share their dropout keys", gradients.gradients, checks.check_accumulation_with_dropout).edit(
        "first=index * rows", "first=0"
    ),
    Bug("the schedule is a step late", factory.learning_rate, checks.check_schedule).edit(
        "config.steps - 1 - warmup", "config.steps - warmup"
    ),
    Bug("the rate of the next step is applied", factory.scale_by_rate, checks.check_optimizer).edit(
        "jnp.asarray(schedule(step))", "jnp.asarray(schedule(step + 1))"
    ),
    Bug("the rate of the next step is reported", step.make_step, checks.check_the_applied_rate_is_reported).edit(
        "schedule(state.step)", "schedule(state.step + 1)"
    ),
    Bug("a skipped step holds the rate back", step.make_step, checks.check_the_applied_rate_is_reported).edit(
        "taken=finite, step=state.step)", "taken=finite, step=state.step - state.skipped)"
    ),
    Bug("Muon without Nesterov", muon.scale_by_muon, checks.check_muon).edit(
        "BETA * m / seen + (1 - BETA) * g / now", "m / now"
    ),
    Bug("Muon with four iterations", muon.orthogonalised, checks.check_muon).edit(
        "range(NEWTON_SCHULZ_STEPS)", "range(4)"
    ),
    Bug("a stack of experts is one matrix to Muon", muon.orthogonalised, checks.check_muon).edit(
        "axis=(-2, -1)", "axis=None"
    ),
    Bug(
        "both 8-bit moments are rounded with one key",
        adam.scale_by_adam8bit,
        checks.check_moments_are_rounded_independently,
    ).edit("v, keys[1])", "v, keys[0])"),
    Bug(
        "all 8-bit tensors are rounded with one key",
        adam.scale_by_adam8bit,
        checks.check_moments_are_rounded_independently,
    ).edit("jax.random.fold_in(key, i)", "key"),
    Bug(
        "all bfloat16 weights are rounded with one key",
        step.apply_updates,
        checks.check_weights_are_rounded_independently,
    ).edit("jax.random.fold_in(key, i)", "key"),
    Bug("an epoch's order does not depend on the epoch", batches._epoch, checks.check_epochs_have_their_own_order).edit(
        "mix(key + np.uint64(1 << 63))", "mix(np.array([seed], np.uint64) + np.uint64(1 << 63))"
    ),
    Bug("an epoch's order does not depend on the seed", batches._epoch, checks.check_epochs_have_their_own_order).edit(
        "mix(key + np.uint64(1 << 63))", "mix(np.array([epoch], np.uint64))"
    ),
]
