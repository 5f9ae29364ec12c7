"""Conditions on samples: SQL's boolean expressions over the columns of a run, evaluated by DuckDB, a shard at a time.

A column is GROUP.COLUMN; a group whose name is no plain word is quoted ("predictions/mine".confidence). What may stand in
an expression is read off DuckDB's own parse tree: columns, constants, operators, CASE, casts and functions of their
arguments alone. A condition so says of each sample by itself whether it passes, the same in any cut of the corpus.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run

# Nothing but the rows that it is given: no file, no network, no extension, and no way to change that.
SETTINGS = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "threads": 1,
    "lock_configuration": True,
}
BEFORE = "SELECT 1 FROM samples WHERE "
# Kinds of expressions that see the sample's own row only.
OF_A_ROW = {"COLUMN_REF", "CONSTANT", "COMPARISON", "CONJUNCTION", "OPERATOR", "BETWEEN", "CASE", "CAST", "FUNCTION", "TYPE"}  # fmt: skip
IN_WORDS = {
    "SUBQUERY": "a query within it",
    "WINDOW": "a window over other samples",
    "STAR": "*",
    "PARAMETER": "a parameter",
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """An expression that has been checked against a run; `names` are its columns, GROUP.COLUMN, without quotes."""

    text: str
    names: tuple[str, ...]

    def holds(self, table: pa.Table) -> np.ndarray:
        """Whether each row passes, (n,) bool; null counts as no.

        Parameters
        ----------
        table : Table
            With a column under each of `names`.

        Raises
        ------
        UserError
            If a value cannot be computed, such as a cast of text that is no number.
        """
        return _evaluated(self.text, _by_group(table, self.names))


def condition(run: Run, text: str, field: str = "where") -> Condition:
    """Check an expression against what a run has.

    Parameters
    ----------
    run : Run
    text : str
        One boolean expression.
    field : str
        The option's field, for the error.

    Raises
    ------
    UserError
        For text that is no single expression, something that is not of a row alone, a column that the run does not have,
        or a value that is neither true nor false; it says at which character.
    """
    fields = fields_of(run, text, field)
    row = pa.table({name: pa.nulls(1, f.type) for name, f in fields.items()})
    _evaluated(text, _by_group(row, tuple(fields)), field)
    return Condition(text, tuple(fields))


def fields_of(run: Run, text: str, field: str = "where", later: Sequence[str] = ()) -> dict[str, pa.Field]:
    """The fields of an expression's columns by full name, but for those of groups that are made `later`; UserError without."""
    return {
        f"{group}.{name}": _field_of(run, group, name, _wrong(text, field, place))
        for (group, name), place in columns_of(text, field).items()
        if group not in later
    }


def columns_of(text: str, field: str = "where") -> dict[tuple[str, str], int]:
    """(group, column) of an expression, and the byte at which each first stands.

    UserError, with the place, where it is no expression or has parts that may not be used; no run is needed to tell.
    """
    tree, plain = _tree(f"{BEFORE}{text}\n"), _tree(f"{BEFORE}true")
    if tree["error"]:
        where = int(tree["position"]) - len(BEFORE) if tree.get("position") else None
        raise _wrong(text, field, where, tree["error_message"])
    expression = _taken(tree)
    _taken(plain)
    # All else being as it is around `true`, the text is one expression: no LIMIT, GROUP BY, UNION or second statement.
    if expression is None or _without_places(tree) != _without_places(plain):
        raise _wrong(text, field, None, "expected one boolean expression, such as difficulty.margin < 0")
    found: dict[tuple[str, str], int] = {}
    for node in _nodes(expression):
        place = node.get("query_location", 0) - len(BEFORE)
        if node["class"] not in OF_A_ROW:
            what = IN_WORDS.get(node["class"], node["class"].lower())
            raise _wrong(text, field, place, f"{what} may not be used, only what a sample's own columns say")
        if node["class"] == "FUNCTION" and node["function_name"].lower() not in _functions():
            what = f"{node['function_name']}() is no function of a sample's own columns"
            raise _wrong(text, field, place, what)
        if node["class"] == "COLUMN_REF":
            names = node["column_names"]
            if len(names) != 2:
                raise _wrong(text, field, place, f"{'.'.join(names)}: expected GROUP.COLUMN, such as difficulty.rmd")
            found.setdefault((names[0], names[1]), place)
    return found


def _tree(sql: str) -> dict[str, Any]:
    ((text,),) = _engine().execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    return json.loads(text)


