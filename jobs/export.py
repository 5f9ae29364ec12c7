"""Columns of a run as files for cleanlab, DataComp, FiftyOne, numpy, or as one table.

hardset export --run RUN --to cleanlab --out issues.parquet
"""

import dataclasses
import sys
from typing import Any, Literal

from jobs.command import Command, say
from jobs.options import named
from pipelines.runs.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What goes where."""

    run: str
    """run directory: a local path, s3://bucket/path, or what pyarrow.fs or fsspec opens"""
    to: Literal["table", "labels", "cleanlab", "npy", "fiftyone", "datacomp"]
    """table, labels and cleanlab: one file; npy: embeddings.npy and metadata.parquet; fiftyone: images and labels.csv;
    datacomp: uids.npy"""
    out: str
    """the file to write (.parquet, .arrow or .csv; of datacomp .npy), of npy and fiftyone the folder; what is there is replaced"""
    columns: list[str] = dataclasses.field(default_factory=list)
    """GROUP.COLUMN … (default: every score of difficulty and confusion; of npy embeddings.embedding)"""
    subset: str | None = None
    """only the samples of this subset of the run"""
    predictions: str | None = None
    """cleanlab: judge labels by predictions/NAME (default: by difficulty.margin)"""
    threshold: float = 0.5
    """cleanlab: a label whose score, in [0, 1], is below this is an issue; 0.5 = another class is more likely"""
    uid: str = "sha256"
    """datacomp: sha256 (of the image, its first 128 bits) or json:FIELD (where the pool's json members hold the uid)"""
    json: bool = False
    """print one JSON object as the last line: counts, seconds, paths"""

    def __post_init__(self) -> None:
        named(self, ("run", "out"))
        if not 0 <= self.threshold <= 1:
            raise UserError(f"{self.threshold}: expected a fraction in [0, 1]", "threshold")


def export(options: ExportOptions) -> dict[str, Any]:
    """Write the files; reads one shard after the other, without Ray."""
    from pipelines import export as exporting
    from pipelines.runs import storage
    from pipelines.runs.progress import duration
    from pipelines.runs.record import Run

    run, out = Run.open(options.run), storage.absolute(options.out)
    if options.to in ("table", "labels", "cleanlab"):
        exporting.check_table_name(out)
    chosen = (options.columns, options.subset, options.predictions, options.threshold, options.uid)
    result = exporting.export(run, options.to, out, *chosen)
    issues = f", {result['issues']:,} of them label issues" if "issues" in result else ""
    say(f"export: {result['rows']:,} samples{issues}, {duration(result['seconds'])}: {', '.join(result['files'])}")
    return {"run": run.uri, **result}


COMMAND = Command("export", __doc__, (ExportOptions,), export)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
