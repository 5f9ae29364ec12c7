"""Embedding workers: what each takes of the cluster, and the steps that its seconds go to."""

import dataclasses

DECODERS = {"cpu": 1, "cuda": 4}  # threads per worker
STEPS = ("read", "decode", "transfer", "model", "write")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one embedding actor takes, and how many there are. Only the device changes results: a GPU computes in bfloat16."""

    device: str = "cpu"
    workers: int = 2
    cpus_per_worker: float = 0.5
    batch_size: int = 64

    @property
    def gpus_per_worker(self) -> float:
        return 1.0 if self.device == "cuda" else 0.0
