"""The stage that drops patches: records of all kept images, made block by block, resumable.

`make_dropper` finds the models, `drop_patches` writes the records to folder/patches, and
`PatchColumn` gives them to the subset as one column.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.image_text import image_half
from dq_multimodal.config import CompressConfig, Fill, InputError
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.data.columns import match_classes, read_classes
from dq_multimodal.data.pixels import (
    GREY,
    ORIENTATION_TAG,
    ROTATED,
    count_pixels,
    decode_image,
    read_bytes,
    undecoded,
)
from dq_multimodal.data.row_sizes import cut_rows
from dq_multimodal.files import name_some, open_parquet, write_table
from dq_multimodal.models.image import ImageModel, load_image_model
from dq_multimodal.patches.codec import (
    FIELDS,
    LARGEST_PIXELS,
    ORIGINAL,
    PROFILE,
    Record,
    decode_patches,
    encode_patches,
)
from dq_multimodal.patches.fill import psnr_of_holes
from dq_multimodal.patches.grid import (
    count_dropped,
    default_patch_size,
    drop_lowest,
    grid_shape,
    keep_pixels,
)
from dq_multimodal.patches.mae import load_mae
from dq_multimodal.patches.store import Filler, has_old_records, make_filler

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor

FOLDER = "patches"
BLOCK_ROWS = 64
"""So much work at most is done again after a stop."""
STEP_PIXELS = 4_000_000
"""Images that are worked on together have at most so many pixels, or are one."""

NOT_PLAIN = "an image that is not 8-bit grey or RGB, or cannot be read"
TOO_LARGE = "an image of more than 25 million pixels"
OWN_COLOURS = "an image with a gamma or primaries of its own"
NO_SMALLER = "an image that would not get smaller"
BELOW_GATE = "a filled image below min_psnr"

PROBED_ROWS = 64
SRGB_GAMMA = 1 / 2.2
SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""Of white, red, green and blue, as Pillow gives them."""
XMP_OF_PNG = "XML:com.adobe.xmp"


