"""Several processes that train one run together, each with devices of its own.

jax connects them (`jax.distributed`): process 0 runs the coordination service, with a store of short texts, barriers
and heartbeats. All processes run the same program on their own part of the arrays. Process 0 alone writes the files of
the run and prints.

Three things must not happen, and this module is about them:

    the processes train different things     `agree_on` compares settings, code and data before the first step
    one process stops and the others wait    `agree_to_stop`: all see a signal or an error at the same step
    a process dies and the others wait       a thread watches the others, and ends this process (`_watch`)

Without `joined` this process is alone, and every function here does nothing or returns what it was given.
"""

import itertools
import json
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax._src import distributed  # there is no public way to the store of texts

from moe_jax.config import ConfigError, UserError
from moe_jax.config.processes import ProcessGroup
from moe_jax.parallel.global_arrays import largest

HEARTBEAT_SECONDS = 10
"""A process that has sent no heartbeat for this long counts as dead."""
ANSWER_SECONDS = 45
"""How long the first meeting of all processes may take."""
_WATCH_SECONDS = 1.0
_FAILED = "moe_jax/failed"
_ERROR = 1000
"""Added to the number of a process that has an error. Numbers of signals are smaller."""
_NOT_FOUND = re.compile("(should|must) be defined")
"""What jax says if it has no coordinator, number of processes or process id."""
_LONG = 7 * 24 * 3600.0
"""Seconds to wait for work that may take long. A dead process is noticed long before."""

_names = itertools.count()
"""Each use of a barrier needs a new name. All processes come to the barriers in the same order."""
_leaving = threading.Lock()
"""Taken by the thread that ends this process, so that one line says why."""
_closing = threading.Event()
_alone = threading.Event()


def first() -> bool:
    """Whether this process writes and prints: process 0, or the only one."""
    return _index() == 0


def several() -> bool:
    """Whether this process trains together with others."""
    return distributed.global_state.num_processes > 1


@contextmanager
def joined(group: ProcessGroup | None) -> Iterator[None]:
    """Within this block, this process belongs to the group. `None` is a process alone.

    An error that leaves the block ends the other processes too, each with one line. Raises UserError if the others do
    not answer within ANSWER_SECONDS.
    """
    if group is None:
        yield
        return
    _connect(group)
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()
    try:
        yield
    except Exception as error:
        _tell(error)
        _close(watch)
        raise
    except BaseException:
        _close(watch)
        raise
    barrier()
    _close(watch)


