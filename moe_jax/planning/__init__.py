"""What is known of a card before a run starts on it: `plan`, and `doctor --gpu`.

plans.py      the recorded plans: presets on well-known cards (plans.json); `benchmarks/record_plans.py` writes them
card.py       what JAX needs of this machine, and what its card reaches
selftest.py   whether a card computes what the CPU computes; each check is a process of its own (card_checks.py)
"""
