"""A folder or URL that all machines see, for parts of the work: a file is there whole or absent."""

import json
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.files import expand_home, first_line

READERS = 16
"""Small files that are read at the same time."""


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
            raise InputError(f"{self.root}/{name} is not as long as it was written: remove it")
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

    def count_try(self, name: str, most: int) -> bool:
        """Note that a part is begun; False, and all is forgotten, if it was so many times."""
        files = [self.path(f"{name}-{k}.txt") for k in range(most)]
        found = [file for file in files if self.fs.exists(file)]
        if len(found) == most:
            self.fs.rm(found)
            return False
        self.fs.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(files[len(found)], b"")
        return True

    def find_facts(self, name: str) -> dict[str, Any] | None:
        """Give what is known of a part, if it is done."""
        try:
            found = json.loads(self.fs.cat_file(self.path(f"{name}.json")))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def read_facts(self, stage: str) -> dict[int, dict[str, Any]]:
        """Give what is known of those parts of a stage that are done, by number."""
        self.fs.invalidate_cache()
        try:
            files = self.fs.ls(self.path(stage), detail=False)
        except FileNotFoundError:
            return {}
        names = [Path(file).stem for file in files if file.endswith(".json")]
        with ThreadPoolExecutor(READERS) as pool:
            facts = pool.map(lambda name: self.find_facts(f"{stage}/{name}"), names)
            found = zip(names, facts, strict=True)
            return {int(name): one for name, one in found if one is not None}

    def clear(self, stage: str = "") -> None:
        """Remove a stage, or all."""
        place = self.path(stage).rstrip("/")
        if self.fs.exists(place):
            self.fs.rm(place, recursive=True)


def find_storage(where: str | None, source: str | None) -> str | None:
    """Give the folder or URL that the user named for parts, absolute.

    Raises:
        InputError: If it lies where the source is read: a second start would take it for data.
    """
    if where is None or "://" in where:
        return where
    found = expand_home(where).resolve()
    if source is not None and "://" not in source and found.is_relative_to(source):
        raise InputError(f"ray_storage {where} lies in the dataset {source}: name another folder")
    return str(found)
