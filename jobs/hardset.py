"""hardset: which images of a corpus are hard, which are mislabelled, and training on that knowledge."""

import ast
import importlib
import importlib.metadata
import pathlib
import sys
from collections.abc import Sequence

# A command is a module of this package with a COMMAND; it is imported only when it is asked for.
COMMANDS = (
    "demo",
    "curate",
    "embed",
    "fit",
    "score",
    "select",
    "decide",
    "report",
    "inspect",
    "export",
    "confusion",
    "neighbors",
    "train",
    "compare",
    "predict",
    "evaluate",
    "trust",
    "pack",
    "corrupt",
    "validate",
    "plan",
)


def main(argv: Sequence[str] | None = None) -> int:
    """`hardset COMMAND …`, the same as `python -m jobs.COMMAND …`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"hardset {importlib.metadata.version('hardset')}")
        return 0
    name = words[0].replace("-", "_")
    if name not in COMMANDS:
        print(f"hardset: error: no command {words[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"jobs.{name}").main(words[1:])


def usage() -> str:
    """One line per command: the first of its module's docstring, read without importing it."""
    lines = [__doc__ or "", "", "usage: hardset COMMAND [OPTIONS], hardset COMMAND --help, hardset --version", ""]
    for name in COMMANDS:
        source = pathlib.Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        lines.append(f"  {name:<10} {(ast.get_docstring(ast.parse(source)) or '').splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
