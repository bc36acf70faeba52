"""The two errors that a user can mend, and how they show a long text. `cli.main` prints each as one line, without a
traceback."""


class ConfigError(ValueError):
    """A wrong value of a flag, or a wrong combination of flags. Exit status 2.

    The text is one line. It names the flag, the value and what is allowed.
    """


class FieldError(ConfigError):
    """A ConfigError with the name of its field. A value from a settings file is then reported by file, not by flag."""

    def __init__(self, section: str, name: str, given: str, problem: str) -> None:
        super().__init__(f"{given}: {problem}")
        self.field = (section, name)
        self.problem = problem


class UserError(Exception):
    """A failure that the user can mend. Exit status 1.

    The text is one line. It says what is wrong, with the value, and what to do.
    """


def shortened(text: str, most: int = 60) -> str:
    """A text for an error: its beginning, of at most `most` characters. It ends with "..." where it is cut."""
    return text if len(text) <= most else text[: most - 3] + "..."