@dataclass
class PatchDropper:
    """Drops patches of images as a request asks.

    Attributes:
        request: The settings of the patches.
        column: The column of images.
        patch_size: Side of a patch in pixels.
        model: Classifier that says which patches matter, and whether its answers change; None
            where patches are dropped at random and no model is at hand.
        classes: Class of every source row for the model; -1 is its own answer.
    """

    request: CompressConfig
    column: str
    patch_size: int
    model: ImageModel | None
    classes: Int[ndarray, " n"]

    def __post_init__(self) -> None:
        request = self.request
        self.fill: Fill = request.fill or ("mae" if request.mae_model else "mean")
        self.filler: Filler = make_filler(self.fill, request.mae_model, request.device)

    def describe(self) -> dict[str, Any]:
        """Say what config.yaml records of the patches."""
        shown = self.model.describe() if self.model is not None else None
        return {"patch_size": self.patch_size, "fill": self.fill, "attribution_model": shown}

    def drop(
        self,
        files: list[bytes | None],
        images: "tuple[Image | None, ...]",
        odd: tuple[list[str], ...],
        rows: Int[ndarray, " b"],
    ) -> list[dict[str, Any]]:
        """Make the records of a few images, with what there is to say of each.

        The classifier looks at all of them in one batch; they are coded and filled shape by shape.
        """
        reasons = [TOO_LARGE if TOO_LARGE in what else NOT_PLAIN for what in odd]
        plain = []
        for k, image in enumerate(images):
            if image is not None and set(odd[k]) <= {GREY, ROTATED}:
                if has_own_colours(image):
                    reasons[k] = OWN_COLOURS
                else:
                    plain.append(k)
        made = [*map(_keep_original, files, reasons)]
        if not plain:
            return made
        pixels = [np.asarray(images[k]) for k in plain]
        numbers = rows[plain]
        maps, answers = self._look(pixels, self.classes[numbers])
        together: dict[Any, list[int]] = defaultdict(list)
        for place, k in enumerate(plain):
            together[(*pixels[place].shape[:2], GREY in odd[k])].append(place)
        filled: list[UInt8[ndarray, "h w c"]] = list(pixels)
        for (_, _, is_grey), group in together.items():
            batch = np.stack([pixels[place] for place in group])[..., : 1 if is_grey else 3]
            keep = self._choose(batch, None if maps is None else maps[group], numbers[group])
            coding, quality = self.request.patch_coding, self.request.patch_quality
            records = encode_patches(batch, keep, self.patch_size, coding, quality)
            found = zip(group, records, keep, *self._fill(batch, keep, records), strict=True)
            for place, record, marks, whole, psnr, psnr_of_kept in found:
                k, image, filled[place] = plain[place], images[plain[place]], whole
                assert image is not None
                record[PROFILE] = image.info.get(PROFILE) or None
                reason = self._refuse(record, psnr, len(files[k] or b""))
                if reason is not None:
                    made[k] = _keep_original(files[k], reason)
                    continue
                made[k] |= {
                    "record": record,
                    "reason": None,
                    "lost": name_metadata(image),
                    "psnr": float(psnr),
                    "psnr_of_kept": float(psnr_of_kept),
                    "kept_share": float(marks.mean()),
                }
        if answers is not None:
            is_changed = self._answer(filled) != answers
            for place, k in enumerate(plain):
                if made[k]["reason"] is None:
                    made[k]["is_changed"] = bool(is_changed[place])
        return made

    def _look(
        self, pixels: list[UInt8[ndarray, "_ _ c"]], classes: Int[ndarray, " b"]
    ) -> "tuple[Float[Tensor, 'b h w'] | None, Int[ndarray, ' b'] | None]":
        """Give GradCAM++ maps of images, where they are asked for, and the model's answers."""
        import torch

        if self.model is None or not self.model.n_classes:
            return None, None
        if self.request.attribution == "random":
            return None, self._answer(pixels)
        from dq_multimodal.patches.attribution import GradCamPlusPlus

        batch = self.model.to_input(_to_squares(self.model, pixels))
        with GradCamPlusPlus(self.model.net) as explain:
            found = explain(batch, torch.from_numpy(classes).to(self.model.device))
        return found.maps, found.logits.argmax(dim=1).cpu().numpy()

    def _answer(self, pixels: list[UInt8[ndarray, "_ _ c"]]) -> Int[ndarray, " b"]:
        assert self.model is not None
        logits = self.model.look(_to_squares(self.model, pixels))[1]
        assert logits is not None
        return logits.argmax(axis=1)

    def _choose(
        self,
        pixels: UInt8[ndarray, "b h w c"],
        maps: "Float[Tensor, 'b size size'] | None",
        rows: Int[ndarray, " b"],
    ) -> Bool[ndarray, "b l"]:
        """Mark the patches to keep: the most important, or random ones that follow from the row."""
        import torch

        from dq_multimodal.patches.attribution import patch_scores

        height, width = pixels.shape[1:3]
        n_patches = int(np.prod(grid_shape(height, width, self.patch_size)))
        n_dropped = count_dropped(n_patches, self.request.drop_ratio)
        if not n_dropped:
            return np.ones((len(rows), n_patches), dtype=bool)
        if maps is None:
            numbers = rows[:, None] * n_patches + np.arange(n_patches)
            hashes = hash_numbers(self.request.seed, numbers.ravel().astype(np.uint64))
            scores = hashes.reshape(numbers.shape).argsort(axis=1).argsort(axis=1).astype(float)
            return drop_lowest(scores, n_dropped)
        if maps.shape[1:] != (height, width):
            maps = torch.nn.functional.interpolate(
                maps[:, None], size=(height, width), mode="bilinear", align_corners=False
            )[:, 0]
        return drop_lowest(patch_scores(maps, self.patch_size).cpu().numpy(), n_dropped)

    def _fill(
        self,
        pixels: UInt8[ndarray, "b h w c"],
        keep: Bool[ndarray, "b l"],
        records: list[Record],
    ) -> tuple[UInt8[ndarray, "b h w c"], Float[ndarray, " b"], Float[ndarray, " b"]]:
        """Read the records back, as a user will, fill their holes, and give PSNR of both parts."""
        decoded, marks = decode_patches(records)
        height, width = pixels.shape[1:3]
        is_kept = keep_pixels(keep, height, width, self.patch_size)
        is_exact = self.request.patch_coding != "webp"
        if not np.array_equal(marks, keep) or (
            is_exact and not np.array_equal(decoded[is_kept], pixels[is_kept])
        ):
            raise RuntimeError("the patch store does not give back what went in")
        filled = self.filler(decoded, keep, self.patch_size)
        of_holes = psnr_of_holes(pixels, filled, keep, self.patch_size)
        if is_exact:
            return filled, of_holes, np.full(len(pixels), np.inf)
        errors = np.square(pixels.astype(np.float64) - decoded).mean(axis=3)
        mse = (errors * is_kept).sum(axis=(1, 2)) / is_kept.sum(axis=(1, 2))
        with np.errstate(divide="ignore"):
            return filled, of_holes, 10 * np.log10(255**2 / mse)

    def _refuse(self, record: Record, psnr: float, source_bytes: int) -> str | None:
        """Say why an image keeps its original instead of this record, if it does."""
        profile = record.get(PROFILE)
        size = len(record["data"]) + len(record["mask"])
        size += len(zlib.compress(profile)) if profile else 0  # as files hold it
        if self.request.min_psnr is not None and psnr < self.request.min_psnr:
            return BELOW_GATE
        return NO_SMALLER if size >= source_bytes else None


