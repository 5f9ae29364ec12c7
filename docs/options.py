"""The options tables of docs/commands/*.md, written from the commands themselves.

python docs/options.py    (a test fails where a table is not the one that this writes)
"""

import dataclasses
import importlib
import re
import sys
import typing
from pathlib import Path

from docstring_parser import parse_from_object

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jobs.command import flag_of, option_help  # noqa: E402

PAGES = Path(__file__).with_name("commands")
START, END = "<!-- options: from the command itself, by docs/options.py -->", "<!-- /options -->"


def tables(name: str) -> str:
    """Markdown: a table of options for each group that the command `name` takes."""
    groups = importlib.import_module(f"jobs.{name}").COMMAND.groups
    return "\n\n".join(_table(group) for group in groups)


def _table(group: type) -> str:
    about, hints = option_help(group), typing.get_type_hints(group)
    title = parse_from_object(group).short_description
    lines = [f"**{title}**", "", "| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(group):
        flag = f"`{flag_of(field.name)}{_values(hints[field.name])}`"
        cells = (flag, _default(field), " ".join(about.get(field.name, "").split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _values(hint: typing.Any) -> str:
    """What follows the flag: nothing for a switch, the choices, or what kind of value."""
    if hint is bool:
        return ""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return " " + "|".join(map(str, parts))
    if typing.get_origin(hint) is list:
        return _values(parts[0]) + " …"
    if parts:
        return " " + "|".join(_values(part).strip() for part in parts)
    return " " + {str: "TEXT", int: "N", float: "X"}.get(hint, hint.__name__)


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return " ".join(f"`{value}`" for value in field.default_factory())
    if field.default is dataclasses.MISSING:
        return "required"
    return "" if field.default is None or field.default is False else f"`{field.default}`"


def with_tables(text: str, name: str) -> str:
    """A page with its tables between the two marks renewed. ValueError without marks."""
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{name}.md: no {START} … {END}")
    return pattern.sub(lambda _: f"{START}\n\n{tables(name)}\n\n{END}", text)


def main() -> None:
    """Renew the tables of every page."""
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        path.write_text(with_tables(text, path.stem), encoding="utf-8")


if __name__ == "__main__":
    main()
