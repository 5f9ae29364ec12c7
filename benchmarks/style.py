"""The shape of the code in numbers: `make style`.

    python benchmarks/style.py [FOLDER]      (default: this checkout)

Lines are physical lines; a function's length is from `def` to its last line, without its docstring. "Array functions" are
the public functions and methods of `ops/` that have a parameter or a result annotated as an array or a tensor; their
docstring "states shapes" when it has a `(n,`-like tuple, `shape` or the word scalar.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SOURCE = ("ops", "pipelines", "jobs")
ARRAY = re.compile(r"ndarray|Tensor|ArrayLike|Array\b")
SHAPE = re.compile(r"\(\w+,[^)]*\)|\bshapes?\b|\bscalars?\b|\bfloat\b")
CLOSENESS = re.compile(r"assert_allclose|assert_array|approx\(|allclose|\.equal\(|assert_array_equal")
MOCKS = re.compile(r"\bMock\(|MagicMock|mock\.patch")
SETATTR = re.compile(r"monkeypatch\.setattr")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    """Modules of the folders, sorted."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method of a module, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(function: Function) -> int:
    """Lines without the docstring."""
    body = function.body
    documented = bool(ast.get_docstring(function))
    doc = body[0].end_lineno - body[0].lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - doc


def public_array_functions(tree: ast.Module) -> Iterator[Function]:
    """Public functions of the module, and public methods of its public classes, that take or give arrays."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for parent in [tree, *classes]:
        for node in parent.body:
            if isinstance(node, Function) and not node.name.startswith("_") and ARRAY.search(_signature(node)):
                yield node


def _signature(function: Function) -> str:
    notes = [argument.annotation for argument in [*function.args.args, *function.args.kwonlyargs]]
    return " ".join(ast.unparse(note) for note in [*notes, function.returns] if note is not None)


def spread(values: list[int]) -> str:
    """median, p90 and largest."""
    return f"{np.median(values):.0f} · {np.percentile(values, 90):.0f} · {max(values)}"


def longest(named: dict[str, int], count: int = 5) -> str:
    """The outliers by name."""
    top = sorted(named.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {value}" for name, value in top)


def measure(root: Path) -> list[tuple[str, str]]:
    """(what, value) of each line of the table."""
    sources, tests = python_files(root, SOURCE), python_files(root, ("tests",))
    lines = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in sources}
    test_text = [path.read_text() for path in tests]
    trees = {path: ast.parse(path.read_text()) for path in sources}
    bodies = {
        f"{path.relative_to(root)}:{function.name}": length(function)
        for path, tree in trees.items()
        for function in functions(tree)
    }
    arrays = [f for path, tree in trees.items() if path.parts[-2] == "ops" for f in public_array_functions(tree)]
    stating = [function for function in arrays if SHAPE.search(ast.get_docstring(function) or "")]
    missing = sorted({function.name for function in arrays} - {function.name for function in stating})
    count = sum(f.name.startswith("test_") for text in test_text for f in functions(ast.parse(text)))
    close = sum(len(CLOSENESS.findall(text)) for text in test_text)
    mocks, setattrs = (sum(len(pattern.findall(text)) for text in test_text) for pattern in (MOCKS, SETATTR))
    test_lines, source_lines = sum(len(text.splitlines()) for text in test_text), sum(lines.values())
    return [
        ("modules", f"{len(lines)}, {source_lines:,} lines"),
        ("lines per module: median · p90 · most", spread(list(lines.values()))),
        ("longest modules", longest(lines)),
        ("functions", f"{len(bodies):,}"),
        ("lines per function: median · p90 · most", spread(list(bodies.values()))),
        ("longest functions", longest(bodies)),
        ("array functions of ops/ whose docstring states shapes", f"{len(stating)} of {len(arrays)}"),
        ("those that do not", ", ".join(missing) or "none"),
        ("numeric closeness or equality assertions per test function", f"{close / count:.2f} ({close} in {count})"),
        ("mocks · attributes set by monkeypatch (block sizes, waiting times) in tests", f"{mocks} · {setattrs}"),
        ("test lines to source lines", f"{test_lines / source_lines:.2f} ({test_lines:,} to {source_lines:,})"),
    ]


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    print("| measure | value |\n|---|---|")
    for what, value in measure(root):
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
