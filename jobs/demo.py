"""The whole way on real handwritten digits with known faults, offline, in a few minutes.

hardset demo
"""

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING

from jobs.command import Command, say
from jobs.curate import main as curate
from jobs.options import RunOptions, named
from jobs.session import ray_session
from pipelines.runs.errors import UserError

if TYPE_CHECKING:
    from pipelines.corpus.digits import Faults
    from pipelines.runs.record import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Where the demo works."""

    out: str = "demo"
    """folder for the shards, the run, MLflow's database and the contact sheet; what it holds of an older demo goes"""
    json: bool = False
    """print one JSON object as the last line"""
    ray_cpus: int | None = None
    """CPU cores of the local Ray (default: all)"""

    def __post_init__(self) -> None:
        named(self, ("out",))


def demo(options: DemoOptions) -> dict:
    """Write the corpus, curate it, and say how well the faults were found."""
    from pipelines.corpus.digits import findings, write_digits
    from pipelines.report.gallery import contact_sheet
    from pipelines.runs import joins, storage
    from pipelines.runs.record import Run

    out = pathlib.Path(options.out).resolve()
    marker = out / ".hardset-demo"
    for part in ("shards", "run"):
        if (out / part).exists() and not marker.exists():
            raise UserError(f"{options.out}: its {part}/ is not of an earlier demo; take another folder", "out")
        storage.remove_tree(str(out / part))
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()
    faults = write_digits(str(out / "shards"))
    run_uri, tracking = str(out / "run"), f"sqlite:///{out / 'mlflow.db'}"
    say("1,797 handwritten digits, 5 % of the labels flipped, 25 % noisy at five severities, 6 broken files")
    session = RunOptions(run=run_uri, mlflow=tracking, ray_cpus=options.ray_cpus)
    with ray_session(session):
        arguments = ["--shards", str(out / "shards"), "--run", run_uri, "--encoder", "pixels:8", "--mlflow", tracking]
        status = curate([*arguments, "--per-class", "--max-bad-fraction", "0.01"])
        if status:
            raise SystemExit(status)
        run = Run.open(run_uri)
        found = findings(joins.load(run_uri, _SCORES), faults)
        sheet = out / "hardest-and-easiest.png"
        contact_sheet(run).save(sheet)
    _show(found, run, faults)
    page = pathlib.Path(run.path("report", "index.html"))
    say(f"\ncontact sheet: {sheet}\nhard subset:   {run.path('subsets', 'hard')}\nMLflow:        {tracking}")
    say(f"report:        {page.as_uri()}")
    return found | {"run": run_uri, "contact_sheet": str(sheet), "report": str(page)}


_SCORES = ["difficulty.rmd", "difficulty.margin", "difficulty.md", "embeddings.embedding"]


def _show(found: dict, run: "Run", faults: "Faults") -> None:
    from pipelines.summary import quarantine_reasons

    auroc = found["auroc_flipped"]
    say("\nfinding the flipped labels, AUROC: " + ", ".join(f"{name} {value:.3f}" for name, value in auroc.items()))
    rows = " ".join(f"{value:8.2f}" for value in found["mean_rmd_by_severity"])
    say(f"mean rmd by severity of noise, 0 to 5:        {rows}")
    tenths = " ".join(f"{100 * value:5.1f}" for value in found["error_by_tenth"])
    say(f"classifier's error in %, hardest to easiest tenth: {tenths}")
    say(f"in quarantine, {len(faults.broken)} files broken on purpose:")
    for reason, entry in quarantine_reasons(run).items():
        say(
            f"  {entry['count']} × {reason} ({entry['example']['key']}: {faults.broken.get(entry['example']['key'], '?')})"
        )


COMMAND = Command("demo", __doc__, (DemoOptions,), demo)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