def _to_squares(
    model: ImageModel, pixels: list[UInt8[ndarray, "_ _ c"]]
) -> UInt8[ndarray, "b size size 3"]:
    """Scale whole images, edges included, to the input of the model."""
    from PIL import Image

    rgb = (Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3))) for image in pixels)
    size = (model.size, model.size)
    return np.stack([np.asarray(image.resize(size, model.resample)) for image in rgb])


def _keep_original(file: bytes | None, reason: str) -> dict[str, Any]:
    record = None
    if file is not None:
        sizes = dict.fromkeys(("height", "width", "channels", "patch_size"), 0)
        record = {"coding": ORIGINAL, **sizes, "mask": b"", "data": file}
    unknown = dict.fromkeys(("psnr", "psnr_of_kept", "is_changed"))
    size = len(file or b"")
    facts = {"kept_share": 1.0, "lost": [], "source_bytes": size}
    return {"record": record, "reason": reason, **unknown, **facts}


def has_own_colours(image: "Image") -> bool:
    """Say whether a PNG's gamma or primaries are not those of sRGB; a profile overrides them."""
    info = image.info
    if PROFILE in info or "srgb" in info:
        return False
    gamma, primaries = info.get("gamma", SRGB_GAMMA), info.get("chromaticity", SRGB_PRIMARIES)
    return not (
        np.allclose(gamma, SRGB_GAMMA, atol=0.005)
        and np.allclose(primaries, SRGB_PRIMARIES, atol=0.005)
    )


def name_metadata(image: "Image") -> list[str]:
    """Name what a file says beside its pixels, which a record does not hold."""
    info = image.info
    found = {
        "EXIF": "exif" in info and bool(set(image.getexif()) - {ORIENTATION_TAG}),
        "XMP": "xmp" in info or XMP_OF_PNG in info,
        "comments": any(
            name == "comment"
            or (isinstance(value, str) and name not in (XMP_OF_PNG, "compression"))
            for name, value in info.items()
        ),
    }
    return [name for name, is_there in found.items() if is_there]


