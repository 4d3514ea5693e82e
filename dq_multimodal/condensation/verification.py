"""verify(): does a condensed set, or a run, hold what its config.yaml and manifest.json say?"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Features

from dq_multimodal.card import CARD
from dq_multimodal.condensation.documents import DATA, ORDER, PIXELS, SOFT_LABEL
from dq_multimodal.condensation.pictures import Real
from dq_multimodal.condensation.result import Condensed, is_condensed
from dq_multimodal.condensation.rows import NUMBER_BYTES, read_files
from dq_multimodal.config import InputError
from dq_multimodal.files import expand_home, open_parquet
from dq_multimodal.manifest import MANIFEST
from dq_multimodal.run import Run
from dq_multimodal.verification import Check, Found, Skipped, attempt
from dq_multimodal.verification import verify as verify_run

MOST_OFF = 1e-3
"""Of mean and spread in [0, 1]: decoders of JPEG differ in the last of 8 bits."""


def verify(found: Run | Condensed | str | Path) -> list[Check]:
    """Recompute what can be recomputed of a run or a condensed set, and compare.

    See `dq_multimodal.verification.verify` and `verify_set`.

    Raises:
        InputError: If it is neither, or has not finished.
    """
    path = expand_home(found if isinstance(found, str | Path) else found.path)
    return verify_set(path) if is_condensed(path) else verify_run(path)


def verify_set(path: Path) -> list[Check]:
    """Compare a condensed set with what was recorded of it.

    - rows: as many as there are classes and pictures of each, dq_order, the classes in turn, the
      columns
    - pictures: size and kind of each, and their bytes; of float16 that all are finite
    - soft labels: a finite number for each class, and their bytes
    - the mean, the spread and the classes of the real pictures, where the source can be had
    - all files and manifest.json, against bytes, SHA-256 and digest

    How the pictures were learnt is not computed again.

    Raises:
        InputError: If it is no finished set, or config.yaml or manifest.json is not that of one.
    """
    found = Condensed(path)
    checks = {
        "rows": _check_rows,
        "pictures": _check_pictures,
        "soft labels": _check_soft_labels,
        "source": _check_source,
        "files and manifest": _check_files,
    }
    return [attempt(name, check, found) for name, check in checks.items()]


def _read(found: Condensed) -> pa.Table:
    """Read the rows from their file, whatever a cache may hold."""
    with open_parquet(found.path / DATA) as file:
        n_rows = file.metadata.num_rows
        if n_rows != found.manifest.rows:
            raise InputError(f"there are {n_rows:,} rows, and not {found.manifest.rows:,}")
        return file.read()


def _check_rows(found: Condensed) -> Found:
    table, manifest, config = _read(found), found.manifest, found.config
    is_png = config.request.stored_as == "png"
    wanted = [config.image_column if is_png else PIXELS, config.label_column]
    wanted += [SOFT_LABEL] if manifest.bytes.soft_labels else []
    wanted.append(ORDER)
    if table.column_names != wanted:
        return [f"the columns are {', '.join(table.column_names)}"[:200]], ""
    faults = []
    order = table[ORDER].to_numpy()
    if order.dtype != np.int32 or not np.array_equal(order, np.arange(len(table))):
        faults.append(f"{ORDER} is not the number of the row")
    kind = Features.from_arrow_schema(table.schema)[config.label_column]
    values = table[config.label_column].to_pylist()
    names = [kind.names[v] if isinstance(kind, ClassLabel) else str(v) for v in values]
    turns = len(table) // len(manifest.classes)
    n_wrong = sum(a != b for a, b in zip(names, manifest.classes * turns, strict=True))
    if n_wrong:
        faults.append(f"the class of {n_wrong:,} rows is not the one whose turn it is")
    return faults, f"{len(table):,} rows, {turns:,} of each of {len(manifest.classes):,} classes"


def _check_pictures(found: Condensed) -> Found:
    pixels, manifest = found.read_pixels(), found.manifest
    if len(pixels) != manifest.rows:
        return [f"there are {len(pixels):,} pictures, and not {manifest.rows:,}"], ""
    faults = [] if np.isfinite(pixels).all() else ["some numbers are not finite"]
    if found.request.stored_as == "png":
        n_bytes = sum(map(len, read_files(found.dataset, found.config.image_column)))
    else:
        n_bytes = pixels.size * 2
    if n_bytes != manifest.bytes.images:
        faults.append(f"they have {n_bytes:,} bytes, and not {manifest.bytes.images:,}")
    size = " x ".join(map(str, pixels.shape[1:]))
    return faults, f"{len(pixels):,} pictures of {size}, {n_bytes:,} bytes"


def _check_soft_labels(found: Condensed) -> Found:
    table, manifest = _read(found), found.manifest
    if SOFT_LABEL not in table.column_names:
        if manifest.bytes.soft_labels or found.request.learn_labels:
            return ["there are none"], ""
        raise Skipped("none were learnt")
    lists: Any = table[SOFT_LABEL].to_pylist()
    n_classes = len(manifest.classes)
    is_whole = [values is not None and len(values) == n_classes for values in lists]
    if not all(is_whole):
        return [f"{is_whole.count(False):,} rows do not have {n_classes:,} numbers"], ""
    numbers = np.array(lists, dtype=np.float64)
    faults = [] if np.isfinite(numbers).all() else ["some numbers are not finite"]
    if NUMBER_BYTES * numbers.size != manifest.bytes.soft_labels:
        faults.append(f"they are not the {manifest.bytes.soft_labels:,} bytes of {MANIFEST}")
    return faults, f"{len(numbers):,} rows of {n_classes:,} finite numbers"


def _check_source(found: Condensed) -> Found:
    try:
        real: Real = found.open_real()
    except InputError as error:
        raise Skipped(error) from error
    manifest = found.manifest
    ours = (manifest.classes, manifest.real_rows, manifest.channels, manifest.side)
    theirs = (list(real.names), len(real.images), real.channels, real.side)
    faults = [] if ours == theirs else ["classes, number or size of the real pictures differ"]
    for name in ("mean", "spread"):
        theirs = getattr(real, name).flatten().numpy()
        if not np.allclose(getattr(manifest, name), theirs, rtol=0, atol=MOST_OFF):
            faults.append(f"the {name} of the real pixels differs")
    return faults, f"{len(real.images):,} real pictures of the same classes, mean and spread"


def _check_files(found: Condensed) -> Found:
    faults = [f"{name} {what}" for name, what in found.find_damage().items()]
    size = (found.path / DATA).stat().st_size
    if size != found.manifest.bytes.file:
        faults.append(f"{MANIFEST} says {found.manifest.bytes.file:,} bytes of {DATA}")
    record = found.manifest.files
    gone = [name for name in record if not (found.path / name).is_file()]
    rest = [CARD, *(f"{name} (not here)" for name in gone)]
    detail = (
        f"{len(record) - len(gone)} files and {MANIFEST} are as they were written, its losses, "
        "choices and notes by nothing but its digest; not compared: its seconds, "
    )
    return faults, detail + ", ".join(rest)
