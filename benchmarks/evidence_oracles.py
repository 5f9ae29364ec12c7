"""Which oracle knows when a classifier is wrong? Steep slope, cross entropy, focal and TCP side by side, as Table 1 of the
steep slope paper (Luo et al. 2021), beside the classifier's own confidence.

python -m benchmarks.evidence_oracles --train RUN --heldout RUN --test RUN --out FOLDER

Classifiers are heads on the embeddings of --train. Oracles are trained on --train, where the classifier has seen every
label, and on --heldout, where it has not. Cross entropy and focal also as the released code computes them: logits (n, 1)
against targets (n,) broadcast to (n, n), so every sample is pushed towards the share of right predictions.
"""

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

import torch

from benchmarks.heads import Head, encoder_of, predict_last, replace_section, spread, table, train_heads
from jobs.options import RunOptions
from jobs.session import ray_session
from ops.models import load_classifier
from ops.trust import trust_cross_entropy, trust_focal
from pipelines.evaluation.sidebyside import Question, draw, side_by_side, store_figures
from pipelines.evaluation.trust import OracleTraining, trust
from pipelines.runs.record import Run
from pipelines.training.loop import Recipe
from pipelines.training.objective import LossChoice
from pipelines.training.plan import Choices

METRICS = ("fpr95", "aupr_error", "aupr_success", "auroc", "tpr", "tnr", "kl", "bhattacharyya")


@dataclasses.dataclass(frozen=True)
class Released(OracleTraining):
    """The baselines as released: the loss of each z against every target of its batch."""

    broadcast: bool = True

    def per_sample(self, z: torch.Tensor, correct: torch.Tensor, true_class_prob: torch.Tensor) -> torch.Tensor:
        per_sample = trust_cross_entropy if self.loss == "cross_entropy" else lambda z, o: trust_focal(z, o, self.gamma)
        share = correct.mean()
        return share * per_sample(z, torch.ones_like(z)) + (1 - share) * per_sample(z, torch.zeros_like(z))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, what in (
        ("train", "run to train the classifiers on"),
        ("heldout", "run that they do not see"),
        ("test", ""),
    ):
        parser.add_argument(f"--{name}", required=True, help=what or "run to evaluate on, of the same encoder")
    parser.add_argument("--out", required=True, type=Path, help="folder for the classifiers")
    parser.add_argument("--report", type=Path, default=Path("benchmarks/oracles.md"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--classifiers", nargs="+", default=["linear", "mlp:512"])
    parser.add_argument("--alpha-neg", type=float, default=3.0)
    parser.add_argument("--processes", type=int, default=1, help="classifiers trained at a time")
    measure(parser.parse_args())


def oracles(asked: argparse.Namespace, seed: int) -> dict[str, OracleTraining]:
    """The losses compared, each with the same recipe."""
    same = {"epochs": asked.epochs, "seed": seed}
    return {
        "steep slope": OracleTraining(alpha_neg=asked.alpha_neg, **same),
        "CE": OracleTraining("cross_entropy", **same),
        "focal": OracleTraining("focal", **same),
        "TCP": OracleTraining("tcp", **same),
        "CE, released": Released("cross_entropy", **same),
        "focal, released": Released("focal", **same),
    }


def measure(asked: argparse.Namespace) -> None:
    test = Run.open(asked.test)
    places = {"its own training run": Run.open(asked.train), "shards it has not seen": Run.open(asked.heldout)}
    recipe = Recipe(epochs=asked.epochs, schedule="cosine")
    folders = {model: str(asked.out / f"classifier-{model.replace(':', '')}") for model in asked.classifiers}
    train_heads(
        places["its own training run"],
        [Head(folder, LossChoice(), recipe, Choices(model=m, holdout=0.02)) for m, folder in folders.items()],
        asked.processes,
    )
    text = (
        f"{datetime.date.today()}, heads on {encoder_of(test)}, oracles mlp:256 on the same embeddings, {asked.epochs} "
    )
    text += f"epochs, {asked.seeds} seeds, signed distance, alpha_pos 1, alpha_neg {asked.alpha_neg:g}; in percent but for kl "
    text += "and bhattacharyya; AUPR-error higher is better, as its score is negated\n"
    everything = {}
    for model, folder in folders.items():
        name = Path(folder).name
        rows, record = rows_of(asked, test, places, folder, name)
        everything[name] = record
        text += f"\nclassifier {model}, accuracy on the test run {100 * record[name]['accuracy']:.2f} %\n\n"
        text += table(["oracle trained on", "loss", "errors there", *METRICS], rows)
    (asked.out / "results.json").write_text(json.dumps(everything, indent=1))
    replace_section(asked.report, "tables", text)


def rows_of(asked: argparse.Namespace, test: Run, places: dict[str, Run], folder: str, name: str) -> tuple[list, dict]:
    """The rows of one classifier's table, and all its numbers."""
    classifier, sets, errors = load_classifier(Path(folder) / "last"), {}, {}
    for number, (place, run) in enumerate(places.items()):
        with ray_session(RunOptions(run=asked.test)):
            for seed in range(asked.seeds):
                for loss, training in oracles(asked, seed).items():
                    label = f"{name}-{number}-{loss.replace(', ', '-').replace(' ', '-')}-{seed}"
                    entry = trust(run, classifier, label, training, [test])
                    sets[(place, loss, seed)], errors[place] = label, entry["errors"] / entry["samples"]
    with ray_session(RunOptions(run=asked.test)):
        predict_last(test, folder, name)
        answer = side_by_side(test, Question((name,), trust=tuple(sets.values()), bootstrap=0))
    shown = [f"{label}-trust-histogram" for (_, _, seed), label in sets.items() if seed == 0]
    store_figures(test, {k: v for k, v in draw(answer).items() if k in (*shown, f"{name}-histogram")})
    msp = answer.record[name]["selective"]["msp"]
    rows = [["–", "MSP (no oracle)", "–", *cells([msp | {"tpr": None, "tnr": None}])]]
    for place in places:
        for loss in oracles(asked, 0):
            found = [answer.record[sets[(place, loss, seed)]] for seed in range(asked.seeds)]
            rows.append([place, loss, f"{100 * errors[place]:.2f}", *cells(found)])
    return rows, answer.record


def cells(records: list[dict]) -> list[str]:
    plain = ("kl", "bhattacharyya")
    return [spread([r[m] for r in records], 1 if m in plain else 100, 2) for m in METRICS]


if __name__ == "__main__":
    main()
