"""The columns of a run for people who train elsewhere: a webdataset stage, and a torch dataset. Neither needs Ray.

import webdataset
from pipelines.datasets import RunDataset, with_columns

stage = with_columns(RUN, ["difficulty.rmd", "difficulty.weight"])
data = webdataset.WebDataset(urls, shardshuffle=100).compose(stage).shuffle(1000).decode("torchrgb", partial=True)

loader = torch.utils.data.DataLoader(RunDataset(RUN, ["difficulty.weight"], image_size=224), batch_size=64, num_workers=4)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipelines.runs import joins, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from pipelines.training.ingest import WINDOW, Loader
from pipelines.training.source import Source

Sample = dict[str, Any]


def with_columns(run_uri: str, names: Sequence[str]) -> Callable[[Iterable[Sample]], Iterator[Sample]]:
    """A webdataset pipeline stage that adds columns of a run to each sample, and drops those that are quarantined.

    Parameters
    ----------
    run_uri : str
    names : sequence of str
        Full names; a sample gets them as `sample["difficulty.rmd"]` (a number, None where the run has no value), and
        its number within its shard as `sample["row"]`.

    Returns
    -------
    stage : callable
        For `.compose(stage)`, directly after the shards are read and before any shuffle: it goes by `__url__` and
        `__key__`, one shard's columns in memory at a time. The second sample of a key in a shard is one of those
        dropped. Decode with `partial=True`: the columns are no bytes. A shard that the run does not hold is a
        ValueError; it may be named by another path if the last part of that is unique in the run.
    """
    run = Run.open(run_uri)
    number_of = {shard.url: number for number, shard in enumerate(run.shards)}
    by_name: dict[str, list[int]] = {}
    for number, shard in enumerate(run.shards):
        by_name.setdefault(shard.url.rsplit("/", 1)[-1], []).append(number)

    def find(url: str) -> int:
        known = number_of.get(storage.absolute(url))
        alike = by_name.get(url.rsplit("/", 1)[-1], []) if known is None else [known]
        if len(alike) != 1:
            raise UserError(f"shard {url}: {run.uri} holds {'no such shard' if not alike else 'several of that name'}")
        return alike[0]

    def stage(samples: Iterable[Sample]) -> Iterator[Sample]:
        url, left = None, {}
        for sample in samples:
            if sample["__url__"] != url:
                url = sample["__url__"]
                table = joins.join(run.uri, find(url), names).select(["key", "row", *names])
                left = {record.pop("key"): record for record in table.to_pylist()}
            # Taken out: a later sample of the same key is a duplicate, and was quarantined.
            found = left.pop(sample["__key__"], None)
            if found is not None:
                yield sample | found

    return stage


class RunDataset(IterableDataset):
    """Samples of a run, decoded, with its columns: dicts of `image` (3, S, S) uint8 or `embedding` (d,) float32, `label`
    (-1 never occurs: unlabelled samples are left out), `index` and the columns (float32) by full name.

    Parameters
    ----------
    run_uri : str
    names : sequence of str
        Columns, full names.
    image_size : int, optional
        S; None: embeddings instead of images.
    rank, world : int
        Of the training processes; workers of a DataLoader divide their rank's share.
    seed, window
        Shards in an order drawn from (seed, epoch), shuffled in windows of `window` samples. Call `set_epoch` before
        each epoch (with persistent workers it has no effect).
    transform : callable, optional
        Applied to each image or embedding.

    Notes
    -----
    Every one of rank × worker shares has ceil(N / shares) samples: all samples come, at most shares - 1 of them twice.
    """

    def __init__(
        self,
        run_uri: str,
        names: Sequence[str] = (),
        image_size: int | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        window: int = WINDOW,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__()
        kind = "embeddings" if image_size is None else "images"
        self.source = Source.of(Run.open(run_uri), input=kind, columns=tuple(names), image_size=image_size or 0)
        with ThreadPoolExecutor(16) as pool:
            self.counts = list(pool.map(lambda shard: self.source.keys(shard).num_rows, range(len(self.source.shards))))
        self.rank, self.world, self.seed, self.window, self.transform = rank, world, seed, window, transform
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        loader = Loader(
            self.source,
            self.counts,
            256,
            rank=self.rank * workers + mine,
            world=self.world * workers,
            seed=self.seed,
            window=self.window,
            cache_bytes=0,
            threads=1,
        )
        name = "image" if self.source.input == "images" else "embedding"
        for batch in loader.epoch(self.epoch):
            for i in range(len(batch.labels)):
                value = batch.inputs[i] if self.transform is None else self.transform(batch.inputs[i])
                sample = {name: value, "label": batch.labels[i], "index": batch.index[i]}
                yield sample | {column: values[i] for column, values in batch.values.items()}
