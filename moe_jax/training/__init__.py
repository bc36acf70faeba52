"""From a configuration to a finished run.

start.py      what a run starts from         initial_weights.py  its weights       quantize.py  `quantize`
session.py    opens or resumes a run         run.py       set-up, the loop with evaluations and checkpoints, report
fit.py        the settings that fit a device plan.py      a setting and the memory of its programs
programs.py   the compiled programs          step.py      one training step        loss.py   the training loss
gradients.py  on one device or a mesh        state.py     the state                optimizers/   and the schedule
data.py       its batches, its text          evaluate.py  validation and tasks     header.py     what is printed
logging.py    records, summary.json
"""
