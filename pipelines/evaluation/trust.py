"""Trust: an oracle that learns when a frozen classifier is right -> the column group `trust/NAME`.

The oracle has a backbone of its own, a new head on the embeddings or a copy of a classifier that is trained on, and one
output z. Its targets are the classifier's own hits and misses on the training run: per sample, never broadcast.
"""

import copy
import dataclasses
import time
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch
from scipy.special import softmax
from torch import Tensor, nn

from ops.checks import UndefinedMetricError
from ops.models import Classifier, ClassifierSpec, build_classifier
from ops.selective import true_rates
from ops.trust import TRUST_LOSSES, signed_distance, steep_slope, tcp, trust_cross_entropy, trust_focal
from pipelines.evaluation.calibrate import classifier_digest
from pipelines.evaluation.detection import TRUST, trust_schema
from pipelines.evaluation.outcomes import PredictionSet, labelled_logits, open_predictions
from pipelines.evaluation.predict import Forward, check_fits, input_batches, shard_forward, shard_outputs
from pipelines.runs import cluster, column_groups, columns
from pipelines.runs.errors import UserError, concerning
from pipelines.runs.executor import Output, Stage, Task, write_shards
from pipelines.runs.labels import label_sources, labels_of
from pipelines.runs.record import Run, Shard, fingerprint
from pipelines.runs.tasks import in_order
from pipelines.training.checkpoints import read_classifier
from pipelines.training.ingest import Loader
from pipelines.training.source import Source
from pipelines.training.survey import moments, survey

ALPHA_NEG, ALPHA_POS = (1.0, 2.0, 3.0, 4.0, 5.0, 8.0), (0.5, 1.0, 2.0, 3.0)
HOLDOUT = 0.2  # of the training run, for the search of alphas


@dataclasses.dataclass(frozen=True)
class OracleTraining:
    """How an oracle is trained; the paper's values where it names one (Luo et al. 2021, section 5)."""

    loss: str = "steep_slope"
    alpha_pos: float = 1.0
    alpha_neg: float = 3.0
    gamma: float = 2.0
    signed: bool = True
    backbone: str = "mlp:256"
    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss == "ce":
            object.__setattr__(self, "loss", "cross_entropy")
        if self.loss not in TRUST_LOSSES:
            raise UserError(f"{self.loss}: expected one of {', '.join(TRUST_LOSSES)}", "loss")
        for name in ("alpha_pos", "alpha_neg", "epochs", "lr", "batch_size"):
            if getattr(self, name) <= 0:
                raise UserError(f"{getattr(self, name)}: expected more than 0", name)
        if self.gamma < 0 or self.weight_decay < 0:
            raise UserError(f"{self.gamma} and `weight_decay` {self.weight_decay}: at least 0", "gamma")

    def per_sample(self, z: Tensor, correct: Tensor, true_class_prob: Tensor) -> Tensor:
        """The loss of each sample, (n,): Luo et al. 2021, eq. 8, 4, 5 and 6."""
        if self.loss == "steep_slope":
            return steep_slope(z, correct, self.alpha_pos, self.alpha_neg)
        if self.loss == "cross_entropy":
            return trust_cross_entropy(z, correct)
        if self.loss == "focal":
            return trust_focal(z, correct, self.gamma)
        return tcp(z, true_class_prob)


class Oracle(nn.Module):
    """A backbone's features and one linear output: z (B,), as the signed distance to its hyperplane or as it is."""

    def __init__(self, backbone: Classifier, signed: bool):
        super().__init__()
        last = backbone.last_layer()
        if last is None:
            raise UserError(f"{backbone.spec.model}: ends in no linear layer that an oracle could replace", "backbone")
        self.backbone, self.signed = backbone, signed
        self.head = nn.Linear(last.in_features, 1)

    @property
    def input(self) -> str:
        return self.backbone.input

    @property
    def spec(self) -> ClassifierSpec:
        return self.backbone.spec

    def forward(self, batch: Tensor) -> Tensor:
        """z (B,); higher = the classifier is more likely right."""
        features = self.backbone.features(batch)
        if self.signed:
            return signed_distance(features, self.head.weight[0], self.head.bias[0])
        return self.head(features)[:, 0]


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the classifier made of each labelled sample, one array per shard."""

    rows: list[np.ndarray]
    correct: list[np.ndarray]  # bool
    true_class_prob: list[np.ndarray]  # float32

    @property
    def accuracy(self) -> float:
        return float(np.concatenate(self.correct).mean())

    def of(self, source: Source) -> tuple[Tensor, Tensor]:
        """correct and true-class probability (n,) of a source's samples, in its order."""
        wanted = in_order(_rows_of, [(shard,) for shard in range(len(source.shards))], source)
        places = [np.searchsorted(ours, rows) for ours, rows in zip(self.rows, wanted)]
        parts = [
            torch.from_numpy(np.concatenate([values[at] for values, at in zip(column, places)]).astype(np.float32))
            for column in (self.correct, self.true_class_prob)
        ]
        return parts[0], parts[1]


