"""Ctrl-C in a program: an exception while it works, and never lost. Standard library only.

Python raises KeyboardInterrupt wherever the main thread is. In a callback of the garbage collector, or in `__del__`, an
exception cannot spread: Python prints its traceback and goes on, as if nobody had pressed Ctrl-C. `import jax` runs
many such callbacks. Here the interrupt is raised once more, a moment later.
"""

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN_SECONDS = 0.01


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this context, Ctrl-C raises KeyboardInterrupt in the main thread, and is raised again where it was lost.

    After it, Ctrl-C ends the process at once and without a word: the work is done, and Python only shuts down. A
    program that was started with Ctrl-C ignored, as a shell does it in the background, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = sys.unraisablehook

    def hook(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:
            again = threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            before(lost)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.unraisablehook is hook:  # a hook set in the meantime serves threads that still run
            sys.unraisablehook = before
