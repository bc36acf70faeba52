"""/metrics, in Prometheus' text format (version 0.0.4)."""

from collections import Counter

from moe_jax.serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(engine: Engine, answers: Counter[tuple[str, int]]) -> str:
    """All metrics. `answers` counts the HTTP answers by path and status."""
    counts = engine.counts
    values = [
        ("slots", "gauge", "Texts that can be written at once", engine.slots),
        ("slots_busy", "gauge", "Slots with a text", engine.busy),
        ("texts_queued", "gauge", "Texts that wait for a slot", engine.queued),
        ("texts_total", "counter", "Texts that ended by themselves", counts.texts),
        ("texts_cancelled_total", "counter", "Texts that nobody waited for", counts.cancelled),
        ("failures_total", "counter", "Errors of the program", counts.failures),
        ("prompt_tokens_total", "counter", "Tokens of prompts", counts.prompt_tokens),
        ("generated_tokens_total", "counter", "Tokens written", counts.generated_tokens),
        ("decode_steps_total", "counter", "Steps, each of which writes a token for every text", counts.steps),
        ("decode_seconds_total", "counter", "Seconds in these steps", counts.step_seconds),
        ("prefill_seconds_total", "counter", "Seconds in which prompts were read", counts.read_seconds),
    ]
    lines = []
    for name, kind, about, value in values:
        lines += [f"# HELP moe_jax_{name} {about}.", f"# TYPE moe_jax_{name} {kind}", f"moe_jax_{name} {value}"]
    name = "moe_jax_http_requests_total"
    lines += [f"# HELP {name} HTTP answers.", f"# TYPE {name} counter"]
    lines += [f'{name}{{path="{path}",status="{status}"}} {n}' for (path, status), n in sorted(answers.items())]
    return "\n".join(lines) + "\n"
