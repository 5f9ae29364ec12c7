"""The ranks of margin among a run's samples, which `label_error` is made of: a file that says what it was made from."""

import io
import zipfile

from ops.ranks import RankTable
from pipelines.runs import storage
from pipelines.runs.record import Run, fingerprint

FILE = "percentiles/difficulty.margin.npz"


def source_of(gaussians: str | None, scored: str | None) -> str:
    """What ranks are made from: the Gaussians, and the embeddings and labels scored where these are another run's."""
    return fingerprint("ranks of margin", gaussians, scored)


def save(run: Run, table: RankTable, source: str) -> None:
    """Store the ranks with a run, whole or not at all."""
    with storage.write_atomic(run.path(FILE)) as stream:
        table.save(stream, source)


def load(run: Run, source: str) -> RankTable | None:
    """The ranks stored with a run, if they were made from this."""
    try:
        table, made_from = RankTable.load(io.BytesIO(storage.read_bytes(run.path(FILE))))
    except (FileNotFoundError, KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile):
        return None
    return table if made_from == source else None
