"""A bundle: all that training needs, in one folder of files of at most 30 MB each.

`bundle.json` names every array, table and model file, the parts it was cut into, and the SHA-256 of
each part. It is written last: a folder without it is not a bundle.
"""

import hashlib
import io
import itertools
import json
import math
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dq_multimodal.config import InputError

FORMAT = "dq-multimodal bundle 1"
INDEX = "bundle.json"
PART_BYTES = 30_000_000
JOINED = "joined"  # where model files are put together again


class BundleWriter:
    """Writes a bundle into a folder, which is emptied first."""

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).is_file():
            (folder / INDEX).unlink()  # the folder is no bundle until it is whole again
        elif folder.is_dir() and any(p for p in folder.iterdir() if p.name not in ("parts",)):
            raise InputError(f"{folder} holds other things: name an empty folder for the bundle")
        shutil.rmtree(folder / "parts", ignore_errors=True)
        shutil.rmtree(folder / JOINED, ignore_errors=True)
        (folder / "parts").mkdir(parents=True)
        self.folder, self._files = folder, dict[str, dict[str, Any]]()

    def add_array(self, name: str, array: np.ndarray) -> None:
        """Add an array, cut along its first axis."""
        n_parts = max(1, math.ceil(array.nbytes / (PART_BYTES - 1000)))
        if n_parts > max(1, len(array)):
            raise InputError(f"a row of {name} is larger than {PART_BYTES:,} bytes")
        for part in _cut(array, n_parts):
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(part), allow_pickle=False)
            self._add(name, "array", buffer.getvalue())

    def add_table(self, name: str, table: pa.Table) -> None:
        """Add a table, cut by rows, as Parquet."""
        n_parts = max(1, math.ceil(table.nbytes / PART_BYTES))
        bounds = np.linspace(0, len(table), n_parts + 1).astype(int)
        for start, end in itertools.pairwise(bounds):
            buffer = io.BytesIO()
            pq.write_table(table.slice(start, end - start), buffer, compression="zstd")
            self._add(name, "table", buffer.getvalue())

    def add_file(self, name: str, path: Path) -> None:
        """Add a file as it is, cut into pieces."""
        with path.open("rb") as file:
            data = file.read(PART_BYTES)
            while True:
                self._add(name, "file", data)
                data = file.read(PART_BYTES)
                if not data:
                    break

    def finish(self, about: dict[str, Any]) -> None:
        """Write the index, which makes the folder a bundle."""
        document = {"format": FORMAT, **about, "files": self._files}
        temporary = self.folder / (INDEX + ".tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(self.folder / INDEX)

    def _add(self, name: str, kind: str, data: bytes) -> None:
        entry = self._files.setdefault(name, {"kind": kind, "parts": []})
        file = f"parts/{len(self._files) - 1:03d}-{len(entry['parts']):03d}"
        (self.folder / file).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entry["parts"].append({"file": file, "bytes": len(data), "sha256": digest})


def _cut(array: np.ndarray, n_parts: int) -> list[np.ndarray]:
    return np.array_split(array, n_parts) if n_parts > 1 else [array]


class Bundle:
    """Reads a bundle; every part is checked when it is read.

    Raises:
        InputError: If the folder is no bundle, or a part is missing or not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.about = json.loads((folder / INDEX).read_text())
            self._files = self.about["files"]
            is_known = self.about["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            is_known = False
        if not is_known:
            raise InputError(f"{folder} is no bundle: it has no {INDEX} of this version")
        self.folder_path = folder

    def has(self, name: str) -> bool:
        """Say whether there is something of this name."""
        return name in self._files

    def names(self, start: str) -> list[str]:
        """Give the names that begin so."""
        return [name for name in self._files if name.startswith(start)]

    def array(self, name: str) -> np.ndarray:
        """Read an array."""
        parts = [np.load(io.BytesIO(p), allow_pickle=False) for p in self._parts(name, "array")]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def table(self, name: str) -> pa.Table:
        """Read a table."""
        return pa.concat_tables(pq.read_table(io.BytesIO(p)) for p in self._parts(name, "table"))

    def folder(self, name: str) -> Path:
        """Put the files below a name together again, and give their folder."""
        target = self.folder_path / JOINED / name
        if target.is_dir():
            return target
        inside = [key for key in self._files if key.startswith(name + "/")]
        if not inside:
            raise InputError(f"{self.folder_path} holds no {name}")
        temporary = target.with_name(f"{target.name}.{id(self)}.tmp")
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

    def _parts(self, name: str, kind: str) -> list[bytes]:
        entry = self._files.get(name)
        if entry is None or entry["kind"] != kind:
            raise InputError(f"{self.folder_path} holds no {kind} {name}")
        return [self._part(part) for part in entry["parts"]]

    def _part(self, part: dict[str, Any]) -> bytes:
        path = self.folder_path / part["file"]
        try:
            data = path.read_bytes()
        except OSError:
            raise InputError(f"{path} is missing: copy the whole bundle") from None
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise InputError(f"{path} is not as it was written ({len(data):,} bytes): copy it anew")
        return data
