"""From a configuration to a finished run.

start.py      what a run starts from       initial_weights.py  its weights        quantize.py  `quantize`
session.py    opens or resumes a run       loop.py      the training loop, evaluations, checkpoints
programs.py   the compiled programs        step.py      one training step        loss.py   the training loss
state.py      the state, on device and host                            optimizers/   optimizers and schedule
header.py     what is printed              logging.py   records, summary.json
"""
