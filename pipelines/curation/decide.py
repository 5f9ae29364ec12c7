"""Decide: a person's table of decisions -> `decisions/`, checked as a whole before a byte is written."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.curation.decision_files import Line, check_own_label, key_candidates, read_lines
from pipelines.runs import column_groups, columns, storage
from pipelines.runs import decisions as decided
from pipelines.runs.decisions import DROP, KEEP, RELABEL
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from pipelines.runs.tasks import in_order

EXAMPLES = 5  # conflicts that are told one by one
Place = tuple[int, int]  # shard and row


class Sample(NamedTuple):
    """A sample that a line names: its key, the label that it has now (-1 for none), what was decided of it before."""

    key: str
    label: int
    before: tuple[str, int, str] | None  # decision, label, by


def decide(run: Run, files: Sequence[str], by: str) -> dict[str, Any]:
    """Add the decisions of one or more tables to a run.

    Parameters
    ----------
    run : Run
        Embedded.
    files : sequence of str
        CSV files; see `decision_files`.
    by : str
        Who decided, where a file does not say it.

    Returns
    -------
    counts : dict
        decided (samples in the files), added, unchanged (in force already), keep, relabel, drop (of those added),
        conflicts (samples that somebody else had decided otherwise; the new decision counts), examples of these, and
        `in_force`: how many of each kind now.

    Raises
    ------
    UserError
        At the first line that is wrong: no such sample, more than one of that key, no such class, `keep` with another label,
        or two different decisions about one sample. Nothing is written then.
    """
    asked: dict[Place, tuple[str, Line]] = {}
    samples: dict[Place, Sample] = {}
    sources = {}
    for name in files:
        data = _read(name)
        sources[name] = decided.name_source(name.rpartition("/")[2], data)
        lines = read_lines(name, data)
        places, found = _find(run, name, lines)
        samples |= found
        for place, line in zip(places, lines):
            _add(asked, place, name, line, samples[place], run.classes)
    rows, conflicts, unchanged = [], [], 0
    for place, (name, line) in sorted(asked.items()):
        row = _row(place, line, samples[place], run.classes, by, f"{name} line {line.number}", sources[name])
        before = samples[place].before
        if before and _same(line, row, before):
            unchanged += 1
            continue
        if before and before[2] != row["by"] and _effect(*before[:2]) != _effect(row["decision"], row["label"]):
            conflicts.append(_told(run, row, before))
        rows.append(row)
    if rows:
        decided.append(run, pa.Table.from_pylist(rows, schema=columns.DECISIONS_SCHEMA))
    kinds = [row["decision"] for row in rows]
    return {
        "decided": len(asked),
        "added": len(rows),
        "unchanged": unchanged,
        **{kind: kinds.count(kind) for kind in decided.DECISIONS},
        "conflicts": len(conflicts),
        "examples": conflicts[:EXAMPLES],
        "in_force": decided.count(run),
    }


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except OSError as error:
        raise UserError(f"{uri}: cannot be read ({storage.first_line(error)})", "from_") from None


def _find(run: Run, name: str, lines: Sequence[Line]) -> tuple[list[Place], dict[Place, Sample]]:
    """The place of each line's sample, and these samples."""
    wanted = {candidate for line in lines if line.place is None for candidate in key_candidates(line.key)}
    shards: dict[int, list[int]] = {}
    for line in lines:
        if line.place is not None:
            shards.setdefault(line.place[0], []).append(line.place[1])
    keys = pa.array(sorted(wanted), pa.string())
    items = [(shard, shards.get(shard, [])) for shard in range(len(run.shards)) if wanted or shard in shards]
    samples: dict[Place, Sample] = {}
    by_key: dict[str, list[Place]] = {}
    for found in in_order(_samples_of_shard, items, run.uri, keys):
        for place, sample in found.items():
            samples[place] = sample
            if sample.key in wanted:
                by_key.setdefault(sample.key, []).append(place)
    return [_place_of(f"{name} line {line.number}", run, line, samples, by_key) for line in lines], samples


def _samples_of_shard(shard: int, rows: Sequence[int], run_uri: str, keys: pa.Array) -> dict[Place, Sample]:
    """Ray task: the samples of a shard with one of these rows or keys."""
    table = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["key", "row", "label"])
    chosen = pa.compute.or_(
        pa.compute.is_in(table["row"], pa.array(rows, pa.int64())), pa.compute.is_in(table["key"], keys)
    )
    history = decided.in_force(decided.read_history(run_uri, shard))
    before = {
        (entry["row"], entry["key"]): (entry["decision"], -1 if entry["label"] is None else entry["label"], entry["by"])
        for entry in history.to_pylist()
    }
    found = {}
    for entry in table.filter(chosen).to_pylist():
        then = before.get((entry["row"], entry["key"]))
        own = -1 if entry["label"] is None else entry["label"]
        found[(shard, entry["row"])] = Sample(entry["key"], then[1] if then else own, then)
    return found