def make_dropper(
    dataset: "Dataset", request: CompressConfig, adapter: Adapter | None
) -> PatchDropper:
    """Find the models and the patch size that a request means.

    Raises:
        InputError: If a model cannot be had, or the one that is to say what matters is no
            classifier.
    """
    image = image_half(adapter)
    assert image is not None  # choose_adapter lets drop_ratio pass for images only
    if image.has_lists:
        raise InputError(
            f"drop_ratio is for one image a row: name one of {', '.join(image.columns)} with "
            "--image-column, and not one of lists"
        )
    [column] = image.columns
    classes = np.full(len(dataset), -1, dtype=np.int64)
    name = request.attribution_model or (request.embedding_model and image.model_name)
    model = None
    is_asked = request.attribution == "gradcam++"
    if is_asked or name is not None:
        own = name is not None and name != image.model_name
        model = load_image_model(str(name), request.device, request.dtype) if own else image.model
        if is_asked:
            _check_classifier(model)
        found, labels = read_classes(dataset, image.label_column)
        classes = match_classes(found, labels, model.labels)
        if (found >= 0).any() and (classes < 0).all() and is_asked:
            image.notes.append(
                f"{model.name} does not know the labels: patches are chosen by its own answers"
            )
    size = request.patch_size
    if request.mae_model is not None:
        filler_size = load_mae(request.mae_model).patch_size
        if size is not None and size != filler_size:
            raise InputError(
                f"patch_size must be that of {request.mae_model}, {filler_size}, got {size}"
            )
        size = filler_size
    if size is None:  # the default for the largest of the first images
        first = undecoded(dataset.select(range(min(PROBED_ROWS, len(dataset)))), column)
        pictures = (decode_image(read_bytes(value))[0] for value in first[column])
        sides = (max(one.size) for one in pictures if one is not None)
        size = default_patch_size(max(sides, default=224))
    return PatchDropper(request, column, size, model, classes)


def _check_classifier(model: ImageModel) -> None:
    """Raise unless GradCAM++ can look at a model."""
    from dq_multimodal.patches.attribution import find_layer

    advice = "name one with --attribution-model, or use --attribution random"
    if not model.n_classes:
        raise InputError(f"gradcam++ needs a classifier, and {model.name} has no classes: {advice}")
    try:
        find_layer(model.net)
    except InputError:
        advice = advice.replace("name one", "name another classifier")
        raise InputError(f"gradcam++ does not know the layers of {model.name}: {advice}") from None


def note_original(what: str, rows: list[int]) -> str:
    """Say in one line which rows keep their original file, and why."""
    noun = "row keeps its" if len(rows) == 1 else "rows keep their"
    return f"{len(rows):,} {noun} original, {what}: {name_some(rows)}"


def drop_patches(
    dataset: "Dataset", kept: Int[ndarray, " k"], dropper: PatchDropper, folder: Path
) -> "PatchColumn":
    """Write the records of the kept rows to folder/patches, a file a block; done ones are left."""
    target, column = folder / FOLDER, dropper.column
    target.mkdir(exist_ok=True)
    files = undecoded(dataset, column)
    with (
        ThreadPoolExecutor(2) as pool,
        tqdm(total=len(kept), desc="patches", unit="row") as bar,
    ):
        for number, start in enumerate(range(0, len(kept), BLOCK_ROWS)):
            rows = kept[start : start + BLOCK_ROWS]
            path = target / f"{number:06d}.parquet"
            if path.exists() and not has_old_records([path]):
                bar.update(len(rows))
                continue
            values = [read_bytes(value) for value in files[rows.tolist()][column]]
            made: list[dict[str, Any]] = []
            sizes = np.array([count_pixels(value) for value in values])
            for first, last in cut_rows(sizes, BLOCK_ROWS, STEP_PIXELS):
                images, odd = zip(*pool.map(_decode, values[first:last]), strict=True)
                made += dropper.drop(values[first:last], images, odd, rows[first:last])
                bar.update(last - first)
            write_table(_to_table(rows, made), path)
    return PatchColumn(column, folder)


def _decode(file: bytes | None) -> "tuple[Image | None, list[str]]":
    if count_pixels(file) > LARGEST_PIXELS:
        return None, [TOO_LARGE]
    return decode_image(file)


def _to_table(rows: Int[ndarray, " b"], made: list[dict[str, Any]]) -> "pa.Table":
    import pyarrow as pa

    types = {
        "record": pa.struct([*FIELDS.items()]),
        "reason": pa.string(),
        "psnr": pa.float64(),
        "psnr_of_kept": pa.float64(),
        "is_changed": pa.bool_(),
        "kept_share": pa.float64(),
        "source_bytes": pa.int64(),
        "lost": pa.list_(pa.string()),
    }
    columns = {name: pa.array([m[name] for m in made], kind) for name, kind in types.items()}
    return pa.table({"row": pa.array(rows), **columns})