def _connect(group: ProcessGroup) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `system.signals`
    # Without this, jax aborts a process with a stack trace once another process has died. `_watch` does it in one line.
    jax.config.update("jax_enable_recoverability", True)
    where: dict[str, Any] = {}
    if not group.detected:
        where = {
            "coordinator_address": group.coordinator,
            "num_processes": group.count,
            "process_id": group.index,
            "cluster_detection_method": "deactivate",
        }
        if group.local:
            where["coordinator_bind_address"] = group.coordinator
    answered = threading.Event()
    threading.Thread(target=_end_unless, args=(answered, _silence(group)), daemon=True).start()
    with warnings.catch_warnings(record=True) as warned:  # of a cluster whose package is missing, in many lines
        try:
            jax.distributed.initialize(
                **where,
                initialization_timeout=2 * ANSWER_SECONDS,  # jax would abort the process after this
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(_refusal(group, [*(str(warning.message) for warning in warned), str(error)])) from None
        finally:
            answered.set()


def _refusal(group: ProcessGroup, said: list[str]) -> str:
    """Why the processes are not connected, from what jax said of it."""
    if group.detected and _NOT_FOUND.search(said[-1]):
        cause = _line(said[:-1])
        found = f"JAX finds no cluster here ({cause})" if cause else "JAX finds no cluster here"
        return (
            f"--cluster: {found}; under SLURM start it by srun, else give --num-processes, --process-id and "
            "--coordinator-address"
        )
    named = "--cluster" if group.detected else f"--coordinator-address {group.coordinator}"
    return f"{named}: the processes cannot be connected ({_line(said)}); mend that and start all again"


def _line(said: list[str]) -> str:
    return " ".join(" ".join(said).split())[:200]


def _silence(group: ProcessGroup) -> str:
    """What to say if nobody answers."""
    if group.detected:
        return "--cluster: the other processes did not answer"
    if group.index == 0:
        return f"--num-processes {group.count}: not all of them have called {group.coordinator}"
    return f"--coordinator-address {group.coordinator}: process 0 did not answer"


def _end_unless(answered: threading.Event, silence: str) -> None:
    if not answered.wait(ANSWER_SECONDS):
        _leave(f"{silence} within {ANSWER_SECONDS} s; start all processes at about the same time, with one address", 1)


def _watch() -> None:
    """End this process once another one has failed or died. Runs in a thread of its own.

    `get_live_nodes` returns once every process that is alive has called it.
    """
    everyone = [*range(distributed.global_state.num_processes)]
    failed, gone = None, set()
    try:
        while not (failed or gone or _closing.wait(_WATCH_SECONDS)):
            gone = {*everyone} - {*_client().get_live_nodes(everyone)}
            failed = _read(_FAILED)
        if _closing.is_set():
            while _index() == 0 and len(_client().get_live_nodes(everyone)) > 1:
                time.sleep(0.05)
            _alone.set()
            return
    except Exception:  # the coordinator is gone, or this process has left it
        gone = {0}
    if _closing.is_set():
        return
    if failed:
        values = json.loads(failed)
        _leave(f"process {values['process']} has stopped: {values['text']}", values["status"])
    dead = ", ".join(map(str, sorted(gone)))
    _leave(f"process {dead} has died; start all processes again with --resume, or fewer with another --mesh", 1)


def _leave(text: str, status: int) -> None:
    """End this process at once, with one line. Does not return, unless the main thread is leaving."""
    if not _leaving.acquire(blocking=False):
        return
    print(f"error: {text}", file=sys.stderr, flush=True)
    if _index() == 0:
        time.sleep(2 * _WATCH_SECONDS)  # the others hear of it from this process
    else:
        with suppress(Exception):
            _client().shutdown()
    os._exit(status)


def _tell(error: Exception) -> None:
    """Tell the other processes why this one stops."""
    if not isinstance(error, UserError | ConfigError | OSError):
        # Perhaps a collective failed because another process died. The watch then says so and ends this process.
        _closing.wait(HEARTBEAT_SECONDS + 2)
    _leaving.acquire()
    text = _text(error)
    status = 2 if isinstance(error, ConfigError) else getattr(error, "status", 1)
    values = {"process": _index(), "text": text, "status": status}
    with suppress(Exception):
        _client().key_value_set(_FAILED, json.dumps(values))


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _close(watch: threading.Thread) -> None:
    """Leave the group. Process 0 waits for the others, because they need its coordination service until they leave."""
    _closing.set()
    if _index() == 0:
        _alone.wait(2 * HEARTBEAT_SECONDS)
    watch.join(HEARTBEAT_SECONDS)
    with suppress(Exception):
        jax.distributed.shutdown()


def _client() -> Any:
    return distributed.global_state.client


def _index() -> int:
    """`jax.process_index()`, which would start the devices if they were not started."""
    return distributed.global_state.process_id


def _read(name: str) -> str | None:
    try:
        return _client().key_value_try_get(name)
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def barrier(seconds: float = _LONG) -> None:
    """Wait until every process is here."""
    if several():
        _client().wait_at_barrier(f"moe_jax/{next(_names)}", int(1000 * seconds))


def exchange(text: str, seconds: float = _LONG) -> list[str]:
    """The texts that all processes give, in their order."""
    if not several():
        return [text]
    folder = f"moe_jax/exchange/{next(_names)}"
    _client().key_value_set(f"{folder}/{_index()}", text)
    barrier(seconds)
    given = {int(name.rpartition("/")[2]): value for name, value in _client().key_value_dir_get(folder)}
    return [given[index] for index in sorted(given)]


def agree_on(facts: Mapping[str, Any], seconds: float = _LONG) -> None:
    """Raise ConfigError in every process unless all give the same values. A name is shown to the user."""
    if not several():
        return
    everyone = [json.loads(text) for text in exchange(json.dumps(facts), seconds)]
    for name, expected in everyone[0].items():
        for index, given in enumerate(everyone):
            if given.get(name) != expected:
                raise ConfigError(
                    f"{name}: {given.get(name)} in process {index}, and {expected} in process 0; "
                    "all processes of a run must be started alike"
                )


class Together:
    """What this process has to tell the others at the next step: a signal, or an error of its own work.

    An error of one process must not leave the others in the middle of a step. So it is kept until all processes meet.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    def attempt[T](self, work: Callable[[], T]) -> T | None:
        """Do work of this process alone, such as reading data or writing a log. With several processes, an error is
        kept for `stop_at`, and None is returned."""
        if not several():
            return work()
        try:
            return work()
        except Exception as error:
            self._error = self._error or error
            return None

    def asked(self, signal: int | None) -> int | None:
        """The signal that came to any process, or _ERROR + its number if a process has an error. All processes call
        this at the same step, and all get the same answer."""
        if not several():
            return signal
        number = signal or 0
        if self._error is not None:
            number = _ERROR + _index()
            _client().key_value_set(f"moe_jax/error/{_index()}", _text(self._error), allow_overwrite=True)
        return largest(number) or None

    def raise_error(self, asked: int) -> None:
        """Raise the error that stops all processes: the own one, or a UserError that names the process. Returns if a
        signal stops them."""
        if self._error is not None:
            raise self._error
        if asked >= _ERROR:
            raise UserError(f"process {asked - _ERROR} has stopped: {_read(f'moe_jax/error/{asked - _ERROR}')}")