def _place_of(
    where: str, run: Run, line: Line, samples: Mapping[Place, Sample], by_key: Mapping[str, list[Place]]
) -> Place:
    if line.place is not None:
        sample = samples.get(line.place)
        if sample is None:
            raise UserError(f"{where}: {run.uri} has no sample in shard {line.place[0]}, row {line.place[1]}", "from_")
        if line.key is not None and sample.key not in key_candidates(line.key):
            raise UserError(
                f"{where}: key {line.key!r}, but shard {line.place[0]}, row {line.place[1]} holds {sample.key!r}",
                "from_",
            )
        return line.place
    for candidate in key_candidates(line.key):
        places = by_key.get(candidate, [])
        if len(places) > 1:
            raise UserError(
                f"{where}: {len(places)} samples have the key {candidate!r}; name shard and row too", "from_"
            )
        if places:
            return places[0]
    raise UserError(f"{where}: {run.uri} has no sample with the key {line.key!r}", "from_")


def _add(
    asked: dict[Place, tuple[str, Line]],
    place: Place,
    name: str,
    line: Line,
    sample: Sample,
    classes: Sequence[str],
) -> None:
    """Note what a line asks of a sample; UserError if another line asked for something else."""
    where = f"{name} line {line.number}"
    this = _meaning(where, line, sample, classes)
    if place in asked:
        other_name, other = asked[place]
        before = _meaning(f"{other_name} line {other.number}", other, sample, classes)
        if before != this:
            first = f"line {other.number}" if other_name == name else f"{other_name} line {other.number}"
            raise UserError(f"{where}: another decision about {sample.key!r} than {first}", "from_")
        return
    asked[place] = (name, line)


def _meaning(where: str, line: Line, sample: Sample, classes: Sequence[str]) -> tuple[str, int]:
    """(decision, label) that a line asks for; -1 without a label."""
    label = None if line.label is None or line.decision == DROP else _class(where, line.label, classes)
    check_own_label(where, line.decision, sample.label, label)
    if line.decision == RELABEL and label is None:
        raise UserError(f"{where}: relabel without a label", "from_")
    own = sample.label if label is None else label
    decision = line.decision or (KEEP if own == sample.label else RELABEL)
    return decision, own


def _class(where: str, text: str, classes: Sequence[str]) -> int:
    """The class that a cell names: by its name, else by its index."""
    if text in classes:
        return list(classes).index(text)
    number = text.removesuffix(".0")
    if number.isascii() and number.isdecimal() and int(number) < len(classes):
        return int(number)
    known = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    raise UserError(f"{where}: no class {text!r}; the run has {known or 'no classes'}", "from_")


def _row(
    place: Place, line: Line, sample: Sample, classes: Sequence[str], by: str, where: str, source: str
) -> dict[str, Any]:
    decision, label = _meaning(where, line, sample, classes)
    return {
        "key": sample.key,
        "shard": place[0],
        "row": place[1],
        "decision": decision,
        "label": None if label < 0 else label,
        "by": line.by or by,
        "when": line.when or datetime.now(UTC),
        "source": source,
    }


def _effect(decision: str, label: int | None) -> tuple[bool, int]:
    """What a decision does to its sample: whether it is dropped, and its label."""
    return decision == DROP, -1 if label is None else label


def _same(line: Line, row: Mapping[str, Any], before: tuple[str, int, str]) -> bool:
    """Whether a line asks for what is in force already. A label alone doesn't say whether it is kept or new."""
    same_word = line.decision is None or row["decision"] == before[0]
    return same_word and _effect(row["decision"], row["label"]) == _effect(*before[:2])


def _told(run: Run, row: Mapping[str, Any], before: tuple[str, int, str]) -> str:
    """One line about a sample that somebody else decided otherwise."""

    def of(decision: str, label: int | None) -> str:
        named = label is not None and label >= 0 and decision == RELABEL
        return f"{decision} {run.classes[label]}" if named else decision

    return (
        f"{row['key']} (shard {row['shard']}, row {row['row']}): {before[2]} said {of(*before[:2])}, "
        f"{row['by']} says {of(row['decision'], row['label'])}"
    )


def undo(run: Run) -> dict[str, Any]:
    """Take back the last batch of decisions. UserError where there is none."""
    batch = decided.undo(run)
    if batch is None:
        raise UserError(f"{run.uri}: nothing was decided yet", "undo")
    return {"undone": batch.rows, "source": batch.source, "by": list(batch.by), "in_force": decided.count(run)}
