"""Members of a confusion ensemble as heads on the embeddings column: all members of a worker train in one batched product.

What makes two members differ: their initial weights and the order of their data, as in the paper; with `bootstrap` each
also sees its own resampling of the corpus, without which linear heads, whose loss has one minimum, grow alike.
The rows stream through a window of memory. The order of the shards is drawn once per epoch for all members (they are read
once), within the window each member has its own order.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ops.head_ensemble import HeadEnsemble, HeadEntropies
from pipelines.confusion.members import Member, Placement, commit_epoch, load_epoch, load_resume, train_members
from pipelines.runs import cluster, column_groups, columns
from pipelines.runs.errors import UserError
from pipelines.runs.labels import labels_of
from pipelines.runs.record import Run
from pipelines.training.source import Source
from pipelines.training.survey import Survey, check_trainable, moments, survey

WINDOW_BYTES = 128 << 20  # of float32 features in memory; a corpus that fits is read once for all epochs


@dataclasses.dataclass(frozen=True)
class HeadTraining:
    """How heads are trained. The learning rate is constant, so that the first epochs of a long training are a short one."""

    model: str = "linear"
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    bootstrap: bool = False

    def __post_init__(self) -> None:
        kind, _, size = self.model.partition(":")
        if self.model != "linear" and not (kind == "mlp" and size.isdecimal() and int(size) > 0):
            raise UserError(f"{self.model}: on embeddings expected linear, or mlp:UNITS such as mlp:256", "model")
        if self.batch_size < 1:
            raise UserError(f"{self.batch_size}: at least 1", "batch_size")
        if not 0 < self.learning_rate <= 100:
            raise UserError(f"{self.learning_rate}: expected a number in (0, 100]", "lr")
        if not 0 <= self.weight_decay <= 100:
            raise UserError(f"{self.weight_decay}: expected a number in [0, 100]", "weight_decay")

    @property
    def hidden(self) -> int | None:
        return None if self.model == "linear" else int(self.model.partition(":")[2])

    def identity(self, epochs: int) -> list[Any]:
        """What of it a member is made from: not the number of epochs, as a longer training goes on from a shorter one."""
        return [dataclasses.asdict(self)]

    @property
    def form(self) -> str:
        """The folder's name of such members."""
        return "embeddings-" + self.model.replace(":", "-") + ("-bootstrap" if self.bootstrap else "")


