"""Reads the cases in tests/golden (made by other people's code; sources in tests/golden/README.md)."""

import functools
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "golden"


class Case:
    """One golden case: `case.inputs[name]`, `case.outputs[name]`, `case.params`."""

    def __init__(self, record: dict):
        self.file, self.name, self.params = record["file"], record["case"], record["params"]
        self.record = record
        source = record.get("inputs_from")
        self.inputs = _arrays(*source.split(":", 1), "in") if source else {}
        self.inputs |= _arrays(self.file, self.name, "in")
        self.outputs = _arrays(self.file, self.name, "out")

    def __repr__(self) -> str:
        return f"{self.file.removesuffix('.npz')}:{self.name}"


@functools.cache
def _load(file: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / file, allow_pickle=False) as archive:
        return dict(archive)


def _arrays(file: str, case: str, side: str) -> dict[str, np.ndarray]:
    prefix = f"{case}/{side}/"
    return {key.removeprefix(prefix): value for key, value in _load(file).items() if key.startswith(prefix)}


def cases(file: str, contains: str = "") -> list[Case]:
    """The cases of a file of tests/golden whose name contains `contains`, in order; at least one."""
    records = json.loads((FOLDER / "index.json").read_text())
    found = [Case(r) for r in records if r["file"] == file and contains in r["case"]]
    assert found, f"no golden case {file}:{contains}"
    return found
