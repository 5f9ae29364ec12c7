"""How rmd becomes the weight of eq. 10: what a command parses, and what scoring takes."""

import dataclasses
from typing import Literal

from pipelines.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class Weighting:
    """The difficulty columns."""

    temperature: float = 0.7
    """T of eq. 10, above 0: smaller = the hardest stand out more"""
    c: float = 1e-3
    """c of eq. 10, above 0"""
    scale: Literal["none", "per_dim", "standardize", "minmax"] = "per_dim"
    """how rmd is scaled before eq. 10"""

    def __post_init__(self) -> None:
        for name in ("temperature", "c"):
            if not getattr(self, name) > 0:
                raise UserError(f"{getattr(self, name)}: must be above 0", name)
