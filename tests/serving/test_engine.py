"""The engine: every text is that of `generate`, whoever else is served; no slot is lost."""

import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
from suites.serving import in_parallel

from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.traced_pass import make_traced_pass
from moe_jax.model.moe.layer import Mode
from moe_jax.serving.engine import Engine, QueueFull, Stopping
from moe_jax.serving.texts import Event, TextRequest
from tests.serving import made


def requests() -> list[TextRequest]:
    """Texts of other prompts, lengths and settings; some ask for more than their text."""
    kinds = [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0),
        Sampling(temperature=0.8, top_k=20),
        Sampling(temperature=1.2, top_p=0.8, repetition_penalty=1.3),
        Sampling(temperature=1.0, min_p=0.1),
    ]
    prompts = [[made.SEPARATOR], made.PROMPT, [made.SEPARATOR, *b"a longer one than the context of 32 tokens"], [65]]
    return [
        TextRequest(prompt, settings, 3 * n, n % 4, 5 + 3 * n, logprobs=n % 3 == 0, routing=n % 4 == 1)
        for n, (settings, prompt) in enumerate(itertools.product(kinds, prompts))
    ]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def test_texts_are_those_of_generate_in_any_company() -> None:
    """Once all at once, once one after another in reverse. All of their bits are the same: probabilities, gates."""
    with made.engine(queue=100) as engine:
        at_once = in_parallel(engine, requests())
        in_turn = [in_parallel(engine, [request])[0] for request in reversed(requests())][::-1]
        assert (engine.busy, engine.queued) == (0, 0)
    for request, events, alone in zip(requests(), at_once, in_turn, strict=True):
        assert [p for e in events for p in e.pieces] == [p for e in alone for p in e.pieces]
        assert made.text(events) == made.generated(request)
        assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
        drawn = sum(len(event.pieces) for event in events)
        assert events[-1].finish == ("length" if drawn == request.limit else "stop")


def test_after_compile_no_text_waits_for_a_compiler() -> None:
    """The first text included: a long one, with all that can be asked."""
    decoder = Decoder(made.run().graphdef, made.T, 257, made.SLOTS, short_prompts=True)
    engine = Engine(decoder, made.run().params, made.run().tokenizer, queue=made.QUEUE)
    engine.compile()
    assert (engine.busy, engine.queued, engine.cancelled) == (0, 0, 0)

    def compiled() -> list[int]:
        programs = (decoder.prefill, decoder.step, decoder._place, decoder.refill, decoder._look)
        return [program._cache_size() for program in programs]  # pyright: ignore

    before = compiled()
    assert min(before) == 1
    engine.start()
    request = TextRequest(made.PROMPT, Sampling(temperature=1.0), 0, 1, 40, logprobs=True, routing=True, echo=True)
    (events,) = in_parallel(engine, [request])
    engine.stop()
    assert made.text(events) == made.generated(request)
    assert compiled() == before


