"""The rows of a condensed set: pictures and labels as a table, on disk, and read back."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from datasets import Array3D, Features, List, Value
from datasets import Image as ImageFeature
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from PIL import Image

from dq_multimodal.condensation.documents import DATA, ORDER, PIXELS, SOFT_LABEL
from dq_multimodal.condensation.pictures import Real
from dq_multimodal.condensation.synthetic import Synthetic
from dq_multimodal.config import InputError
from dq_multimodal.data.local import read_parquet
from dq_multimodal.data.pixels import read_bytes, undecoded
from dq_multimodal.data.row_files import NO_FILES, admit, measure_outside
from dq_multimodal.data.stream import reading
from dq_multimodal.files import write_table
from dq_multimodal.stages.subset import measure_picks

if TYPE_CHECKING:
    from datasets import Dataset

NUMBER_BYTES = 4
"""Of a soft label."""


def to_bytes(pixels: Float[ndarray, "n c h w"]) -> UInt8[ndarray, "n h w c"]:
    """Round pixels in [0, 1] to 8 bits; what lies outside is cut."""
    rounded = np.rint(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(rounded.transpose(0, 2, 3, 1))


def encode(picture: UInt8[ndarray, "h w c"], kind: str = "PNG", **options: Any) -> bytes:
    """Give the file of a picture, grey if it has one channel."""
    file = io.BytesIO()
    flat = picture[..., 0] if picture.shape[-1] == 1 else picture
    Image.fromarray(flat).save(file, kind, **options)
    return file.getvalue()


def write_rows(
    path: Path, synthetic: Synthetic, real: Real, image: tuple[str, bool], label: tuple[str, Any]
) -> tuple[int, int]:
    """Write the rows as parquet: picture, label, soft label where learnt, dq_order.

    Args:
        path: The file.
        synthetic: The set.
        real: What gives its units and labels.
        image: The column of the pictures in the source, and whether they are PNG files of 8 bits;
            else float16 numbers are written, channels first, of which some may lie outside [0, 1].
        label: The column of labels, and its type in the source.

    Returns:
        Bytes of the pictures and of the soft labels.
    """
    from datasets import Dataset

    pixels = real.to_pixels(synthetic.images).cpu().numpy()
    classes = synthetic.classes.tolist()
    columns: dict[str, Any]
    features: dict[str, Any]
    if image[1]:
        files = [encode(picture, optimize=True) for picture in to_bytes(pixels)]
        columns = {image[0]: [{"bytes": file, "path": None} for file in files]}
        features = {image[0]: ImageFeature()}
        n_bytes = sum(map(len, files))
    else:
        numbers = pixels.astype(np.float16)
        columns = {PIXELS: numbers}
        features = {PIXELS: Array3D(pixels.shape[1:], "float16")}
        n_bytes = numbers.nbytes
    columns[label[0]] = [real.labels[k] for k in classes]
    features[label[0]] = label[1]
    soft_bytes = 0
    if synthetic.targets is not None:
        columns[SOFT_LABEL] = synthetic.targets.cpu().numpy().astype(np.float32)
        features[SOFT_LABEL] = List(Value("float32"))
        soft_bytes = NUMBER_BYTES * synthetic.targets.numel()
    columns[ORDER], features[ORDER] = np.arange(len(classes), dtype=np.int32), Value("int32")
    table = Dataset.from_dict(columns, Features(features)).with_format("arrow")[:]
    path.parent.mkdir(exist_ok=True)
    write_table(table, path)
    return n_bytes, soft_bytes


def check_columns(image_column: str, label_column: str) -> None:
    """Raise if a column of the source has the name of one of ours."""
    if taken := {image_column, label_column} & {PIXELS, SOFT_LABEL, ORDER}:
        raise InputError(
            f"the source has the column {taken.pop()}, which condense writes: rename it"
        )


def count_real_bytes(dataset: "Dataset", column: str, rows: Int[ndarray, " n"]) -> int:
    """Count the bytes of the image files of some rows of a source, or of their patch records."""
    files = dataset.select_columns([column])
    chunks = files.data.column(column).chunks
    if not any("bytes" in (field.name for field in chunk.type) for chunk in chunks):
        return int(measure_picks(files, rows).sum())
    inside = [pc.fill_null(pc.binary_length(chunk.field("bytes")), 0) for chunk in chunks]
    places = rows if files._indices is None else files._indices.column(0).to_numpy()[rows]
    sizes = np.concatenate([part.to_numpy(zero_copy_only=False) for part in inside])[places]
    return int(sizes.sum() + measure_outside(files.data.table, files.features, places).sum())


def open_rows(folder: Path) -> "Dataset":
    """Load the rows of a condensed set.

    Raises:
        InputError: If there are none, they cannot be read, or a row names a file.
    """
    name = f"the rows of {folder}"
    if not (folder / DATA).is_file():
        raise InputError(f"{folder / DATA} is missing")
    with reading(name):
        return admit(read_parquet([folder / DATA]), NO_FILES, name)


def read_files(dataset: "Dataset", image_column: str) -> list[bytes]:
    """Give the files of the pictures of a set, empty where there is none."""
    return [read_bytes(value) or b"" for value in undecoded(dataset, image_column)[image_column]]


def read_pixels(
    dataset: "Dataset", image_column: str, channels: int, side: int
) -> Float[ndarray, "n c h w"]:
    """Read the pictures of a set as pixels in [0, 1] units, float32.

    Raises:
        InputError: If one cannot be read, or is of another size or kind.
    """
    shape = (channels, side, side)
    if PIXELS in dataset.features:
        kind = dataset.features[PIXELS]
        if not isinstance(kind, Array3D) or tuple(kind.shape) != shape:
            raise InputError(f"the column {PIXELS} must hold arrays of {shape}, got {kind}")
        numbers = dataset.select_columns([PIXELS]).with_format("numpy")[:][PIXELS]
        return np.asarray(numbers, dtype=np.float32)
    found = np.empty((len(dataset), *shape), dtype=np.float32)
    mode, size = "L" if channels == 1 else "RGB", (side, side)
    for row, data in enumerate(read_files(dataset, image_column)):
        try:
            picture = Image.open(io.BytesIO(data), formats=["PNG"])
            if picture.mode != mode or picture.size != size:
                got = f"{picture.mode} of {picture.width} x {picture.height}"
                raise InputError(f"row {row} must be {mode} of {side} x {side}, got {got}")
            values = np.asarray(picture, dtype=np.float32)
        except InputError:
            raise
        except Exception as error:  # the readers of broken files raise whatever they like
            raise InputError(f"the picture of row {row} cannot be read") from error
        found[row] = values.reshape(side, side, channels).transpose(2, 0, 1) / 255
    return found
