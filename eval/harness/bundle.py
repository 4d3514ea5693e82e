"""A bundle: all that training needs, in one folder of files of at most 30 MB each.

`bundle.json` names every array, table and model file, the parts it was cut into, and the SHA-256 of
each part. It is written last: a folder without it is not a bundle.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dq_multimodal.config import InputError
from harness.results import digest

FORMAT = "dq-multimodal bundle 2"
INDEX = "bundle.json"
PART_BYTES = 30_000_000
JOINED = "joined"  # where model files are put together again


def is_bundle(folder: Path) -> bool:
    """Say whether a folder holds a bundle of this version."""
    try:
        about = json.loads((folder / INDEX).read_text())
        return about["format"] == FORMAT and {"tasks", "files"} <= about.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class BundleWriter:
    """Writes a bundle beside its folder, and puts it there when it is whole.

    Args:
        folder: New, empty, or a bundle, which stays what it is until `finish`.

    Raises:
        InputError: If the folder holds other things.
    """

    def __init__(self, folder: Path) -> None:
        is_old = folder.is_dir() and any(folder.iterdir())
        if folder.exists() and (not folder.is_dir() or (is_old and not is_bundle(folder))):
            said = "holds other things, or a bundle of another version"
            raise InputError(f"{folder} {said}: name an empty folder for the bundle")
        self.folder, self._files = folder, dict[str, dict[str, Any]]()
        self._contents = dict[str, str]()
        self._new = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(self._new, ignore_errors=True)
        (self._new / "parts").mkdir(parents=True)

    def add_array(self, name: str, array: np.ndarray) -> None:
        """Add an array."""
        array, buffer = np.ascontiguousarray(array), io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        hashed = hashlib.sha256(array).hexdigest()
        self._add(name, "array", buffer.getbuffer(), digest(hashed, str(array.dtype), array.shape))

    def add_table(self, name: str, table: pa.Table) -> None:
        """Add a table, as Parquet."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self._add(name, "table", buffer.getbuffer(), digest(table.to_pydict()))

    def add_file(self, name: str, path: Path) -> None:
        """Add a file as it is."""
        data = path.read_bytes()
        self._add(name, "file", data, hashlib.sha256(data).hexdigest())

    def finish(self, about: dict[str, Any]) -> None:
        """Write the index, which makes the folder a bundle, and replace the one before."""
        document = {"format": FORMAT, **about, "files": self._files}
        (self._new / INDEX).write_text(json.dumps(document, indent=1) + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)
        self._new.replace(self.folder)

    def digest_of(self, start: str) -> str:
        """Give a digest of all that was added under names that begin so."""
        return digest({k: v for k, v in self._contents.items() if k.startswith(start)})

    def _add(self, name: str, kind: str, data: bytes | memoryview, content: str) -> None:
        """Write the parts of something, and remember the digest of what it is."""
        self._contents[name], parts = content, []
        for k, start in enumerate(range(0, max(1, len(data)), PART_BYTES)):
            part = data[start : start + PART_BYTES]
            file = f"parts/{len(self._files):03d}-{k:03d}"
            (self._new / file).write_bytes(part)
            hashed = hashlib.sha256(part).hexdigest()
            parts.append({"file": file, "bytes": len(part), "sha256": hashed})
        self._files[name] = {"kind": kind, "parts": parts}


class Bundle:
    """Reads a bundle; every part is checked when it is read.

    Raises:
        InputError: If the folder is no bundle, or a part is missing or not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        if not is_bundle(folder):
            raise InputError(f"{folder} is no bundle: it has no {INDEX} of this version")
        self.about = json.loads((folder / INDEX).read_text())
        self.folder_path, self._files = folder, self.about["files"]

    def names(self, start: str) -> list[str]:
        """Give the names that begin so."""
        return [name for name in self._files if name.startswith(start)]

    def array(self, name: str) -> np.ndarray:
        """Read an array."""
        return np.load(io.BytesIO(b"".join(self._parts(name, "array"))), allow_pickle=False)

    def table(self, name: str) -> pa.Table:
        """Read a table."""
        # without threads: those of pyarrow abort a process that ends while they start
        data = pa.BufferReader(b"".join(self._parts(name, "table")))
        return pq.ParquetFile(data, pre_buffer=False).read(use_threads=False)

    def folder(self, name: str) -> Path:
        """Put the files below a name together again, and give their folder."""
        inside = self.names(name + "/")
        if not inside:
            raise InputError(f"{self.folder_path} holds no {name}")
        target = self.folder_path / JOINED / digest([self._files[key] for key in inside])
        if target.is_dir():
            return target
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        for key in inside:
            place = temporary / key.removeprefix(name + "/")
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as file:
                for part in self._parts(key, "file"):
                    file.write(part)
        try:
            temporary.replace(target)
        except OSError:  # another worker was faster
            shutil.rmtree(temporary)
        return target

    @cached_property
    def n_bytes(self) -> int:
        """Size of all parts."""
        return sum(part["bytes"] for file in self._files.values() for part in file["parts"])

    def _parts(self, name: str, kind: str) -> Iterator[bytes]:
        entry = self._files.get(name)
        if entry is None or entry["kind"] != kind:
            raise InputError(f"{self.folder_path} holds no {kind} {name}")
        for part in entry["parts"]:
            path = self.folder_path / part["file"]
            try:
                data = path.read_bytes()
            except OSError:
                raise InputError(f"{path} is missing: copy the whole bundle") from None
            if hashlib.sha256(data).hexdigest() != part["sha256"]:
                said = f"{path} is not as it was written ({len(data):,} bytes): copy it anew"
                raise InputError(said)
            yield data