def test_the_penalty_does_not_hold_off_the_end_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The separator before a text is also its end: unlike other tokens of a prompt it is not seen."""
    place, seen = made.decoder().place, []
    monkeypatch.setattr(made.decoder(), "place", lambda *given: seen.append(given[3]) or place(*given))
    with made.engine() as engine:
        prompt = [made.SEPARATOR, 65, made.SEPARATOR, 66]
        in_parallel(engine, [TextRequest(prompt, Sampling(repetition_penalty=2.0), 0, 0, 2)])
    assert seen == [[65, 66]]


def test_probabilities_and_experts_of_every_token_also_past_the_context() -> None:
    """The experts of a full context's last token are those that read it in the new, shorter context."""
    request = TextRequest(made.PROMPT, made.GREEDY, 0, 0, 40, logprobs=True, routing=True, echo=True)
    with made.engine() as engine:
        (events,) = in_parallel(engine, [request])
    prompt, pieces = events[0].prompt, [piece for event in events for piece in event.pieces]
    assert [piece.token for piece in prompt] == made.PROMPT
    assert (prompt[0].logprob, prompt[0].likeliest) == (None, [])
    assert all(piece.token == piece.likeliest[0][0] for piece in pieces), "greedy takes the likeliest"
    step = make_traced_pass(made.run().graphdef, Mode.GENERATE)

    def experts(context: list[int]) -> np.ndarray:
        decisions = step(made.run().params, np.array([context])).decisions
        assert decisions is not None
        return np.asarray(decisions.expert_index)[:, 0]  # [L, T, K]

    tokens = [*made.PROMPT, *(piece.token for piece in pieces)]
    found = np.array([piece.experts for piece in [*prompt, *pieces]])  # [N, L, K]
    assert np.array_equal(found[: made.T], experts(tokens[: made.T]).swapaxes(0, 1))
    later = tokens[made.T + 1 - made.T // 2 :][: made.T]  # what the context holds after token T
    padded = [*later, *[0] * (made.T - len(later))]
    assert np.array_equal(found[made.T :], experts(padded).swapaxes(0, 1)[made.T // 2 - 1 :][: len(found) - made.T])
    assert all(np.isclose(sum(gates), 1) for piece in pieces for gates in piece.gates or [])


class Heard:
    """The events of texts that go on while a test does something else."""

    def __init__(self, engine: Engine, requests: list[TextRequest]) -> None:
        self.events: list[list[Event]] = [[] for _ in requests]
        for request, events in zip(requests, self.events, strict=True):
            request.listener = events.append
        engine.submit(requests)

    def begun(self) -> list[bool]:
        return [bool(events) for events in self.events]

    def finishes(self) -> list[str | None]:
        return [events[-1].finish if events else None for events in self.events]


def test_a_text_that_nobody_waits_for_frees_its_slot_or_leaves_the_queue() -> None:
    with made.engine() as engine:
        texts = [made.endless() for _ in range(made.SLOTS)]
        later = [made.endless(), TextRequest(made.PROMPT, made.GREEDY, 0, 0, 4)]
        running, waiting = Heard(engine, texts), Heard(engine, later)
        until(lambda: all(running.begun()))
        assert (engine.busy, engine.queued, waiting.begun()) == (made.SLOTS, 2, [False, False])
        engine.cancel([texts[1], later[0]])
        until(lambda: waiting.finishes()[1] == "length")
        assert not waiting.begun()[0]
        assert made.text(waiting.events[1]) == made.generated(later[1])
        engine.cancel(texts)
        until(lambda: engine.busy == 0)
        assert engine.cancelled == made.SLOTS + 1
        assert set(running.finishes()) == {None}


def test_a_full_queue_takes_none_of_the_texts() -> None:
    with made.engine() as engine:
        texts = [made.endless() for _ in range(made.SLOTS)]
        running = Heard(engine, texts)
        until(lambda: all(running.begun()))
        few = [TextRequest(made.PROMPT, made.GREEDY, 0, 0, 3) for _ in range(made.QUEUE)]
        waiting = Heard(engine, few)
        with pytest.raises(QueueFull):
            engine.submit(few[:1])
        assert engine.queued == made.QUEUE
        engine.cancel(texts)
        until(lambda: waiting.finishes() == ["length"] * made.QUEUE)


def test_stopping_ends_every_text_and_the_thread() -> None:
    with made.engine() as engine:
        heard = Heard(engine, [made.endless() for _ in range(made.SLOTS + made.QUEUE)])
        until(lambda: sum(heard.begun()) == made.SLOTS)
        engine.stop()
        assert heard.finishes() == ["stopped"] * (made.SLOTS + made.QUEUE)
        assert not engine.running
        with pytest.raises(Stopping):
            engine.submit([made.endless()])


def test_a_failure_of_the_program_ends_the_engine_and_answers_all(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The text whose prompt is being read, and those that wait, too."""

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    with made.engine() as engine:
        heard = Heard(engine, [made.endless() for _ in range(2)])
        until(lambda: all(heard.begun()))
        monkeypatch.setattr(made.decoder(), "place", out_of_memory)
        later = Heard(engine, [made.endless() for _ in range(2)])
        until(lambda: not engine.running)
        assert (heard.finishes(), later.finishes()) == (["failed"] * 2, ["failed", "stopped"])
        with pytest.raises(Stopping):
            engine.submit([made.endless()])
    assert "RuntimeError: out of memory" in capfd.readouterr().err
