"""A product of several files appears whole: staged beside its place, then moved there; its marker is the last file written.

Locally the folder is `.NAME.staged` beside the target, and a rename puts it in its place. An object store has no rename: there
the marker of what stands in the place is deleted first and the new one written last, so that a folder without its marker is
no product, in whichever state a killed command left it.
"""

import contextlib
import os
from collections.abc import Iterator

from pipelines.runs import storage
from pipelines.runs.errors import UserError


@contextlib.contextmanager
def staged_folder(root: str, *parts: str, marker: str) -> Iterator[str]:
    """The URI of an empty folder to fill, which replaces the folder `root`/`parts` on leaving without an exception.

    Parameters
    ----------
    root, parts : str
        A run, and the folder's place below it.
    marker : str
        Name of the file that makes the folder a product. To be written last.

    Raises
    ------
    UserError
        If a link stands between the root and the folder, which would lead out of the run.
    """
    refuse_links(root, *parts)
    target = storage.join(root, *parts)
    local = storage.local_path(target)
    if local is None:
        storage.remove_tree(storage.join(target, marker))
        storage.remove_tree(target)
        yield target
        return
    staged, old = (local.with_name(f".{local.name}.{what}") for what in ("staged", "old"))
    for left in (staged, old):  # by a command that was killed
        storage.remove_tree(left)
    staged.mkdir(parents=True)
    try:
        yield str(staged)
        (local / marker).unlink(missing_ok=True)
        if local.exists():
            os.replace(local, old)
        os.replace(staged, local)
    finally:
        storage.remove_tree(staged)
        storage.remove_tree(old)


def refuse_links(root: str, *parts: str) -> None:
    """UserError if a link stands at `root`/`parts` or on the way there: what is written through it lands elsewhere."""
    for count in range(1, len(parts) + 1):
        local = storage.local_path(storage.join(root, *parts[:count]))
        if local is not None and local.is_symlink():
            raise UserError(
                f"{root}: {'/'.join(parts[:count])} is a link; remove it, links in a run are not followed", "run"
            )
