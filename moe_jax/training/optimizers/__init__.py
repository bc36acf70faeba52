"""The optimizers and the learning-rate schedule.

`factory.make_optimizer` makes the optimizer that a configuration names, and `factory.learning_rate` the schedule. To
add an optimizer: write its update rule in a file here, add a branch to `make_optimizer`, and add its name to
`config.train.OptimizerKind`. In a skipped step its state must not change: wrap the rule in `adam.skippable`, or let its
update obey `taken`.
"""
