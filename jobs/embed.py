"""Shards -> embeddings, and what had to be left out.

hardset embed --run RUN --shards SHARDS --encoder ENCODER
"""

import sys
from typing import Any

from jobs.options import CorpusOptions, WorkerOptions
from jobs.stage_command import stage_command


def embed(run: Any, corpus: CorpusOptions, workers: WorkerOptions, *_: Any) -> dict[str, Any]:
    """Embed the shards that are not embedded yet."""
    from jobs import stages

    return stages.embed(run, workers, corpus)


COMMAND = stage_command("embed", __doc__, embed)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
