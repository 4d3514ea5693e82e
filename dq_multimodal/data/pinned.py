"""Files on this machine, pinned: what they hold, and whether they still are what was hashed."""

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dq_multimodal.config import InputError

CHUNK_BYTES = 1 << 20
BATCH_FILES = 200
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of compressed files that `datasets` reads through."""


class PinnedFiles:
    """Files and their SHA-256, with what tells that one was replaced since.

    A file that is put in the place of another has another number (inode) or another time of
    change, which no copy can keep, also where its size and its time of writing are the same.

    Args:
        paths: The files.
        root: Folder that they lie in, which their recorded names leave out.
        name: What they are the data of, for messages.
        beside: Files that only tell the types of the columns: watched, not hashed.
        is_text: Says of a file whether it must be UTF-8.

    Raises:
        InputError: If one is text and not UTF-8.
    """

    def __init__(
        self,
        paths: list[str],
        root: Path,
        name: str,
        *,
        beside: list[str] | None = None,
        is_text: Callable[[str], bool] = lambda _: False,
    ) -> None:
        from tqdm import tqdm

        self.paths, self.name = paths, name
        self._names = [path.removeprefix(f"{root}/") for path in paths]
        self._stamps = [(path, _stamp(path)) for path in [*paths, *(beside or [])]]
        batches = [paths[k : k + BATCH_FILES] for k in range(0, len(paths), BATCH_FILES)]
        self._hashes: list[str] = []
        with (
            ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool,
            tqdm(total=len(paths), desc="hash", unit="file", delay=1) as bar,
        ):
            for found in pool.map(lambda batch: [hash_file(p, is_text(p)) for p in batch], batches):
                self._hashes += found
                bar.update(len(found))

    def describe(self, max_listed: int) -> list[dict[str, Any]]:
        """Give name, bytes and SHA-256 of each; of more files than that, all in one entry."""
        found: list[dict[str, Any]] = [
            {"name": name, "bytes": stamp[0], "sha256": digest}
            for name, (_, stamp), digest in zip(
                self._names, self._stamps, self._hashes, strict=False
            )
        ]
        if len(found) <= max_listed:
            return found
        total = sum(file["bytes"] for file in found)
        digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        return [{"name": f"{len(found)} files", "bytes": total, "sha256": digest}]

    def key(self, *more: Any) -> str:
        """Give a name under which what was read of these very files may be kept."""
        text = json.dumps([self._stamps, self._hashes, more], default=str)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]

    def check(self) -> None:
        """Raise if a file is not the one that was hashed."""
        for path, stamp in self._stamps:
            try:
                is_same = _stamp(path) == stamp
            except OSError:
                is_same = False
            if not is_same:
                raise InputError(f"{self.name} has changed while it was read: {Path(path).name}")


def _stamp(path: str) -> tuple[int, ...]:
    found = os.stat(path)  # noqa: PTH116 - a Path for each of 200,000 files takes as long as hashing
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def hash_file(path: str, is_text: bool = False) -> str:
    """Give the SHA-256 of a file.

    Raises:
        InputError: If it is to be text and is not UTF-8.
    """
    hasher, is_packed = hashlib.sha256(), path.lower().endswith(PACKED)
    see = _Utf8(path).see if is_text and not is_packed else None
    with open(path, "rb") as file:  # noqa: PTH123
        for chunk in _chunks(file.read):
            hasher.update(chunk)
            if see is not None:
                see(chunk)
    if see is not None:
        see(b"", True)
    elif is_text:
        import fsspec

        if path.lower().endswith(".zst") and "zstd" not in fsspec.available_compressions():
            raise InputError(f"{path} needs the package zstandard to be read: install or unpack it")
        see = _Utf8(path).see
        with fsspec.open(path, compression="infer") as file:
            for chunk in _chunks(file.read):
                see(chunk)
        see(b"", True)
    return hasher.hexdigest()


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while chunk := read(CHUNK_BYTES):
        yield chunk


class _Utf8:
    """Sees the bytes of a text file and raises at the first that are not UTF-8."""

    def __init__(self, path: str) -> None:
        self._path, self._n_seen = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def see(self, chunk: bytes, is_last: bool = False) -> None:
        start = self._n_seen - len(self._decoder.getstate()[0])
        is_16 = not self._n_seen and (
            chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in chunk[:1000]
        )
        self._n_seen += len(chunk)
        try:
            self._decoder.decode(chunk, is_last)
        except UnicodeDecodeError as error:
            at, wrong = start + error.start, error.object[error.start]
            what = f"byte {wrong:#04x} at {at:,}"
        else:
            if not is_16:
                return
            what = "NUL bytes"
        kind = "UTF-16" if is_16 else "LATIN1"
        raise InputError(
            f"{self._path} is not UTF-8 text ({what}): convert it, for example by "
            f"iconv -f {kind} -t UTF-8"
        )
