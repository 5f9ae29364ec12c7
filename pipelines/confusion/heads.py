"""Members of a confusion ensemble as heads on the embeddings column: all members of a worker train in one batched product.

What makes two members differ: their initial weights and the order of their data, as in the paper; with `bootstrap` each
also sees its own resampling of the corpus, without which linear heads, whose loss has one minimum, grow alike.
The rows stream through a window of memory. The order of the shards is drawn once per epoch for all members (they are read
once), within the window each member has its own order.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import ray
import torch

from ops.head_ensemble import HeadEnsemble
from pipelines import columns, storage
from pipelines.confusion.members import Member, commit_epoch, find_member, load_epoch, load_resume, say_progress
from pipelines.run import Run, StageFailed
from pipelines.tasks import in_order

WINDOW_BYTES = 128 << 20  # of float32 features in memory; a corpus that fits is read once for all epochs
TRIES = 3


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
            raise ValueError(f"--model {self.model}: on embeddings expected linear, or mlp:UNITS such as mlp:256")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: at least 1")
        if not 0 < self.learning_rate <= 100:
            raise ValueError(f"--lr {self.learning_rate}: expected a number in (0, 100]")
        if not 0 <= self.weight_decay <= 100:
            raise ValueError(f"--weight-decay {self.weight_decay}: expected a number in [0, 100]")

    @property
    def hidden(self) -> int | None:
        return None if self.model == "linear" else int(self.model.partition(":")[2])

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
    """What the heads learn from: the shards that hold labelled rows, their number of rows, class counts."""

    shards: list[int]
    class_counts: np.ndarray
    standardization: Standardization

    @property
    def rows(self) -> int:
        return int(self.class_counts.sum())

    @property
    def commonest(self) -> float:
        """Share of the commonest class: what a model is right about that has learnt nothing."""
        return float(self.class_counts.max() / self.rows)


def shard_sums(shard: int, run_uri: str, num_classes: int, pilot: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    """Ray task: class counts, rows, and (2, d) sums of features about the pilot and of their squares, of one shard."""
    counts, rows, sums = np.zeros(num_classes, np.int64), 0, np.zeros((2, len(pilot)))
    for batch in columns.iter_batches(run_uri, columns.EMBEDDINGS, shard, ["label", "embedding"]):
        labels = columns.labels_or_minus_one(batch["label"])
        counts += np.bincount(labels[labels >= 0], minlength=num_classes)
        away = columns.vectors(batch["embedding"]).astype(np.float64) - pilot
        sums += np.stack([away.sum(axis=0), (away**2).sum(axis=0)])
        rows += len(labels)
    return counts, rows, sums


def measure(run: Run) -> Corpus:
    """One pass over the embeddings: labelled rows, class counts, mean and standard deviation of the features.

    Raises
    ------
    ValueError
        If the run has fewer than two classes with a labelled sample.
    """
    if len(run.classes) < 2:
        raise ValueError(
            f"--run {run.uri}: {len(run.classes)} classes; the members of the ensemble learn from labels of at least 2. "
            "Train on a labelled run and give this one as --score-run"
        )
    first = next(s for s, facts in enumerate(run.embedding_facts()) if facts["rows"])
    sample = next(columns.iter_batches(run.uri, columns.EMBEDDINGS, first, ["embedding"]))
    pilot = columns.vectors(sample["embedding"]).astype(np.float64).mean(axis=0)
    counts, rows, sums, shards = np.zeros(len(run.classes), np.int64), 0, np.zeros((2, len(pilot))), []
    every = [(shard,) for shard in range(len(run.shards))]
    for shard, (theirs, size, part) in enumerate(in_order(shard_sums, every, run.uri, len(run.classes), pilot)):
        counts, rows, sums = counts + theirs, rows + size, sums + part
        if theirs.any():
            shards.append(shard)
    if (counts > 0).sum() < 2:
        raise ValueError(f"--run {run.uri}: labelled samples of {(counts > 0).sum()} class, at least 2 are needed")
    mean = sums[0] / rows
    deviation = np.sqrt(np.maximum(sums[1] / rows - mean**2, 0))
    scale = np.where(deviation > 1e-6 * np.abs(pilot + mean), deviation, 1.0)
    return Corpus(shards, counts, Standardization((pilot + mean).astype(np.float32), scale.astype(np.float32)))


class Windows:
    """The labelled rows of a corpus as windows (features (n, d), labels (n,), counts (M, n)); counts are 1, or resampled."""

    def __init__(self, run_uri: str, corpus: Corpus, seeds: Sequence[int], bootstrap: bool, window_bytes: int):
        self.run_uri, self.corpus, self.seeds, self.bootstrap = run_uri, corpus, seeds, bootstrap
        self.window_rows = max(1, window_bytes // (4 * len(corpus.standardization.mean)))
        whole = corpus.rows <= self.window_rows
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
        for batch in columns.iter_batches(self.run_uri, columns.EMBEDDINGS, shard, ["label", "embedding"]):
            labels = columns.labels_or_minus_one(batch["label"])
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
    ensemble = HeadEnsemble(seeds, width, len(corpus.class_counts), training.hidden).to(device)
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


def train(
    run: Run, members: list[Member], corpus: Corpus, training: HeadTraining, epochs: int, device: str, workers: int
) -> list[Member]:
    """Train what of `members` is not trained up to `epochs`, split over Ray tasks; the members in their order.

    Raises
    ------
    StageFailed
        If a worker dies again and again. Finished epochs are kept.
    """
    known = {m.seed: m for m in members}
    for _ in range(TRIES):
        pending = [m for m in known.values() if m.epochs < epochs]
        if not pending:
            return [known[m.seed] for m in members]
        for member in pending:
            if not member.epochs:  # what lies there was made from something else
                storage.remove_tree(run.path(member.folder))
        try:
            for group in _side_by_side(_groups(pending, workers), run.uri, corpus, training, epochs, device):
                known |= {member.seed: member for member in group}
                say_progress(group, epochs)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError):
            known = {m.seed: find_member(run.uri, m.form, m.seed, m.source) for m in members}
    if any(m.epochs < epochs for m in known.values()):
        raise StageFailed(f"confusion: training workers died {TRIES} times; finished epochs are kept, start it again")
    return [known[m.seed] for m in members]


def _groups(members: Sequence[Member], workers: int) -> list[list[Member]]:
    """Members that are equally far train together, in as many groups as there are workers for them."""
    groups = []
    for epochs in sorted({m.epochs for m in members}):
        alike = [m for m in members if m.epochs == epochs]
        count = min(len(alike), max(1, workers))
        groups += [alike[start::count] for start in range(count)]
    return groups


def _side_by_side(
    groups: list[list[Member]], run_uri: str, corpus: Corpus, training: HeadTraining, epochs: int, device: str
) -> Iterator[list[Member]]:
    """Yield each group after each of its epochs, whichever comes first."""
    task = ray.remote(train_heads).options(
        num_cpus=1, num_gpus=1 if device == "cuda" else 0, max_retries=0, num_returns="streaming"
    )
    shared = ray.put(corpus)
    streams = [task.remote(group, run_uri, shared, training, epochs, device) for group in groups]
    while streams:
        ready, streams = ray.wait(streams, num_returns=1)
        try:
            yield ray.get(next(ready[0]))
        except StopIteration:
            continue
        streams += ready
