"""From a configuration to a finished run.

session.py    opens or resumes a run       loop.py      the training loop, evaluations, checkpoints, summary.json
programs.py   the compiled programs        step.py      one training step        loss.py   the training loss
state.py      the state on the device      counters.py  the state on the host    optimizers/   optimizers and schedule
"""
