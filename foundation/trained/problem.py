"""What can be wrong with a run's folder, said in one line."""


class Problem(Exception):
    """The message is one line: what is wrong, and what to do."""
