"""The bounds of every request, and the error that names them."""

MAX_BODY_BYTES = 1 << 20
MAX_PROMPT_TOKENS = 65_536
"""Of one prompt, the separator included. The model reads the last T."""
MAX_TOKENS = 4096
"""Most tokens of one text."""
MAX_TEXTS = 128
"""Texts of one request: its prompts times `n`."""
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 200
MAX_MESSAGES = 1000
MAX_QUEUE = 256
"""Texts that wait for a slot."""
BODY_SECONDS = 10.0
"""A body must have arrived within this time."""
STALLED_SECONDS = 1.0
"""A client that takes nothing for so long, with all buffers full, loses its stream."""


class ApiError(Exception):
    """An answer with a status of 4xx or 5xx, in the form that OpenAI's clients read."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """`param` is the field that is wrong. `code` is a word for programs."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
