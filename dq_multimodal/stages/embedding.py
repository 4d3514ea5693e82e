"""The embedding stage: one global batch plan, saved as it goes, resumable at any moment."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.adapters.base import Adapter, Problems
from dq_multimodal.config import InputError
from dq_multimodal.data.row_sizes import BLOCK_BYTES, read_blocks
from dq_multimodal.data.splits import split_ranges
from dq_multimodal.distributed.world import ALONE, World
from dq_multimodal.files import put_in_place
from dq_multimodal.stages.batches import (
    FILE,
    FILES,
    MIDDLE,
    PARTIAL,
    TEXTURE,
    Found,
    Progress,
    RowsFile,
    embed_batches,
    make_plan,
    plan_batches,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["FILE", "FILES", "MIDDLE", "PARTIAL", "TEXTURE", "plan_batches"]

PROGRESS = "embeddings.progress.json"
ALIKE_ROWS, ALIKE_NUMBERS = 1000, 2**23
ALIKE_COSINE = 0.99
EQUAL_SQUARE = {True: 2e-4, False: 1e-12}
"""Squared distance, over the greatest squared norm, up to which two embeddings count as equal: a
cosine of 0.9999 (batches of other lengths change the last bits), or rounding."""
SAVE_SECONDS = 5.0
"""So much work at most is done again after a stop."""
BLOCK_ROWS = 65536


def embed_rows(
    adapter: Adapter,
    folder: Path,
    batch_size: int,
    *,
    rows: Int[ndarray, " k"] | None = None,
    view: int | None = None,
    name: str = "embed",
    world: World = ALONE,
) -> None:
    """Embed rows into folder/embeddings.npy, (n, d) float32, going on where it stopped.

    With an adapter that is scored, the same pass fills middle.npy and, but for views, texture.npy.
    Threads read and prepare the next batches while the model works on one. Batches are on disk,
    and the odd rows that they held are noted, before they count as done. The files get their
    names when they are whole. Several processes share the batches, each writes its own rows, and
    any number of them goes on with what any other number left.

    Args:
        adapter: What reads and embeds the rows.
        folder: Where to.
        batch_size: Rows that go through the encoder together.
        rows: Row numbers; None is all rows.
        view: Seed of the augmented view of each row to embed; None is the row itself.
        name: What the progress bar calls it.
        world: The processes; the others have to be in `assisting.embed_share`.
    """
    plan = make_plan(adapter, batch_size, rows, view)
    places = plan.places(folder)
    progress = Progress(folder / PROGRESS, plan.key, len(plan.batches))
    are_there = all((folder / file).exists() or place.exists() for file, place in places.items())
    if progress.is_done.all() and are_there:
        _finish(adapter, folder, places, progress.problems(), is_all=rows is None)
        return  # the run stopped just before it could say that this stage is done
    is_new = not progress.is_done.any() or not all(place.exists() for place in places.values())
    if is_new:
        progress.forget()  # before the new files of zeros are there
    out = plan.open_files(folder, is_new=is_new)
    left = np.flatnonzero(~progress.is_done)
    world.post(
        "embed",
        folder=str(folder.absolute()),
        rows=rows,
        view=view,
        key=plan.key,
        is_done=progress.is_done,
    )
    n_done = len(plan.rows) - sum(len(plan.batches[k]) for k in left)
    with tqdm(total=len(plan.rows), initial=n_done, desc=name, unit="row") as bar:

        def note_theirs(messages: list[tuple[int, Found]]) -> None:
            for _, found in messages:
                progress.note(found)
                bar.update(sum(len(plan.batches[k]) for k in found))

        parts = embed_batches(
            adapter,
            plan,
            world.deal(plan.key, left.tolist()),
            out,
            view,
            SAVE_SECONDS,
            world.n_here,
            on_rows=bar.update,
        )
        for found in parts:
            progress.note(found)
            note_theirs(world.receive())
            progress.save()
        while not progress.is_done.all():
            note_theirs(world.receive(wait=True))
            progress.save()
    out.clear()  # closes the files
    _finish(adapter, folder, places, progress.problems(), is_all=rows is None)


def _finish(
    adapter: Adapter, folder: Path, places: dict[str, Path], problems: Problems, *, is_all: bool
) -> None:
    """Give the files that are whole their names, and the adapter what was odd about all rows."""
    for file, place in places.items():
        if place.exists():
            put_in_place(place, folder / file)
    if is_all:
        adapter.problems |= problems


def note_alike(rows: Float[ndarray, "n d"], *, by_cosine: bool) -> list[str]:
    """Say, by a fixed sample of the embeddings, if nearly all of them are alike; else nothing.

    Alike is a mean cosine of two rows above 0.99, or more than half of the rows equal.

    Args:
        rows: The embeddings.
        by_cosine: Whether the cosine of two rows says how alike they are; else only equal rows do.
    """
    size = min(ALIKE_ROWS, 2 + ALIKE_NUMBERS // rows.shape[1])
    places = np.unique(np.linspace(0, len(rows) - 1, size).astype(int))
    some = rows[places].astype(np.float64)
    if by_cosine:
        norms = np.linalg.norm(some, axis=1, keepdims=True)
        some /= np.where(norms > 0, norms, 1)
    n, products = len(some), some @ some.T
    squares = np.diagonal(products)
    distances = squares[:, None] + squares - 2 * products
    n_equal = int((distances <= EQUAL_SQUARE[by_cosine] * squares.max()).sum(axis=1).max())
    mean = (products.sum() - squares.sum()) / max(1, n * (n - 1))
    if by_cosine and mean > ALIKE_COSINE:
        found = f"the mean cosine of two rows is {mean:.4f}"
    elif n > 1 and n_equal > n / 2:
        found = f"{n_equal:,} of {n:,} rows looked at have the same one"
    else:
        return []
    return [f"WARNING: nearly all embeddings are alike ({found}): they hardly tell the rows apart"]


def describe_given(given: str, dataset: "Dataset", split: str) -> dict[str, Any]:
    """Check ready embeddings and say what they are, as config.yaml records it.

    Args:
        given: A .npy file of (n, d) float16, float32 or float64, or a column of the dataset with
            d numbers a row.
        dataset: The rows that the embeddings belong to.
        split: Their split: for a slice, the file may also hold the rows of the whole split.

    Raises:
        InputError: If there is no such file or column, or it does not hold one finite vector of
            the same size for each row.
    """
    hasher = hashlib.sha256()
    size = 0
    for block in read_given(given, dataset, split):
        hasher.update(block.tobytes())
        size = block.shape[1]
    key = "column" if _is_column(given, dataset) else "file"
    return {key: given, "dimension": size, "sha256_of_float32": hasher.hexdigest()}


def copy_embeddings(given: str, dataset: "Dataset", split: str, folder: Path) -> None:
    """Write ready embeddings into folder/embeddings.npy as float32; see `describe_given`."""
    out, start, partial = None, 0, folder / (FILE + PARTIAL)
    for block in read_given(given, dataset, split):
        shape = (len(dataset), block.shape[1])
        out = out or RowsFile(partial, shape, np.float32, is_new=True)
        out[np.arange(start, start + len(block))] = block
        start += len(block)
    put_in_place(partial, folder / FILE)


def read_given(given: str, dataset: "Dataset", split: str) -> Iterator[ndarray]:
    """Yield the blocks of ready embeddings as float32, checked."""
    size = None
    is_column = _is_column(given, dataset)
    if is_column:
        blocks = _column_blocks(given, dataset)
    else:
        blocks = _npy_blocks(given, len(dataset), split)
    origin = f"column {given}" if is_column else given
    n_read = 0
    for block in blocks:
        size = size or block.shape[1]
        if block.shape[1] != size:
            raise InputError(
                f"{origin} must hold vectors of one size, got {size} and {block.shape[1]}"
            )
        is_bad = ~np.isfinite(block).all(axis=1)
        if is_bad.any():
            row = n_read + int(np.argmax(is_bad))
            raise InputError(f"{origin} must be finite in float32, row {row} holds NaN or infinity")
        yield block
        n_read += len(block)


def open_embeddings(folder: Path) -> ndarray:
    """Open the embeddings of a run folder, memory-mapped, (n, d) float32."""
    return np.load(folder / FILE, mmap_mode="r")


def _is_column(given: str, dataset: "Dataset") -> bool:
    return given in dataset.column_names and not given.endswith(".npy")


def _npy_blocks(given: str, n_rows: int, split: str) -> Iterator[ndarray]:
    path = Path(os.path.expanduser(given))  # noqa: PTH111
    if not path.is_file():
        raise InputError(f"no embeddings {given}: neither a .npy file nor a column of the dataset")
    values = _open_npy(path, given)
    ranges = [(0, len(values))]
    if len(values) != n_rows:
        with suppress(InputError):  # a slice that does not fit so many rows
            ranges = split_ranges(split, len(values))
    if sum(stop - start for start, stop in ranges) != n_rows or not values.shape[1]:
        raise InputError(
            f"{given} must hold one vector for each of the {n_rows:,} rows, "
            f"got shape {values.shape}"
        )
    for first, stop in ranges:
        step = max(1, BLOCK_BYTES // (4 * values.shape[1]))
        for start in range(first, stop, step):
            with np.errstate(over="ignore"):  # infinity is refused
                block = np.asarray(values[start : min(start + step, stop)], dtype=np.float32)
            yield block


def _open_npy(path: Path, given: str) -> ndarray:
    """Map a .npy file; of any other, say in one line what it is."""
    wanted = f"{given} must be a .npy file of an (n, d) array of float16, float32 or float64"
    try:
        with path.open("rb") as file:
            head = file.read(2)
        values = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise InputError(f"cannot read {given}: {error.strerror or error}") from error
    except Exception as error:  # a header can be wrong in many ways
        got = {b"": "an empty file", b"PK": "an archive (.npz)"}.get(head)
        if got is None:
            is_objects = "Python objects" in str(error)
            reason = " ".join(str(error).split())
            got = "an array of Python objects" if is_objects else f"another file ({reason})"
        raise InputError(f"{wanted}, got {got}") from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise InputError(f"{wanted}, got {values.dtype} of shape {values.shape}")
    return values


def _column_blocks(name: str, dataset: "Dataset") -> Iterator[ndarray]:
    import pyarrow as pa
    import pyarrow.compute

    column = dataset.select_columns([name]).with_format("arrow")
    start = 0
    for table in read_blocks(column, BLOCK_ROWS):
        array = table[name].combine_chunks()
        wrong_type = InputError(f"column {name} must hold lists of numbers, got {array.type}")
        is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
        if not (is_list or pa.types.is_fixed_size_list(array.type)):
            raise wrong_type
        if array.null_count:
            row = start + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            raise InputError(f"column {name} must hold a vector in every row, row {row} has none")
        sizes = np.asarray(pa.compute.list_value_length(array))
        if sizes.min() != sizes.max() or not sizes.max():
            raise InputError(
                f"column {name} must hold vectors of one size, got {sizes.min()} to {sizes.max()}"
            )
        try:
            with np.errstate(over="ignore"):  # infinity is refused
                flat = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        except (ValueError, TypeError) as error:
            raise wrong_type from error
        yield flat.reshape(len(array), -1)
        start += len(array)
