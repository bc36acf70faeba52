"""The engine: one thread owns the device, and writes up to S texts at once.

Texts wait in a queue. Between two steps the thread frees the slots of texts that nobody waits for, and reads the prompt
of at most one waiting text, so that the others go on. A step draws one token for every text. A text that ends leaves
its slot at once. An error of the program ends all texts and the engine.
"""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from moe_jax.data.tokenizers import StreamDecoder, Tokenizer
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.slots import TokenDetails
from moe_jax.model.transformer import Params
from moe_jax.serving.texts import Event, FinishReason, Piece, TextPieces, TextRequest
from moe_jax.system.random_keys import Purpose, purpose_key

type News = Sequence[tuple[TextRequest, Event]]


def tell(news: News) -> None:
    """Call the listeners of texts."""
    for request, event in news:
        request.listener(event)


class QueueFull(Exception):
    """As many texts wait as may."""


class Stopping(Exception):
    """The engine takes no more texts."""


@dataclass
class _Row:
    """A text in a slot."""

    request: TextRequest
    context: list[int]
    """The tokens in the cache."""
    pieces: TextPieces
    prompt: list[Piece]
    """For the first event; empty after it."""
    drawn: int = 0


class Engine:
    """Writes texts with a model. `submit` and `stop` may be called from any thread.

    The text of a request depends on its prompt, settings, seed and number, and on the number of slots. It does not
    depend on what else is being written.
    """

    def __init__(self, decoder: Decoder, params: Params, tokenizer: Tokenizer, *, queue: int) -> None:
        """`queue` is the most texts that may wait."""
        self.slots, self.queue = decoder.slots, queue
        self.cancelled = 0
        """Texts that ended because nobody waited for them any more."""
        self._decoder, self._params, self._tokenizer = decoder, params, tokenizer
        self._state = decoder.empty(params)
        self._rows: list[_Row | None] = [None] * self.slots
        self._waiting: deque[TextRequest] = deque()
        self._news: list[tuple[TextRequest, Event]] = []
        self._deliver: Callable[[News], None] = tell
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def compile(self) -> None:
        """Compile the programs now, so that no text waits for them. Before `start`."""
        self._admit(TextRequest([0], Sampling(), 0, 0, 2, echo=True, routing=True))
        self._step()
        for length in self._decoder.prompt_lengths:
            self._decoder.look(self._params, [0] * length)
            self._state = self._decoder.refill(self._state, 0, self._decoder.read(self._params, [0] * length))
        self._rows = [None for _ in self._rows]
        self._news = []

    def start(self, deliver: Callable[[News], None] = tell) -> None:
        """Start the thread. It calls `deliver` with the events of each step: `tell`, or what has another thread do
        it."""
        self._deliver = deliver
        self._thread.start()

    def submit(self, requests: Sequence[TextRequest]) -> None:
        """Write texts. Raises QueueFull if not all of them can wait, and Stopping."""
        with self._changed:
            if self._stopping:
                raise Stopping
            if len(self._waiting) + len(requests) > self.queue + self.slots - self.busy:
                raise QueueFull
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, requests: Sequence[TextRequest]) -> None:
        """Free the slots of texts before the next token. They get no more events."""
        with self._changed:
            for request in requests:
                request.cancelled = True
            self._changed.notify()

    def stop(self, timeout: float | None = None) -> None:
        """End all texts with the reason `stopped`, and the thread after its present step."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def busy(self) -> int:
        """Slots with a text."""
        return sum(row is not None for row in self._rows)

    @property
    def queued(self) -> int:
        """Texts that wait for a slot."""
        return len(self._waiting)

    # On the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._waiting or self.busy)
                if self._stopping:
                    break
            try:
                self._turn()
                self._send()
            except Exception:  # the slots were given to the program that has failed
                traceback.print_exc(file=sys.stderr)
                self._end_all("failed")
                with self._changed:
                    self._stopping = True
        self._news += [(request, Event([], "stopped")) for request in self._waiting]
        self._waiting.clear()
        self._end_all("stopped")
        self._send()

    def _turn(self) -> None:
        """Free, admit, step."""
        for slot, row in enumerate(self._rows):
            if row is not None and row.request.cancelled:
                self.cancelled += 1
                self._rows[slot] = None
        request = self._next()
        if request is not None:
            try:
                self._admit(request)
            except Exception:
                self._news.append((request, Event([], "failed")))
                raise
        if self.busy:
            self._step()

    def _next(self) -> TextRequest | None:
        """The text that gets a slot now. Cancelled texts leave the queue, also where none gets a slot."""
        with self._changed:
            wanted = [request for request in self._waiting if not request.cancelled]
            self.cancelled += len(self._waiting) - len(wanted)
            self._waiting = deque(wanted)
            return self._waiting.popleft() if self._waiting and self.busy < self.slots else None

    def _admit(self, request: TextRequest) -> None:
        """Read a prompt, and put its text into a free slot."""
        prompt = self._prompt_pieces(request) if request.echo else []
        if request.limit == 0:
            self._news.append((request, Event([], "length", prompt)))
            return
        slot = self._rows.index(None)
        context = request.prompt[-self._decoder.seq_len :]
        # The separator begins a prompt and also ends a text. It gets no repetition penalty, or texts would not end.
        seen = [token for token in request.prompt if token != self._tokenizer.separator_id]
        read = self._decoder.read(self._params, context)
        key = purpose_key(request.seed, Purpose.SAMPLE, request.number)
        self._state = self._decoder.place(self._state, slot, read, seen, request.settings, key, request.logprobs)
        self._rows[slot] = _Row(request, list(context), TextPieces(self._tokenizer, request.stop), prompt)

    def _prompt_pieces(self, request: TextRequest) -> list[Piece]:
        read = self._decoder.look(self._params, request.prompt)
        texts = StreamDecoder(self._tokenizer)
        pieces = [
            self._piece(read, n, token, request)._replace(text=texts.feed(token))
            for n, token in enumerate(request.prompt)
        ]
        pieces[0] = pieces[0]._replace(logprob=None, likeliest=[])
        if request.prompt[0] == self._tokenizer.separator_id:  # it has no text before a text
            pieces[0] = pieces[0]._replace(text="")
        return pieces

    def _step(self) -> None:
        """One more token for every text."""
        active = np.array([row is not None for row in self._rows])
        self._state, drawn = self._decoder.step(self._params, self._state, active)
        drawn = jax.tree.map(np.asarray, drawn)
        for slot, row in enumerate(self._rows):
            if row is not None:
                self._add(slot, row, drawn)

    def _add(self, slot: int, row: _Row, drawn: TokenDetails) -> None:
        """Give a text its next token, or end it."""
        token = int(drawn.token[slot])
        if token == self._tokenizer.separator_id:
            self._tell(row, row.pieces.finish(), "stop")
            self._rows[slot] = None
            return
        row.drawn += 1
        piece = self._piece(drawn, slot, token, row.request)
        row.context.append(token)
        if len(row.context) > self._decoder.seq_len:
            piece = self._refill(slot, row, piece)
        pieces = row.pieces.feed(piece)
        if row.pieces.stopped or row.drawn == row.request.limit:
            self._tell(row, pieces + row.pieces.finish(), "stop" if row.pieces.stopped else "length")
            self._rows[slot] = None
        elif pieces or row.prompt:
            self._tell(row, pieces)

    def _refill(self, slot: int, row: _Row, piece: Piece) -> Piece:
        """The context is full: its later half becomes a new prompt. Returns the piece with the experts that have now
        read its token; the step had no place for it."""
        row.context = row.context[-(self._decoder.seq_len // 2) :]
        if row.drawn < row.request.limit:
            read = self._decoder.read(self._params, row.context)
            self._state = self._decoder.refill(self._state, slot, read)
        if not row.request.routing:
            return piece
        details = self._decoder.look(self._params, row.context)
        last = self._piece(details, len(row.context) - 1, piece.token, row.request)
        return piece._replace(experts=last.experts, gates=last.gates)

    def _piece(self, details: TokenDetails, row: int, token: int, request: TextRequest) -> Piece:
        """Token `row` of a prompt, or the token drawn for slot `row`. Its text is not known yet."""
        logprob, likeliest, experts, gates = None, [], None, None
        if request.logprobs:
            logprob, best = float(details.logprob[row]), details.likeliest_logprob[row].tolist()
            likeliest = list(zip(details.likeliest[row].tolist(), best, strict=True))
        if request.routing and details.expert is not None and details.gate is not None:
            experts, gates = details.expert[:, row].tolist(), details.gate[:, row].tolist()
        return Piece(token, "", logprob, likeliest, experts, gates)

    def _tell(self, row: _Row, pieces: list[Piece], finish: FinishReason | None = None) -> None:
        self._news.append((row.request, Event(pieces, finish, row.prompt)))
        row.prompt = []

    def _end_all(self, reason: FinishReason) -> None:
        for row in filter(None, self._rows):
            self._tell(row, row.pieces.finish(), reason)
        self._rows = [None for _ in self._rows]

    def _send(self) -> None:
        news, self._news = self._news, []
        if news:
            self._deliver(news)
