"""A table of decisions as people save it -> what each line says, with its line number; nothing of the run is read here.

The report's review page writes key, shard, row, decision, label, by, when. Tables of other tools are understood by the
names of their columns: cleanlab (is_label_issue, predicted_label), FiftyOne (filepath, tags), Label Studio (image, choice).
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from pipelines.runs.decisions import DECISIONS, KEEP
from pipelines.runs.errors import UserError

# What a column may be called, the likeliest name first; compared in lower case.
NAMES = {
    "key": ("key", "__key__", "filepath", "image", "file_name", "filename", "path"),
    "shard": ("shard",),
    "row": ("row",),
    "decision": ("decision", "tags", "action"),
    "label": ("label", "choice", "predicted_label", "suggested_label", "corrected_label", "ground_truth"),
    "issue": ("is_label_issue",),
    "by": ("by", "annotator", "completed_by"),
    "when": ("when", "updated_at", "created_at"),
}
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no", "")
_UPLOAD = re.compile(r"[0-9a-f]{8}-")  # what Label Studio puts before the name of an uploaded file
_WHOLE = re.compile(r"[0-9]+(\.0+)?")


class Line(NamedTuple):
    """One line of the table. Of `decision` and `label` at least one is given."""

    number: int
    key: str | None
    place: tuple[int, int] | None
    decision: str | None
    label: str | None
    by: str | None
    when: datetime | None


def read_lines(name: str, data: bytes) -> list[Line]:
    """The decisions of a CSV (or tab-separated) file.

    Parameters
    ----------
    name : str
        As it is named in an error.
    data : bytes
        UTF-8, with or without a byte order mark; lines end either way.

    Returns
    -------
    lines : list of Line
        In the file's order. Lines that decide nothing (an empty decision and label; `is_label_issue` false) are left out.

    Raises
    ------
    UserError
        Which names the file and the line.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not a text file in UTF-8 (byte {error.start})", "from_") from None
    separator = "\t" if "\t" in text.partition("\n")[0] else ","
    table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [cell.strip() for cell in next(table, [])]
        columns = _columns(name, header)
        return list(_lines(name, table, header, columns))
    except csv.Error as error:
        raise UserError(f"{name} line {table.line_num}: not a table in CSV ({error})", "from_") from None


def key_candidates(text: str) -> list[str]:
    """What the key of a sample may be, given a key or the path of its image; the text itself first."""
    found = [text]
    stem = re.sub(r"\.[^./\\]+$", "", text)
    base = re.split(r"[/\\]", stem)[-1]
    found += [stem, base, _UPLOAD.sub("", base, count=1)]
    if re.match(r"'[=+\-@\t\r]", text):  # as `hardset export` writes what a spreadsheet would take for a formula
        found.append(text[1:])
    return list(dict.fromkeys(candidate for candidate in found if candidate))


def _columns(name: str, header: Sequence[str]) -> dict[str, int]:
    lower = [cell.lower() for cell in header]
    twice = [cell for cell in lower if cell and lower.count(cell) > 1]
    if twice:
        raise UserError(f"{name} line 1: two columns are named {twice[0]}", "from_")
    found = {}
    for meaning, names in NAMES.items():
        match = next((n for n in names if n in lower), None)
        if match is not None:
            found[meaning] = lower.index(match)
    there = ", ".join(header) or "nothing"
    if "key" not in found and not {"shard", "row"} <= found.keys():
        raise UserError(f"{name} line 1: expected a column key, or shard and row, found {there}", "from_")
    if not {"decision", "label"} & found.keys():
        raise UserError(f"{name} line 1: expected a column decision or label, found {there}", "from_")
    return found


def _lines(name: str, table: Iterator[list[str]], header: Sequence[str], columns: Mapping[str, int]) -> Iterator[Line]:
    for cells in table:
        number = table.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise UserError(f"{name} line {number}: {len(cells)} cells, the first line has {len(header)}", "from_")
        values = {meaning: cells[at].strip() for meaning, at in columns.items()}
        line = _line(f"{name} line {number}", number, values)
        if line is not None:
            yield line


def _line(where: str, number: int, values: Mapping[str, str]) -> Line | None:
    if not _is_issue(where, values):
        return None
    decision, label = _decision(where, values.get("decision", "")), values.get("label") or None
    if decision is None and label is None:
        return None
    place = _place(where, values)
    if place is None and not values.get("key"):
        raise UserError(f"{where}: it names no sample", "from_")
    when = _when(where, values.get("when", ""))
    return Line(number, values.get("key") or None, place, decision, label, values.get("by") or None, when)


def _is_issue(where: str, values: Mapping[str, str]) -> bool:
    """cleanlab lists every sample and says which have an issue."""
    said = values.get("issue", "true").lower()
    if said not in TRUE + FALSE:
        raise UserError(f"{where}: is_label_issue is {said!r}, expected true or false", "from_")
    return said in TRUE


def _decision(where: str, text: str) -> str | None:
    """The one word of `keep`, `relabel` and `drop` in a cell; among FiftyOne's tags other words are no decision."""
    words = [word for word in re.split(r"[\s,;\[\]'\"|]+", text.lower()) if word]
    found = [word for word in dict.fromkeys(words) if word in DECISIONS]
    if len(found) > 1 or (words and not found and len(words) == 1):
        raise UserError(f"{where}: decision {text!r}, expected one of {', '.join(DECISIONS)}", "from_")
    return found[0] if found else None


def _place(where: str, values: Mapping[str, str]) -> tuple[int, int] | None:
    given = [values.get("shard", ""), values.get("row", "")]
    if not all(given):
        return None
    for name, text in zip(("shard", "row"), given):
        if not _WHOLE.fullmatch(text):
            raise UserError(f"{where}: {name} {text!r}, expected a whole number", "from_")
    return int(float(given[0])), int(float(given[1]))


def _when(where: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{where}: time {text!r}, expected one such as 2026-01-31T12:00:00Z", "from_") from None
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


def check_own_label(where: str, decision: str | None, own: int, asked: int | None) -> None:
    """UserError if a sample is to keep another label than it has."""
    if decision == KEEP and asked is not None and asked != own:
        raise UserError(
            f"{where}: keep, but with another label than the sample has; to change it write relabel", "from_"
        )
