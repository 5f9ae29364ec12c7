"""The two errors that a command reports in one line; every other error is a bug and keeps its traceback."""

import contextlib
import re
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in what the user gave: an option's value, a file, a run. Exit status 2.

    Parameters
    ----------
    message : str
        The value and what is wrong with it, `VALUE: expected …`, or a sentence: what was found, and what would do. It
        names no command-line flag; another option stands in it as its field in backticks, such as `overwrite`.
    field : str, optional
        The field of the options that the mistake concerns, such as "max_bad_fraction"; `jobs` turns it, and what stands
        in backticks, into flags.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.message, self.field = message, field

    def __str__(self) -> str:
        return self.message if self.field is None else self.told(self.field)

    def told(self, name: str) -> str:
        """The message behind the name of what it concerns: `NAME VALUE: expected …`, or `NAME: a sentence`."""
        begins_with_a_value = re.match(r"""(\S+|'[^']*'|"[^"]*"): """, self.message)
        return name + (" " if begins_with_a_value else ": ") + self.message

    def __reduce__(self) -> tuple:
        return type(self), (self.message, self.field)  # it travels out of Ray tasks


class StageFailed(RuntimeError):
    """A stage could not end well; the message says what failed and what is kept. Exit status 1."""


@contextlib.contextmanager
def concerning(*fields: str) -> Iterator[None]:
    """Make a ValueError of `ops`, which begins with the parameter that it is about, the user's mistake in that field.

    Parameters
    ----------
    fields : str
        The options behind the parameters of the call in the body, called as these are; the first one where the error
        names none of them.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        text = str(error)
        field = next((name for name in fields if re.match(rf"{name}\b", text)), None)
        message = text if field is None else text[len(field) :].lstrip(": ")
        raise UserError(message, field or fields[0]) from error
