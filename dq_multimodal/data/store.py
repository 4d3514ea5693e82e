"""A folder or URL that all machines see, for parts of the work: a file is there whole or absent."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.files import first_line


class Store:
    """A folder, or a URL as fsspec reads it; workers open it by its name.

    Args:
        root: Path or URL.

    Raises:
        InputError: If the URL is of a kind that is not known here, or needs another package.
    """

    def __init__(self, root: str) -> None:
        try:
            self.fs, self._place = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise InputError(f"cannot use {root}: {first_line(error)}") from error
        self.is_local = "file" in self.fs.protocol
        self.root = self.fs.unstrip_protocol(self._place)  # a worker has another current folder

    def __reduce__(self) -> Any:
        return Store, (self.root,)

    def path(self, name: str) -> str:
        """Give the path of a file as its file system takes it."""
        return f"{self._place}/{name}"

    def put(self, name: str, file: Path) -> None:
        """Copy a file of this machine to its name here."""
        target = self.path(name)
        if not self.is_local:
            self.fs.put_file(str(file), target)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{target}.{uuid.uuid4().hex}.tmp")  # for a time two may do the same task
        shutil.copyfile(file, partial)
        with partial.open("r+b") as written:
            os.fsync(written.fileno())
        partial.replace(target)

    def write(self, name: str, content: ndarray | bytes, folder: Path) -> None:
        """Write the raw numbers of an array, by way of a folder of this machine."""
        file = folder / "content"
        file.write_bytes(content if isinstance(content, bytes) else content.tobytes())
        self.put(name, file)

    def read(self, name: str, kind: np.dtype, start: int = 0, size: int | None = None) -> ndarray:
        """Read numbers or records of a kind, some or all."""
        stop = None if size is None else (start + size) * kind.itemsize
        data = b"" if size == 0 else self.fs.cat_file(self.path(name), start * kind.itemsize, stop)
        if len(data) % kind.itemsize or (size is not None and len(data) != size * kind.itemsize):
            raise OSError(f"{self.root}/{name} is not as long as it was written")
        return np.frombuffer(data, kind)

    def open(self, name: str) -> Any:
        """Open a file for reading."""
        return self.fs.open(self.path(name), "rb")

    def fetch(self, name: str, target: Path) -> Path:
        """Give a file another name on this machine, as a copy unless the disk knows links."""
        if not self.is_local:
            self.fs.get_file(self.path(name), str(target))
            return target
        try:
            os.link(self.path(name), target)
        except OSError:
            shutil.copyfile(self.path(name), target)
        return target

    def put_facts(self, name: str, facts: dict[str, Any], folder: Path) -> None:
        """Write what is known of a part, after all else of it."""
        self.write(f"{name}.json", json.dumps(facts).encode(), folder)

    def find_facts(self, name: str) -> dict[str, Any] | None:
        """Give what is known of a part, if it is done."""
        try:
            return json.loads(self.fs.cat_file(self.path(f"{name}.json")))
        except FileNotFoundError:
            return None

    def read_facts(self, stage: str) -> dict[int, dict[str, Any]]:
        """Give what is known of those parts of a stage that are done, by number."""
        place = self.path(stage)
        self.fs.invalidate_cache()
        files = self.fs.glob(f"{place}/*.json") if self.fs.exists(place) else []
        found = self.fs.cat(files) if files else {}
        return {int(Path(file).stem): json.loads(text) for file, text in found.items()}

    def clear(self) -> None:
        """Remove all of it."""
        if self.fs.exists(self._place):
            self.fs.rm(self._place, recursive=True)
