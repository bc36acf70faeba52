"""Runs command lines of train.py one after the other in one process, and may interrupt one at a step.

A line of stdin is a JSON object: `argv`; `share`, the step before which training is interrupted as a share of its
steps, or null; and `dies`, whether an exception ends it there, or a request to stop that is saved. The answer is that
of `command_worker.run`, and `hit`, whether the run was interrupted.
"""

import json
import os
import signal
import sys
from typing import Any

from moe_jax.system import environment
from tests.reliability import command_worker

REQUEST: dict[str, Any] = {}
"""The line that runs now."""


class Died(BaseException):
    """The process is lost between two steps: what it holds in memory is gone."""


def interrupt_training() -> None:
    """Let a training loop stop where the request says."""
    from moe_jax.training import loop

    train = loop.train

    def interrupted(session: Any, signals: Any) -> None:
        share, step = REQUEST["share"], session.programs.step
        if share is None:
            return train(session, signals)

        def mortal(state: Any, batch: Any) -> Any:
            if int(state.step) == int(share * session.config.train.steps):
                REQUEST["hit"] = True
                if REQUEST["dies"]:
                    raise Died
                signals.stop_signal = signal.SIGTERM
            return step(state, batch)

        vars(session.programs)["step"] = mortal  # a frozen dataclass refuses an assignment
        return train(session, signals)

    loop.train = interrupted


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    environment.prepare_environment()
    command_worker.keep_programs()
    command_worker.draw_small()
    interrupt_training()
    for line in sys.stdin:
        REQUEST.clear()
        REQUEST.update(json.loads(line), hit=False)
        answer = command_worker.run(["train.py", *REQUEST["argv"]])
        print(json.dumps(answer | {"hit": REQUEST["hit"]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
