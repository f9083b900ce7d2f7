"""Reads zip archives within bounds: the unpacked size of all entries is checked before anything is unpacked."""
from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from .faults import FileFault, reason

LARGEST_DIRECTORY = 2 ** 20
_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OverflowError, IndexError, KeyError)


class Archive:
    """An open zip archive whose entries unpack to at most `most` bytes in total. Raises FileFault otherwise."""

    def __init__(self, path: Path, most: int) -> None:
        with _in_words():
            self._file = _BoundedFile(path)
            try:
                self._zip = zipfile.ZipFile(self._file)
                self._entries = self._checked(most)
            except BaseException:
                self._file.close()
                raise
            self._file.most = self._file.size  # the directory has been read

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_error) -> None:
        self._zip.close()
        self._file.close()

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def size(self, name: str) -> int:
        """Unpacked size of an entry, in bytes."""
        if name not in self._entries:
            raise FileFault("a part of it is missing")
        return self._entries[name].file_size

    def read(self, name: str) -> bytes:
        wanted = self.size(name)
        with _in_words(), self._zip.open(self._entries[name]) as entry:
            content = entry.read(wanted) if wanted else b""  # read() would unpack beyond the declared size
        if len(content) != wanted:
            raise FileFault("a part of it is cut off")
        return content

    def _checked(self, most: int) -> dict[str, zipfile.ZipInfo]:
        entries = {entry.filename: entry for entry in self._zip.infolist()}
        if len(entries) != len(self._zip.infolist()):
            raise FileFault("two of its entries have one name")
        if any(entry.flag_bits & 1 for entry in entries.values()):
            raise FileFault("the file is encrypted")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries.values()):
            raise FileFault("the file is compressed in a way that PyTorch does not use")
        if sum(entry.file_size for entry in entries.values()) > most:
            raise FileFault(f"the file would unpack to more than {most} bytes")
        for entry in entries.values():
            self._zip.open(entry).close()  # every entry must exist, also one that is never read
        return entries


class _BoundedFile(io.BufferedReader):
    """A file that refuses reads of more than `most` bytes.

    zipfile reads the whole directory at once, and each entry of it takes ten times its bytes in memory.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.size, self.most = os.fstat(self.fileno()).st_size, LARGEST_DIRECTORY

    def read(self, size: int | None = -1) -> bytes:
        size = self.size - self.tell() if size is None or size < 0 else size
        if size > self.most:
            raise FileFault("the file's directory is damaged or too large")
        return super().read(max(size, 0))


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except FileFault:
        raise
    except OSError as error:
        raise FileFault(f"the file cannot be read ({reason(error)})") from error
    except _FAULTS as error:
        raise FileFault("the file is cut off or damaged") from error
