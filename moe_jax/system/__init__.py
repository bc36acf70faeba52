"""What the other folders need from the system. What runs before jax imports the standard library only.

errors.py        errors that a user can fix
environment.py   memory, cores, and the settings that must be made before jax is imported
files.py         atomic writes, locks, JSON, names of steps
terminal.py      what is printed, by rich: lines, tables, progress
signals.py       how a training ends at a signal
random_keys.py   random keys by purpose
machine.py       this machine: its name, and times measured on it
"""
