"""Does training with difficulty help to detect misclassified and foreign samples? As Tables 3 and 4 of Cui et al. 2023.

python -m benchmarks.evidence_detection --train RUN --test RUN --out FOLDER

Heads on embeddings by cross entropy, entropy regularisation (ER), ER at the mean strength of the difficulty-aware loss, and
that loss (eq. 9). Misclassification on --test. Out of distribution: two classes held out of training, whose test images are
then foreign, and scikit-learn's digits by the same encoder. Both runs must be embeddings of one encoder that is there. What
is finished in --out is used again: another folder for other settings.
"""

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.heads import (
    Head,
    add_head_options,
    difficulty_losses,
    encoder_of,
    predict_last,
    replace_section,
    spread,
    table,
    train_heads,
)
from jobs.embed import main as embed
from jobs.fit import main as fit
from jobs.options import RunOptions
from jobs.score import main as score
from jobs.session import ray_session
from pipelines.corpus.digits import write_digits
from pipelines.evaluation.detection import out_of_distribution
from pipelines.evaluation.outcomes import open_predictions
from pipelines.evaluation.sidebyside import Question, side_by_side
from pipelines.runs import column_groups, columns
from pipelines.runs.record import Run
from pipelines.training.loop import Recipe
from pipelines.training.objective import LossChoice
from pipelines.training.plan import Choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--report", type=Path, default=Path("benchmarks/detection.md"))
    parser.add_argument("--shards", type=int, help="of the training run, the first so many (default: all)")
    parser.add_argument("--held-out", type=int, nargs="+", default=[3, 9], help="classes that count as foreign")
    add_head_options(parser, epochs=10)
    asked = parser.parse_args()
    train, test = Run.open(asked.train), Run.open(asked.test)
    known = [label for label in range(len(train.classes)) if label not in asked.held_out]
    with ray_session(RunOptions(run=asked.test)):
        every = scored(part_of(train, asked.out / "train", list(range(len(train.classes))), asked.shards))
        fewer = scored(part_of(train, asked.out / "train-known", known, asked.shards))
        digits = embedded_digits(train, asked.out)
    inside = part_of(test, asked.out / "test-known", known)
    foreign = {"held-out classes": part_of(test, asked.out / "test-foreign", asked.held_out), "digits": digits}
    losses = difficulty_losses(every)
    heads = {name: heads_of(asked, losses, name) for name in ("all", "known")}
    for name, run in (("all", every), ("known", fewer)):
        train_heads(run, [head for of_loss in heads[name].values() for head in of_loss], asked.processes)
    with ray_session(RunOptions(run=asked.test)):
        found = misclassification(asked, test, heads["all"])
        outside = {name: ood(fewer, inside, other, heads["known"]) for name, other in foreign.items()}
    (asked.out / "results.json").write_text(json.dumps({"misclassification": found, "ood": outside}, indent=1))
    facts = f"{datetime.date.today()}, {asked.model} on {encoder_of(train)}, {rows_in(every):,} training images "
    facts += f"({rows_in(fewer):,} without classes {asked.held_out}), {asked.epochs} epochs, {asked.seeds} seeds; in percent\n"
    text = facts + table_3(found) + "".join(table_4(name, values) for name, values in outside.items())
    replace_section(asked.report, "tables", text)


def part_of(run: Run, folder: Path, classes: list[int], shards: int | None = None) -> Run:
    """A run of the first shards of another and of some of its classes, renumbered in the order given; rows stay."""
    if Run.exists(str(folder)):
        return Run.open(str(folder))
    number = np.full(len(run.classes), -1)
    number[classes] = np.arange(len(classes))
    part = Run.create(str(folder), run.config, run.shards[:shards])
    for shard in range(len(part.shards)):
        base = column_groups.read(run.uri, columns.EMBEDDINGS, shard)
        labels = number[base["label"].to_numpy()]
        kept = base.set_column(base.schema.get_field_index("label"), columns.LABEL, pa.array(labels)).filter(
            labels >= 0
        )
        facts = column_groups.facts(run.uri, columns.EMBEDDINGS, shard) | {"max_label": int(labels.max())}
        source = f"{facts.pop('source')} of classes {classes}"
        del facts["rows"]
        column_groups.write(part.uri, columns.EMBEDDINGS, shard, kept, source, **facts)
    part.settle_classes(part.embedding_facts())
    if "precision" in run.record:
        part.require_precision(run.record["precision"])
    part.finish_stage("embed", **{**run.stage("embed"), "rows": sum(f["rows"] for f in part.embedding_facts())})
    return part


def rows_in(run: Run) -> int:
    return sum(facts["rows"] for facts in run.embedding_facts())