def _rows_of(shard: int, source: Source) -> np.ndarray:
    return source.keys(shard)["row"].to_numpy()


def targets(run: Run, model: Classifier, forward: Forward, predictions: str | None = None) -> Targets:
    """Where the classifier is right on a run: by itself, or as stored predictions have it (out-of-fold ones, say)."""
    if predictions is not None:
        stored = open_predictions(run, predictions)
        parts = in_order(_stored_targets, [(shard,) for shard in stored.shards], stored)
    else:
        items = [(shard, entry) for shard, entry in enumerate(run.shards)]
        parts = in_order(_shard_targets, items, run.uri, model, forward)
    rows, correct, probs = (list(values) for values in zip(*parts))
    if not sum(map(len, rows)):
        raise UserError(f"{run.uri}: no sample has a label, so none is known to be right or wrong", "run")
    return Targets(rows, correct, probs)


def _shard_targets(shard: int, entry: Shard, run_uri: str, model: Classifier, forward: Forward) -> tuple:
    rows = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["row"])["row"].to_numpy()
    labels = labels_of(run_uri, shard).kept
    if len(labels) and labels.max() >= model.num_classes:
        raise UserError(
            f"{run_uri}: label {labels.max()} in shard {shard}, the classifier knows {model.num_classes} classes"
        )
    return _outcome(rows, labels, shard_forward(shard, entry, run_uri, rows, model, forward))


def _stored_targets(shard: int, predictions: PredictionSet) -> tuple:
    rows = column_groups.read(predictions.run_uri, columns.EMBEDDINGS, shard, ["row"])["row"].to_numpy()
    logits, labels = labelled_logits(predictions, shard)
    return _outcome(rows, labels, logits)