class PatchColumn:
    """The records of folder/patches as one column, read block by block."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.files = sorted((folder / FOLDER).glob("*.parquet"))

    @property
    def feature(self) -> dict[str, Any]:
        """The column's type for `datasets`."""
        from datasets import Value

        return {name: Value(kind) for name, kind in FIELDS.items()}

    def slice(self, start: int, length: int) -> "pa.ChunkedArray":
        """Give the records of kept rows start ... start + length."""
        import pyarrow as pa

        first, last = start // BLOCK_ROWS, -(-(start + length) // BLOCK_ROWS)
        table = pa.concat_tables(_read(self.files[first:last], ["record"]))
        return table["record"].slice(start - first * BLOCK_ROWS, length)

    def summarise(self) -> dict[str, Any]:
        """Say what manifest.json records: who kept the original and why, PSNR, answers, bytes.

        PSNR and answers are those of the images that lost patches.
        """
        import pyarrow as pa

        parts = [part.drop_columns(["record"]) for part in _read(self.files)]
        table = pa.concat_tables(parts).to_pandas()
        coded, rows = table[table.reason.isna()], table.groupby("reason").row
        changed = coded.is_changed.dropna()
        reasons = (NOT_PLAIN, TOO_LARGE, OWN_COLOURS, NO_SMALLER, BELOW_GATE)
        return {
            "images": len(table),
            "coded": len(coded),
            "originals": {r: rows.get_group(r).tolist() for r in reasons if r in rows.groups},
            "kept_share": float(np.mean(table.kept_share.to_numpy())),
            "psnr_of_holes": _mean_and_lowest(coded.psnr),
            "psnr_of_kept": _mean_and_lowest(coded.psnr_of_kept),
            "answers": {"compared": len(changed), "changed": int(changed.sum())},
            "source_bytes": int(table.source_bytes.sum()),
            "lost": dict(Counter(what for lost in coded.lost for what in lost)),
        }


def _read(files: list[Path], columns: list[str] | None = None) -> "Iterator[pa.Table]":
    for path in files:
        with open_parquet(path) as file:
            yield file.read(columns=columns)


def _mean_and_lowest(values: "pd.Series") -> dict[str, float | None]:
    """Summarise PSNRs in dB; images without any loss (infinite ones) do not count."""
    finite = values.to_numpy(dtype=float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return {"mean": None, "lowest": None}
    return {"mean": round(float(np.mean(finite)), 3), "lowest": round(float(finite.min()), 3)}


def stored_bytes(files: list[Path], column: str) -> int:
    """Count the bytes that a column takes in parquet files, masks and sizes included."""
    leaves = {f"{column}.{name}" for name in FIELDS}
    total = 0
    for file in files:
        with open_parquet(file) as opened:
            meta = opened.metadata
        groups = (meta.row_group(group) for group in range(meta.num_row_groups))
        found = (group.column(k) for group in groups for k in range(meta.num_columns))
        total += sum(leaf.total_compressed_size for leaf in found if leaf.path_in_schema in leaves)
    return total


def check_smaller(found: dict[str, Any], stored: int) -> None:
    """Raise if no image got smaller, or all together take no less (`stored`) than in the source."""
    if found["coded"] and stored < found["source_bytes"]:
        return
    originals = found["originals"]
    reason = max(originals, key=lambda what: len(originals[what]), default=NO_SMALLER)
    advice = "leave --drop-ratio out"
    if reason == NO_SMALLER:
        advice = f"use --patch-coding webp (lossy), or {advice}"
    elif reason == BELOW_GATE:
        advice = f"lower --min-psnr, or {advice}"
    raise InputError(
        f"dropping patches would not make the images smaller: {found['source_bytes']:,} bytes in "
        f"the source, {stored:,} stored, and {sum(map(len, originals.values())):,} of "
        f"{found['images']:,} images keep their original (mostly {reason}); nothing was kept: "
        + advice
    )
