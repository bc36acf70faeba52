"""Processes that tokenize parts of a text side by side. `python -m moe_jax.data.shard_workers FOLDER PID` is
one of them.

A process reads jobs as lines of JSON, each with a part of the text, and makes their shards in the folder of a draft
(`store_draft.py`). It answers in lines of JSON too: what was added, the entry of the finished shard, or an error. It
ends when its input ends, or at most 1 MiB of text after the process that started it was killed.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_jax.config import UserError
from moe_jax.data.store_draft import Added, Draft, Entry
from moe_jax.data.text_plan import TextPart
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.system.json_text import json_text

_PACKAGES = Path(__file__).resolve().parents[2]


class WorkerEnded(UserError):
    """A process ended before its shard was finished. Other shards are good."""


class ShardWorkers:
    """Up to `count` processes. Each one gets the next shard as soon as it has finished one."""

    def __init__(self, draft: Draft, count: int, added: Added) -> None:
        self._draft, self._added = draft, added
        self._threads = ThreadPoolExecutor(count)
        self._mine = threading.local()
        self._processes: list[subprocess.Popen[str]] = []
        self._closed = False

    def submit(self, split: str, number: int, part: TextPart) -> Future[Entry]:
        """The entry of a shard, once it is there. Raises UserError and OSError as `Draft.write` does, and
        WorkerEnded."""
        job = json_text({"split": split, "number": number, "part": part.to_dict()})
        return self._threads.submit(self._made, job)

    def close(self) -> None:
        """End all processes, whatever they do."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self._processes):
            process.kill()
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.communicate()

    def _made(self, job: str) -> Entry:
        """Runs in a thread of its own, which has a process of its own."""
        process = getattr(self._mine, "process", None) or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its output too
            process.stdin.write(job + "\n")
            process.stdin.flush()
        for line in process.stdout:
            kind, value = json.loads(line)
            if kind == "entry":
                return value
            if kind == "user error":
                raise UserError(value)
            if kind == "system error":
                raise OSError(*value)
            self._added(*value)
        raise WorkerEnded(
            f"a process that tokenized the text ended with status {process.wait()}; start again: finished parts are "
            "kept (was the memory full?)"
        )

    def _started(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, [str(_PACKAGES), os.environ.get("PYTHONPATH")]))
        self._mine.process = subprocess.Popen(
            [sys.executable, "-m", "moe_jax.data.shard_workers", str(self._draft.folder), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches the process that started it, which ends it
        )
        self._processes.append(self._mine.process)
        if self._closed:
            self._mine.process.kill()
        return self._mine.process


@contextlib.contextmanager
def shard_workers(draft: Draft, count: int, added: Added) -> Iterator[ShardWorkers]:
    """Processes that end with the context."""
    workers = ShardWorkers(draft, count, added)
    try:
        yield workers
    finally:
        workers.close()


def _work(folder: Path, started_by: int) -> None:
    """The main program of a process, which the process `started_by` has started."""

    def say(kind: str, value: Any) -> None:
        if os.name == "posix" and os.getppid() != started_by:  # it was killed
            os._exit(1)
        print(json_text([kind, value]), flush=True)

    draft, tokenizer = Draft(folder), load_tokenizer(folder / "tokenizer.json")
    for line in sys.stdin:
        job = json.loads(line)
        part = TextPart.from_dict(job["part"])
        try:
            entry = draft.write(job["split"], job["number"], part, tokenizer, lambda *added: say("added", added))
        except UserError as error:
            say("user error", str(error))
        except OSError as error:
            say("system error", [error.errno, error.strerror])
        else:
            say("entry", entry)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