def _outcome(rows: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    known = labels >= 0
    logits, labels = logits[known].astype(np.float64), labels[known]
    probs = softmax(logits, axis=1) if len(logits) else logits
    own = probs[np.arange(len(labels)), labels].astype(np.float32)
    return rows[known], (probs.argmax(axis=1) if len(probs) else labels) == labels, own


def new_oracle(run: Run, model: Classifier, training: OracleTraining) -> Oracle:
    """An untrained oracle: a new head on the run's embeddings, a copy of the classifier, or of another checkpoint."""
    torch.manual_seed(training.seed)
    if training.backbone == "classifier":
        backbone = copy.deepcopy(model)
    elif training.backbone == "linear" or training.backbone.startswith("mlp:"):
        config = run.config
        spec = ClassifierSpec(
            "embeddings", training.backbone, 2, width=config.width, encoder=config.encoder,
            encoder_fingerprint=config.encoder_fingerprint,
        )  # fmt: skip
        with concerning("backbone"):
            backbone = build_classifier(spec)
        backbone.standardize(*map(torch.as_tensor, moments(Source.of(run, input="embeddings"), config.width)))
    else:
        backbone = read_classifier(training.backbone, "backbone")
        check_fits(run, backbone, "backbone")
    return Oracle(backbone, training.signed)


def train_oracle(
    source: Source,
    counts: tuple[int, ...],
    oracle: Oracle,
    correct: Tensor,
    true_class_prob: Tensor,
    training: OracleTraining,
    device: str,
) -> tuple[Oracle, list[float]]:
    """Ray task: train an oracle on a source; returns it on the CPU, and the mean loss of each epoch.

    `correct` and `true_class_prob` (N,) are of the source's samples in its order.
    """
    torch.manual_seed(training.seed)
    torch.set_num_threads(1)
    oracle = copy.deepcopy(oracle).to(device).train()  # what comes out of the object store cannot be written to
    loader = Loader(source, counts, training.batch_size, seed=training.seed, width=oracle.spec.width or 0)
    optimizer = torch.optim.AdamW(oracle.parameters(), training.lr, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs * loader.steps)
    history = []
    for epoch in range(training.epochs):
        total = 0.0
        for batch in loader.epoch(epoch):
            z = oracle(batch.inputs.to(device))
            at = batch.index
            loss = training.per_sample(z, correct[at].to(device), true_class_prob[at].to(device)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        history.append(total / loader.steps)
    return oracle.cpu().eval(), history


def trained(
    run: Run, model: Classifier, found: Targets, training: OracleTraining, device: str, part: str = "all"
) -> tuple:
    """An oracle trained on a part of a run ("all", or "train": without the held-out samples), and its losses."""
    oracle = new_oracle(run, model, training)
    size = oracle.spec.image_size or 0
    source = Source.of(run, input=oracle.input, part=part, holdout=HOLDOUT, seed=training.seed, image_size=size)
    counts = survey(source, len(run.classes)).counts
    correct, probs = (tensor.clone() for tensor in found.of(source))
    ray = cluster.connect()
    task = ray.remote(train_oracle).options(num_cpus=1, num_gpus=1 if device == "cuda" else 0, max_retries=3)
    return ray.get(task.remote(source, counts, oracle, correct, probs, training, device))


def search_alphas(
    run: Run, model: Classifier, found: Targets, training: OracleTraining, device: str
) -> tuple[OracleTraining, list[dict]]:
    """The steep slope's alphas by the mean of TPR and TNR on held-out samples: first alpha_neg, then alpha_pos.

    Luo et al. 2021, section 5: alpha_neg first, with alpha_pos frozen, as wrong predictions are the rarer. The held-out
    samples are a fixed fifth of the run; the one measure of "best trade-off between TPR and TNR" is ours.
    """
    tried = []
    for name, values in (("alpha_neg", ALPHA_NEG), ("alpha_pos", ALPHA_POS)):
        options = [dataclasses.replace(training, **{name: value}) for value in values]
        scores = []
        for option in options:
            oracle, _ = trained(run, model, found, option, device, part="train")
            rates = _held_out_rates(run, oracle, found, option, device)
            tried.append({"alpha_pos": option.alpha_pos, "alpha_neg": option.alpha_neg, **rates})
            scores.append(rates["balanced"])
        training = options[int(np.argmax(scores))]
    return training, tried


def _held_out_rates(
    run: Run, oracle: Oracle, found: Targets, training: OracleTraining, device: str
) -> dict[str, float]:
    size = oracle.spec.image_size or 0
    source = Source.of(run, input=oracle.input, part="holdout", holdout=HOLDOUT, seed=training.seed, image_size=size)
    correct = found.of(source)[0].numpy() > 0
    forward = Forward(device)
    z = []
    for shard, entry in enumerate(run.shards):
        rows = column_groups.read(run.uri, columns.EMBEDDINGS, shard, ["row"])["row"].to_numpy()
        z.append(oracle_outputs(shard, entry, run.uri, rows, oracle, forward)[np.isin(rows, _rows_of(shard, source))])
    try:
        tpr, tnr = true_rates(np.concatenate(z), correct, 0.0)
    except UndefinedMetricError:
        raise UserError(
            "the held-out samples are all right or all wrong; take a run where the classifier errs",
            "search_alpha",
        ) from None
    return {"tpr": tpr, "tnr": tnr, "balanced": (tpr + tnr) / 2}


def oracle_outputs(
    shard: int, entry: Shard, run_uri: str, rows: np.ndarray, oracle: Oracle, forward: Forward
) -> np.ndarray:
    """z (n,) float32 of the samples `rows` of a shard."""
    oracle = oracle.to(forward.device).eval()
    batches = input_batches(shard, entry, run_uri, rows, oracle, forward)
    return shard_outputs(entry, rows, batches, oracle, forward.device)


class TrustShards:
    """The trust columns of a shard: `pipelines.runs.executor`'s worker."""

    def __init__(self, run_uri: str, oracle: Oracle, forward: Forward, facts: dict):
        self.run_uri, self.oracle, self.forward, self.facts = run_uri, oracle, forward, facts

    def run(self, task: Task) -> Output:
        base = column_groups.read(self.run_uri, columns.EMBEDDINGS, task.shard, [f.name for f in columns.KEYS])
        rows = base["row"].to_numpy()
        z = oracle_outputs(task.shard, task.entry, self.run_uri, rows, self.oracle, self.forward)
        table = base.append_column("trust", pa.array(z)).append_column("trusted", pa.array(z > 0))
        return Output(table.cast(trust_schema()), self.facts)


def trust(
    run: Run,
    model: Classifier,
    name: str,
    training: OracleTraining | None = None,
    evaluated: Sequence[Run] = (),
    forward: Forward | None = None,
    predictions: str | None = None,
    search: bool = False,
) -> dict:
    """Train an oracle on `run` and write `trust/NAME` of `run` and of each run in `evaluated`.

    Parameters
    ----------
    run : Run
        The only one that is trained on; its labels say where the classifier is right.
    model : Classifier
        Frozen.
    name : str
    training : OracleTraining
    evaluated : sequence of Run
        Further runs, of any domain; labels aren't needed there.
    forward : Forward
    predictions : str, optional
        Stored predictions of `run` to take as the classifier's instead: out-of-fold ones have honest errors.
    search : bool
        Choose the steep slope's alphas on held-out samples of `run` first.

    Returns
    -------
    entry : dict
        rows, errors and accuracy of the classifier on `run`, losses by epoch, alphas, seconds, skipped.

    Raises
    ------
    ValueError
        For a name that is none, embeddings that do not fit, no labels, or a classifier without a single error or hit.
    """
    training, forward = training or OracleTraining(), forward or Forward()
    columns.check_name("name", name)
    for each in (run, *evaluated):
        check_fits(each, model)
    _check_backbone(run, evaluated, model, training)
    if search and training.loss != "steep_slope":
        raise UserError(f"only steep_slope has alphas, the loss is {training.loss}", "search_alpha")
    started = time.monotonic()
    digest = classifier_digest(model)
    recipe = fingerprint(
        TRUST, digest, dataclasses.asdict(training), search, predictions, label_sources(run, run.embedding_facts()),
        _predicted(run, predictions),
    )  # fmt: skip
    group, before = f"{TRUST}/{name}", run.stage(f"trust/{name}")
    pending = any(column_groups.pending(each.uri, group, _sources(each, recipe)) for each in (run, *evaluated))
    if before and before["source"] == recipe and not pending:
        return before | {"skipped": True}
    found = targets(run, model, forward, predictions)
    _check_both(found)
    tried: list[dict] = []
    if search:
        training, tried = search_alphas(run, model, found, training, forward.device)
    oracle, losses = trained(run, model, found, training, forward.device)
    facts = {"loss": training.loss, "checkpoint_digest": digest, "trained_on": run.uri}
    for each in (run, *evaluated):
        _write(each, name, recipe, oracle, forward, facts)
    entry = {
        "source": recipe,
        "samples": int(sum(map(len, found.correct))),
        "errors": int(sum((~part).sum() for part in found.correct)),
        "accuracy_on_training_run": found.accuracy,
        **dataclasses.asdict(training),
        "losses": losses,
        "search": tried,
        "seconds": time.monotonic() - started,
    }
    run.finish_stage(f"trust/{name}", **entry)
    return entry | {"skipped": False}


def _check_backbone(run: Run, evaluated: Iterable[Run], model: Classifier, training: OracleTraining) -> None:
    """A head on embeddings needs one encoder throughout, whatever the classifier looks at."""
    if training.backbone == "classifier" and model.spec.input == "images":
        return
    for other in evaluated:
        if not run.config.same_embedding(other.config):
            raise UserError(
                f"{other.uri}: embedded with {other.config.encoder}, the oracle looks at embeddings of "
                f"{run.config.encoder}; embed it with the same encoder",
                "eval_run",
            )


def _check_both(found: Targets) -> None:
    if found.accuracy in (0.0, 1.0):
        outcome = "right" if found.accuracy else "wrong"
        raise UserError(
            f"the classifier is {outcome} on all {sum(map(len, found.correct))} samples, an oracle has nothing to "
            "learn; train it on shards that the classifier has not seen, or give out-of-fold `target_predictions`",
            "run",
        )


def _predicted(run: Run, predictions: str | None) -> list:
    if predictions is None:
        return []
    return [f and f["source"] for f in column_groups.all_facts(run.uri, f"predictions/{predictions}", len(run.shards))]


def _sources(run: Run, recipe: str) -> list[str]:
    return [fingerprint(recipe, f["source"]) for f in run.embedding_facts()]


def _write(run: Run, name: str, recipe: str, oracle: Oracle, forward: Forward, facts: dict) -> None:
    stage = Stage(
        f"trust/{name}",
        f"{TRUST}/{name}",
        _sources(run, recipe),
        TrustShards,
        (run.uri, oracle, forward, facts),
        rows=[f["rows"] for f in run.embedding_facts()],
        num_gpus=1 if forward.device == "cuda" else 0,
    )
    for _ in write_shards(run, stage, column_groups.pending(run.uri, stage.group, stage.sources)):
        pass