def scored(run: Run) -> Run:
    words = ["--run", run.uri, "--mlflow", "none"]
    assert fit(words) == 0 and score(words) == 0, f"{run.uri} could not be scored"
    return Run.open(run.uri)


def embedded_digits(train: Run, out: Path) -> Run:
    """scikit-learn's digits by the encoder of `train`; their labels are of no use here."""
    shards, run = out / "digits-shards", str(out / "digits")
    if not shards.exists():
        write_digits(str(shards), flipped=0.0, corrupted=0.0)
    words = ["--shards", str(shards), "--run", run, "--encoder", train.config.encoder, "--label", "none"]
    assert embed([*words, "--mlflow", "none"]) == 0, "the digits could not be embedded"
    return Run.open(run)


def heads_of(
    asked: argparse.Namespace, losses: dict[str, tuple[LossChoice, str | None]], name: str
) -> dict[str, list[Head]]:
    """The trainings of each loss, one a seed."""
    recipe = Recipe(epochs=asked.epochs, schedule="cosine", weight_decay=5e-4)
    return {
        loss: [
            Head(
                str(asked.out / "heads" / f"{name}-{number}-{seed}"),
                choice,
                dataclasses.replace(recipe, seed=seed),
                Choices(model=asked.model, weights=weights, holdout=0.02),
            )
            for seed in range(asked.seeds)
        ]
        for number, (loss, (choice, weights)) in enumerate(losses.items())
    }


def predicted(run: Run, heads: dict[str, list[Head]]) -> dict[str, list[str]]:
    """Predictions of every head on a run; their names by loss."""
    for of_loss in heads.values():
        for head in of_loss:
            predict_last(run, head.folder, Path(head.folder).name)
    return {loss: [Path(head.folder).name for head in of_loss] for loss, of_loss in heads.items()}


def misclassification(asked: argparse.Namespace, test: Run, heads: dict[str, list[Head]]) -> dict[str, list[dict]]:
    """Per loss and seed: accuracy, ECE, and failure detection by MSP and by entropy."""
    whole = part_of(test, asked.out / "test", list(range(len(test.classes))))
    names = predicted(whole, heads)
    every = tuple(name for of_loss in names.values() for name in of_loss)
    record = side_by_side(whole, Question(every, bootstrap=0)).record
    kept = ("accuracy", "ece", "nll", "aurc", "selective")
    return {loss: [{key: record[name][key] for key in kept} for name in of_loss] for loss, of_loss in names.items()}


def ood(trained: Run, inside: Run, other: Run, heads: dict[str, list[Head]]) -> dict[str, list[dict]]:
    """Per loss and seed, per score: how well `inside`'s samples are told from `other`'s."""
    assert fit(["--run", inside.uri, "--gaussians", trained.uri, "--mlflow", "none"]) == 0
    inside, found = Run.open(inside.uri), {}
    names = predicted(inside, heads)
    predicted(other, heads)
    for loss, of_loss in names.items():
        pairs = [(open_predictions(inside, name), open_predictions(other, name)) for name in of_loss]
        found[loss] = [out_of_distribution(inside, ours, other, theirs)[0] for ours, theirs in pairs]
    return found


def table_3(found: dict[str, list[dict]]) -> str:
    rows = []
    for loss, records in found.items():
        overall = [spread([r[m] for r in records]) for m in ("accuracy", "ece")]
        by = [[r["selective"][kind] for r in records] for kind in ("msp", "entropy")]
        cells = [
            " / ".join(spread([s[m] for s in scores]) for scores in by) for m in ("fpr95", "auroc", "aupr_success", "aupr_error")
        ]  # fmt: skip
        rows.append([loss, *overall, *cells])
    head = [
        "loss",
        "accuracy",
        "ECE",
        *(f"{m}, MSP / entropy" for m in ("FPR95", "AUROC", "AUPR-success", "AUPR-error")),
    ]
    return "\nmisclassification detection (as Table 3)\n\n" + table(head, rows)


def table_4(name: str, found: dict[str, list[dict]]) -> str:
    rows = []
    for score_name in ("max_logit", "entropy", "msp", "rmd"):
        for loss, records in found.items():
            values = [[r[score_name][m] for r in records] for m in ("fpr95", "auroc", "aupr_in", "aupr_out")]
            if score_name == "rmd":  # of the embeddings: the same for every head
                rows.append([score_name, "any", *(f"{100 * v[0]:.2f}" for v in values)])
                break
            rows.append([score_name, loss, *map(spread, values)])
    return f"\nout of distribution: {name} (as Table 4)\n\n" + table(
        ["score", "loss", "FPR95", "AUROC", "AUPR-in", "AUPR-out"], rows
    )


if __name__ == "__main__":
    main()
