"""The two errors that a command reports in one line; every other error is a bug and keeps its traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: an option's value, a file, a run. Exit status 2.

    Parameters
    ----------
    message : str
        What was found, and what would do. It names no command-line flag.
    field : str, optional
        The field of the options that the mistake concerns, such as `max_bad_fraction`; `jobs` turns it into the flag.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.message, self.field = message, field

    def __str__(self) -> str:
        return f"{self.field} {self.message}" if self.field else self.message

    def __reduce__(self) -> tuple:
        return type(self), (self.message, self.field)  # it travels out of Ray tasks


class StageFailed(RuntimeError):
    """A stage could not end well; the message says what failed and what is kept. Exit status 1."""