def _taken(tree: dict[str, Any]) -> dict[str, Any] | None:
    """The expression after WHERE, taken out of its tree."""
    return tree["statements"][0]["node"].pop("where_clause", None)


def _without_places(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _without_places(value) for name, value in tree.items() if not name.startswith("query_location")}
    return [_without_places(value) for value in tree] if isinstance(tree, list) else tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every expression in a tree; nothing below those that may not be used, whose parts have other shapes."""
    if isinstance(tree, list):
        for value in tree:
            yield from _nodes(value)
    elif isinstance(tree, dict):
        if "class" in tree:
            yield tree
        for value in tree.values():
            yield from _nodes(value)


def _field_of(run: Run, group: str, name: str, wrong: UserError) -> pa.Field:
    """The field of a column that every shard has; else the error, completed."""
    facts = column_groups.all_facts(run.uri, group, len(run.shards)) if _is_group(group) else [None]
    lacking = sum(fact is None for fact in facts)
    if lacking == len(facts):
        there = ", ".join(groups_of(run))
        raise UserError(f"{wrong.message}: the run has no {group}/, it has {there}", wrong.field)
    if lacking:
        how = columns.how_to_make(group)
        raise UserError(f"{wrong.message}: {group}/ lacks {lacking} of {len(facts)} shards; {how}", wrong.field)
    schema = column_groups.schema(run.uri, group)
    if name not in schema.names:
        raise UserError(
            f"{wrong.message}: {group}/ has no column {name!r}, it has {', '.join(schema.names)}", wrong.field
        )
    return schema.field(name)


def _is_group(name: str) -> bool:
    """Whether a name can be that of a column group: a path below the run."""
    return all(part and part.strip(". ") == part for part in name.split("/"))


def groups_of(run: Run) -> list[str]:
    """The folders of a run that hold column groups, `predictions/NAME` among them."""
    found = set()
    for uri in storage.list_files(run.uri, ".parquet"):
        group, _, file = uri.removeprefix(run.uri).strip("/").rpartition("/")
        if file.removesuffix(".parquet").isdecimal() and group != columns.QUARANTINE:
            found.add(group)
    return sorted(found)


def _by_group(table: pa.Table, names: tuple[str, ...]) -> pa.Table:
    """A table whose columns are groups, structs of their columns: so GROUP.COLUMN means what it says."""
    of_group: dict[str, dict[str, pa.Array]] = {}
    for full in names:
        group, name = columns.split_name(full)
        of_group.setdefault(group, {})[name] = table[full].combine_chunks()
    parts = {g: pa.StructArray.from_arrays(list(c.values()), list(c)) for g, c in of_group.items()}
    # DuckDB cannot scan a table without columns, which a condition on nothing (`true`) leaves.
    return pa.table(parts | {"": pa.nulls(table.num_rows, pa.bool_())})


def _evaluated(text: str, samples: pa.Table, field: str = "where") -> np.ndarray:
    engine = _engine()
    engine.register("samples", samples)
    try:
        relation = engine.sql(f"SELECT (\n{text}\n) AS holds FROM samples")
        if str(relation.types[0]) not in ("BOOLEAN", '"NULL"', "NULL"):
            raise _wrong(text, field, None, f"is {relation.types[0]}, expected a condition that is true or false")
        holds = relation.fetchnumpy()["holds"]
    except duckdb.Error as error:
        raise _wrong(text, field, None, str(error)) from None
    finally:
        engine.unregister("samples")
    return np.ma.filled(np.ma.asarray(holds), False).astype(bool)


def _wrong(text: str, field: str, place: int | None, what: str = "") -> UserError:
    """The error of an expression, with the character (from 1) at which it is wrong."""
    before = text.encode()[: max(0, place or 0)].decode(errors="ignore")
    at = "" if place is None else f" at character {min(len(before), max(0, len(text) - 1)) + 1}"
    reason = f": {' '.join(what.split(chr(10) + chr(10))[0].split())}" if what else ""
    return UserError(f"{text!r}{at}{reason}", field)


@functools.cache
def _engine() -> duckdb.DuckDBPyConnection:
    """This process's DuckDB, which knows the rows that are registered, and nothing else."""
    return duckdb.connect(":memory:", config=SETTINGS)


@functools.cache
def _functions() -> frozenset[str]:
    """Names of functions whose value depends on their arguments alone."""
    rows = _engine().execute(
        "SELECT function_name FROM duckdb_functions() GROUP BY function_name "
        "HAVING bool_and(function_type = 'scalar' AND stability = 'CONSISTENT')"
    )
    return frozenset(name.lower() for (name,) in rows.fetchall())
