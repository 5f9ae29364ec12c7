"""Tars as this project writes them: equal members give equal bytes."""

import tarfile
from collections.abc import Iterable
from typing import BinaryIO

from pipelines.corpus.tarstream import BLOCK


class TarWriter:
    """Writes regular members with headers that are always the same: mode 0644, no owner, no time."""

    def __init__(self, output: BinaryIO):
        self._output = output

    def add(self, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """One member of `size` bytes, which `pieces` give."""
        header = tarfile.TarInfo(name)
        header.size = size
        self._output.write(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        for piece in pieces:
            self._output.write(piece)
        self._output.write(bytes(-size % BLOCK))

    def close(self) -> None:
        """The end mark; the stream stays open."""
        self._output.write(bytes(2 * BLOCK))
