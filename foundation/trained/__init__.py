"""A trained run of the real model, read from its folder and run by the hand-derived code alone."""


class Problem(Exception):
    """What is wrong with a run's folder, and what to do, in one line."""
