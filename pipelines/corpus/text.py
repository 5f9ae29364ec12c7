"""The one reader of text that people write: label members, class lists, lists of shards."""

import codecs

from pipelines.runs import storage
from pipelines.runs.errors import UserError

# The longer mark first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode(data: bytes) -> str:
    """Text in UTF-8, or in the encoding that a byte order mark at its start names, without the mark.

    Raises
    ------
    ValueError
        Where the bytes are no such text.
    """
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError:
        raise ValueError(f"not {encoding.upper()} text") from None


def lines(text: str) -> list[str]:
    """The lines, without white space around them; LF, CR LF or CR end a line and nothing else does."""
    parts = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [part.strip() for part in (parts[:-1] if parts[-1] == "" else parts)]


def read_names(uri: str, field: str = "classes") -> tuple[str, ...]:
    """Class names from a text file, one a line: the name in line n is that of label n − 1.

    Raises
    ------
    UserError
        The file cannot be read as text, holds no name, a blank line before its last name, or a name twice; the message
        says in which line, as any of these would give later names other labels.
    """
    try:
        names = lines(decode(storage.read_bytes(uri)))
    except (OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be read as a text file ({storage.first_line(error)})", field) from None
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{uri}: it holds no class name; one a line is expected", field)
    if "" in names:
        raise UserError(
            f"{uri}: line {names.index('') + 1} is blank, so later names would get other labels; "
            "delete it, or give the unused label a name",
            field,
        )
    check_unique(names, f"{uri}: ", field)
    return tuple(names)


def check_unique(names: list[str] | tuple[str, ...], where: str = "", field: str = "classes") -> None:
    """UserError, with the lines, where two classes have one name."""
    first: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if name in first:
            raise UserError(
                f"{where}{name!r} is the name in line {first[name]} and in line {line}; each class needs a name of its own",
                field,
            )
        first[name] = line
