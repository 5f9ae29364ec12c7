"""JSON files of a training's folder, which are read without torch."""

import json
from typing import Any

from pipelines.runs import storage


def read_json(uri: str) -> Any:
    """A JSON file's content, None if there is none."""
    try:
        return json.loads(storage.read_bytes(uri))
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_json(uri: str, value: Any) -> None:
    """Write JSON, whole or not at all."""
    storage.write_text_atomic(uri, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