@dataclasses.dataclass(frozen=True)
class Standardization:
    """Mean and standard deviation of each feature (1 where it does not vary): what heads see is (x − mean) / scale."""

    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, features: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((features.astype(np.float32) - self.mean) / self.scale)

    def state(self) -> dict[str, torch.Tensor]:
        return {"mean": torch.tensor(self.mean), "scale": torch.tensor(self.scale)}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What the heads learn from: the labelled samples of a run, and how their features are standardised."""

    found: Survey
    standardization: Standardization

    @property
    def shards(self) -> list[int]:
        """Those that hold a labelled sample."""
        return [shard for shard, count in enumerate(self.found.counts) if count]

    @property
    def num_classes(self) -> int:
        return len(self.found.class_counts)


def measure(run: Run) -> Corpus:
    """Labelled samples, class counts, mean and standard deviation of the features.

    Raises
    ------
    ValueError
        If the run has fewer than two classes with a labelled sample.
    """
    if len(run.classes) < 2:
        raise UserError(
            f"{run.uri}: {len(run.classes)} classes; the members of the ensemble learn from labels of at least 2. "
            "Train on a labelled run and give this one as `score_run`",
            "run",
        )
    run.embedding_facts()
    source = Source.of(run, input="embeddings")
    found = survey(source, len(run.classes))
    check_trainable(found, run.classes, None)
    return Corpus(found, Standardization(*moments(source, run.config.width)))


class Windows:
    """The labelled rows of a corpus as windows (features (n, d), labels (n,), counts (M, n)); counts are 1, or resampled."""

    def __init__(self, run_uri: str, corpus: Corpus, seeds: Sequence[int], bootstrap: bool, window_bytes: int):
        self.run_uri, self.corpus, self.seeds, self.bootstrap = run_uri, corpus, seeds, bootstrap
        self.window_rows = max(1, window_bytes // (4 * len(corpus.standardization.mean)))
        whole = corpus.found.num_samples <= self.window_rows
        self.cached = list(self._read(corpus.shards)) if whole else None

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """One pass; the order of the shards depends on the epoch alone."""
        if self.cached is not None:
            return iter(self.cached)
        order = np.random.default_rng([0, epoch]).permutation(len(self.corpus.shards))
        return self._read([self.corpus.shards[place] for place in order])

    def _read(self, shards: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        held, rows = [], 0
        for shard in shards:
            for part in self._shard(shard):
                held.append(part)
                rows += len(part[0])
                if rows >= self.window_rows:
                    yield _join(held)
                    held, rows = [], 0
        if held:
            yield _join(held)

    def _shard(self, shard: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        generators = [np.random.default_rng([seed, shard, 1]) for seed in self.seeds]
        given, start = labels_of(self.run_uri, shard).kept, 0
        for batch in column_groups.iter_batches(self.run_uri, columns.EMBEDDINGS, shard, ["embedding"]):
            labels = given[start : start + batch.num_rows]
            start += batch.num_rows
            known = labels >= 0
            # Poisson(1) counts are the bootstrap's, drawn row by row, so that no one needs to know how many rows there are.
            drawn = [g.poisson(1.0, len(labels)) if self.bootstrap else np.ones(len(labels)) for g in generators]
            features = self.corpus.standardization(columns.vectors(batch["embedding"])[known])
            counts = torch.from_numpy(np.stack(drawn)[:, known].astype(np.float32))
            yield features, torch.from_numpy(labels[known]), counts


def _join(parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    features, labels, counts = zip(*parts)
    return torch.cat(features), torch.cat(labels), torch.cat(counts, dim=1)


def train_heads(
    members: list[Member],
    run_uri: str,
    corpus: Corpus,
    training: HeadTraining,
    epochs: int,
    device: str,
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[list[Member]]:
    """Ray task: train members that are equally far, up to `epochs`; yields them after each epoch, when it is kept."""
    torch.set_num_threads(1)
    seeds, width = [m.seed for m in members], len(corpus.standardization.mean)
    ensemble = HeadEnsemble(seeds, width, corpus.num_classes, training.hidden).to(device)
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    if members[0].epochs:
        _resume(run_uri, members, ensemble, optimizer)
    windows = Windows(run_uri, corpus, seeds, training.bootstrap, window_bytes)
    for epoch in range(members[0].epochs, epochs):
        history = _train_epoch(ensemble, optimizer, windows, seeds, epoch, training.batch_size, device)
        for place, entry in enumerate(history):
            weights = ensemble.head(place) | corpus.standardization.state()
            resume = _moments(optimizer, place)
            members[place] = commit_epoch(run_uri, members[place], entry, weights, resume)
        yield list(members)


def _train_epoch(
    ensemble: HeadEnsemble,
    optimizer: torch.optim.Optimizer,
    windows: Windows,
    seeds: Sequence[int],
    epoch: int,
    batch_size: int,
    device: str,
) -> list[dict[str, float]]:
    """One epoch of all members; mean loss and accuracy of each, over what it saw, before it learnt from it."""
    lost, right, seen = (torch.zeros(len(seeds), dtype=torch.float64, device=device) for _ in range(3))
    for number, window in enumerate(windows.epoch(epoch)):
        features, labels, counts = (part.to(device) for part in window)
        orders = [np.random.default_rng([seed, epoch, number]).permutation(len(labels)) for seed in seeds]
        order = torch.from_numpy(np.stack(orders)).to(device)
        for start in range(0, len(labels), batch_size):
            rows = order[:, start : start + batch_size]
            loss, correct = ensemble.losses(features[rows], labels[rows])
            times = counts.gather(1, rows)
            optimizer.zero_grad(set_to_none=True)
            (loss * times).mean(dim=1).sum().backward()  # a sum over members: each gets its own gradient
            optimizer.step()
            lost += (loss.detach() * times).sum(dim=1)
            right += (correct * times).sum(dim=1)
            seen += times.sum(dim=1)
    shares = zip((lost / seen).tolist(), (right / seen).tolist())
    return [{"loss": loss, "accuracy": accuracy} for loss, accuracy in shares]


def _moments(optimizer: torch.optim.Optimizer, place: int) -> dict[str, torch.Tensor]:
    """One member's share of the optimiser's state."""
    state = {}
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        for name, value in optimizer.state[parameter].items():
            state[f"{number}.{name}"] = value if value.ndim == 0 else value[place].clone()
    return state


def _resume(run_uri: str, members: Sequence[Member], ensemble: HeadEnsemble, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimiser state of members that have finished epochs."""
    for place, member in enumerate(members):
        ensemble.load_head(place, load_epoch(run_uri, member, member.epochs))
    states = [load_resume(run_uri, member) for member in members]
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        names = [name.partition(".")[2] for name in states[0] if name.startswith(f"{number}.")]
        values = {name: [state[f"{number}.{name}"] for state in states] for name in names}
        optimizer.state[parameter] = {
            name: parts[0].clone() if parts[0].ndim == 0 else torch.stack(parts).to(parameter.device)
            for name, parts in values.items()
        }


