"""Embedding workers: what each takes of the machine, and the steps that its seconds go to."""

import dataclasses

STEPS = ("read", "decode", "transfer", "model", "write")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one embedding worker takes, and how many there are (`min, max` for a pool that grows).

    Of these only `precision` changes a result by more than rounding. A sample in hand for longer than `sample_limit_s`
    is left out.
    """

    device: str = "cpu"
    workers: int | tuple[int, int] = 2
    cpus_per_worker: float = 1.0
    batch_size: int = 64
    decode_threads: int = 1
    precision: str = "float32"
    sample_limit_s: float = 120.0

    @property
    def gpus_per_worker(self) -> float:
        return 1.0 if self.device == "cuda" else 0.0

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]