def train(run: Run, members: list[Member], training: HeadTraining, epochs: int, place: Placement) -> list[Member]:
    """Train what of `members` is not trained up to `epochs`, split over Ray tasks; as `train_members` says."""
    corpus = measure(run)

    def start(pending: list[Member]) -> list[Any]:
        ray = cluster.connect()
        task = ray.remote(train_heads).options(
            num_cpus=1, num_gpus=1 if place.device == "cuda" else 0, max_retries=0, num_returns="streaming"
        )
        shared = ray.put(corpus)
        groups = _groups(pending, place.workers)
        return [task.remote(group, run.uri, shared, training, epochs, place.device) for group in groups]

    return train_members(run, members, epochs, start)


def _groups(members: Sequence[Member], workers: int) -> list[list[Member]]:
    """Members that are equally far train together, in as many groups as there are workers for them."""
    groups = []
    for epochs in sorted({m.epochs for m in members}):
        alike = [m for m in members if m.epochs == epochs]
        count = min(len(alike), max(1, workers))
        groups += [alike[start::count] for start in range(count)]
    return groups


class HeadScorer:
    """The entropies of all heads, in products of a batch of embeddings with many heads."""

    def __init__(self, run_uri: str, members: Sequence[Member], epochs: int, place: Placement):
        with ThreadPoolExecutor(16) as pool:  # on an object store each checkpoint is a round trip
            loads = [[pool.submit(load_epoch, run_uri, m, epoch) for m in members] for epoch in range(1, epochs + 1)]
            states = [[load.result() for load in epoch] for epoch in loads]
        self.mean, self.scale = states[0][0]["mean"], states[0][0]["scale"]
        heads = [[{k: v for k, v in s.items() if k not in ("mean", "scale")} for s in epoch] for epoch in states]
        self.entropies = HeadEntropies(heads, place.device, place.batch_rows)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Entropies (n, T) in bits of embeddings (n, d)."""
        x = torch.from_numpy(features.astype(np.float32))
        return self.entropies((x - self.mean) / self.scale).numpy()

    def shard(self, run_uri: str, shard: int) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """(keys, entropies) of a shard's batches."""
        names = [field.name for field in columns.KEYS] + ["embedding"]
        for batch in column_groups.iter_batches(run_uri, columns.EMBEDDINGS, shard, names, batch_rows=8192):
            yield batch, self(columns.vectors(batch["embedding"]))
