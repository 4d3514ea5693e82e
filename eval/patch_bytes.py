"""Bytes of images with dropped patches, by coding, against the best lossless coding of the whole.

    python eval/patch_bytes.py

Reads the folder of real data (DQ_TEST_DATA, default ../shared/data): CIFAR-10, and photographs of
flickr8k that are large enough, scaled to 224 px on the shorter side and cut to squares. A quarter
of the patches is dropped, at random and, where a classifier is named, by GradCAM++. "Best
lossless" is the smallest of PNG and several settings of lossless WebP, image by image. Bytes of a
store are those of the data and of the masks; "in parquet" they are those of the column in a file
of a run, which holds the first bytes that all share once. PSNR is that of the kept pixels. Rates
are images a second of CPU time of one thread. Every record that is exact is decoded and compared.
"""

import io
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from imagecodecs import jpegxl_encode
from measure import DATA, flags, known_model, need, save
from PIL import Image

from dq_multimodal.config import PatchCoding
from dq_multimodal.patches.codec import FIELDS, decode_patches, encode_patches, fill_smoothly
from dq_multimodal.patches.grid import count_dropped, drop_lowest, grid_shape, keep_pixels

DROP_RATIO = 0.25
SIDE = 224
GROUP = 256
QUALITIES = (95, 80, 40)


def main() -> None:
    """Measure and write."""
    parser = flags(__doc__, "patch_bytes")
    parser.add_argument("--classifier", help="Folder for GradCAM++ masks on CIFAR-10.")
    parser.add_argument("--cifar_rows", type=int, default=GROUP)
    parser.add_argument("--photographs", type=int, default=12)
    args = parser.parse_args()
    sources = {
        "cifar10": ("cifar10/train-00000-of-00005.parquet", "img", args.cifar_rows, (4, 8)),
        "photographs": ("flickr8k_1k.parquet", "image", args.photographs, (16,)),
    }
    need(*(path for path, *_ in sources.values()))
    document: dict[str, Any] = {
        "classifier": known_model(args.classifier) if args.classifier else None,
        "drop_ratio": DROP_RATIO,
    }
    for name, (path, column, n_rows, patch_sizes) in sources.items():
        images, labels = read(DATA / path, column, n_rows)
        whole = [min(len(png(image)), len(lossless_webp(image))) for image in images]
        found: dict[str, Any] = {
            "images": len(images),
            "best_lossless_bytes": sum(whole),
            "png_bytes": sum(len(png(image)) for image in images),
            "stores": [],
        }
        for patch_size in patch_sizes:
            masks = {"random": random_masks(images, patch_size)}
            if args.classifier and name == "cifar10":
                masks["GradCAM++"] = cam_masks(images, labels, patch_size, args.classifier)
            for kind, keep in masks.items():
                found["stores"] += measure(images, keep, patch_size, kind, sum(whole))
        document[name] = found
        for line in found["stores"]:
            if line["is_lossless"]:
                about = f"{line['patch_size']:2} px {line['masks']:10} {line['coding']:34}"
                print(f"{name:12} {about} {line['ratio']:.3f}")
    save(args.output, document)


def read(path: Path, column: str, n_rows: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Read RGB pictures and their labels (-1 without); those without labels become squares."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    has_labels = "label" in table.column_names
    images: list[np.ndarray] = []
    for value in table[column].to_pylist():
        image = Image.open(io.BytesIO(value["bytes"])).convert("RGB")
        if has_labels or min(image.size) >= SIDE:
            images.append(np.asarray(image if has_labels else square(image)))
        if len(images) == n_rows:
            break
    labels = table["label"].to_numpy()[:n_rows] if has_labels else np.full(len(images), -1)
    return images, labels


def square(image: Image.Image) -> Image.Image:
    """Scale the shorter side to 224 px, and cut the middle out."""
    width, height = (max(SIDE, round(SIDE * side / min(image.size))) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + SIDE, top + SIDE))


def encode(image: np.ndarray, kind: str, **options: Any) -> bytes:
    """Encode a picture by Pillow."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def png(image: np.ndarray) -> bytes:
    """Encode as PNG."""
    return encode(image, "PNG", optimize=True)


def webp(image: np.ndarray, quality: int) -> bytes:
    """Encode as lossy WebP."""
    return encode(image, "WEBP", quality=quality, method=6)


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encode as JPEG."""
    return encode(image, "JPEG", quality=quality, optimize=True)


def lossless_webp(image: np.ndarray) -> bytes:
    """Encode as lossless WebP, by the best of its settings."""
    settings = ({"method": m, "quality": q} for m, q in ((4, 50), (4, 100), (6, 100)))
    return min((encode(image, "WEBP", lossless=True, exact=True, **s) for s in settings), key=len)


def random_masks(images: list[np.ndarray], patch_size: int) -> list[np.ndarray]:
    """Drop a quarter of the patches of each at random."""
    rng = np.random.default_rng(0)
    made = []
    for image in images:
        n_patches = math.prod(grid_shape(*image.shape[:2], patch_size))
        scores = rng.random((1, n_patches))
        made.append(drop_lowest(scores, count_dropped(n_patches, DROP_RATIO))[0])
    return made


def cam_masks(
    images: list[np.ndarray], labels: np.ndarray, patch_size: int, classifier: str
) -> list[np.ndarray]:
    """Drop the quarter of the patches that matters least to a classifier."""
    import torch

    from dq_multimodal.models.image import load_image_model
    from dq_multimodal.patches.attribution import GradCamPlusPlus, patch_scores

    model = load_image_model(classifier)
    keep = []
    for start in range(0, len(images), 250):
        batch = model.to_input(np.stack(images[start : start + 250]))
        with GradCamPlusPlus(model.net) as explain:
            maps = explain(batch, torch.tensor(labels[start : start + 250])).maps
        scores = patch_scores(maps, patch_size).numpy()
        keep += list(drop_lowest(scores, count_dropped(scores.shape[1], DROP_RATIO)))
    return keep


def retile(image: np.ndarray, keep: np.ndarray, patch_size: int) -> np.ndarray:
    """Put the kept patches (edges padded) side by side, about as wide as high."""
    rows, columns = grid_shape(*image.shape[:2], patch_size)
    pad = (rows * patch_size - image.shape[0], columns * patch_size - image.shape[1])
    padded = np.pad(image, ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
    shape = (rows, patch_size, columns, patch_size, 3)
    return tile(padded.reshape(shape).swapaxes(1, 2).reshape(-1, patch_size, patch_size, 3)[keep])


def tile(patches: np.ndarray) -> np.ndarray:
    """Lay patches out row by row; the last row is filled with black."""
    n, side = len(patches), patches.shape[1]
    divisors = [k for k in range(1, n + 1) if n % k == 0 and k * k <= n]
    width = n // max(divisors)
    if width > 4 * max(divisors):  # no shape near a square: fill up
        width = math.ceil(math.sqrt(n))
    height = math.ceil(n / width)
    full = np.zeros((height * width, *patches.shape[1:]), dtype=np.uint8)
    full[:n] = patches
    return (
        full.reshape(height, width, side, side, 3)
        .swapaxes(1, 2)
        .reshape(height * side, width * side, 3)
    )


def measure(
    images: list[np.ndarray], keep: list[np.ndarray], patch_size: int, kind: str, whole: int
) -> list[dict[str, Any]]:
    """Store the kept patches in every way, and say bytes and PSNR of each."""
    n_mask = sum(math.ceil(len(marks) / 8) for marks in keep)
    pixels = [
        keep_pixels(marks[None], *image.shape[:2], patch_size)[0]
        for image, marks in zip(images, keep, strict=True)
    ]
    tiles = [retile(image, marks, patch_size) for image, marks in zip(images, keep, strict=True)]
    smooth = [fill_smoothly(i[None], p[None])[0] for i, p in zip(images, pixels, strict=True)]

    def line(coding: str, n_bytes: int, psnr: float | None = None) -> dict[str, Any]:
        total = n_bytes + n_mask
        return {
            "patch_size": patch_size,
            "masks": kind,
            "coding": coding,
            "bytes": total,
            "ratio": round(total / whole, 4),
            "is_lossless": psnr is None,
            "psnr": None if psnr is None else round(psnr, 2),
        }

    lines = []
    for coding in ("exact", "exact-small"):
        lines += exact(images, keep, patch_size, coding, line)
    lines.append(line("WebP lossless, re-tiled", sum(len(lossless_webp(t)) for t in tiles)))
    if len({image.shape for image in images}) == 1 and len(images) == GROUP:
        side = math.isqrt(GROUP)
        bands = [np.concatenate(tiles[k : k + side], axis=1) for k in range(0, GROUP, side)]
        together = jpegxl_encode(np.concatenate(bands), lossless=True, effort=7, numthreads=1)
        lines.append(line(f"JPEG XL, {GROUP} images in one", len(together)))
    ways: dict[str, tuple[list[np.ndarray], list[np.ndarray] | None, Callable[..., bytes]]] = {
        "WebP, holes smooth": (smooth, pixels, webp),
        "WebP, re-tiled": (tiles, None, webp),
        "JPEG, holes smooth": (smooth, pixels, jpeg),
    }
    if kind == "random":
        everything = [np.ones_like(marks) for marks in keep]
        whole_line = exact(images, everything, patch_size, "exact", line)[0]
        lines.append(line("exact of the whole", whole_line["bytes"] - 2 * n_mask))
        ways["WebP of the whole"] = (images, None, webp)
    for coding, (pictures, marks, encode_by) in ways.items():
        for quality in QUALITIES:
            files = [encode_by(picture, quality) for picture in pictures]
            n_bytes = sum(map(len, files)) - (n_mask if pictures is images else 0)
            psnr = psnr_of(files, pictures, marks)
            lines.append(line(f"{coding}, quality {quality}", n_bytes, psnr))
    return lines


def exact(
    images: list[np.ndarray],
    keep: list[np.ndarray],
    patch_size: int,
    coding: PatchCoding,
    line: Callable[[str, int], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Store every image by itself, read it back, and give lines of its bytes and rates."""
    pairs = [(image[None], marks[None]) for image, marks in zip(images, keep, strict=True)]
    started = time.process_time()
    records = [encode_patches(*pair, patch_size, coding)[0] for pair in pairs]
    encoded = time.process_time()
    decoded = [decode_patches([record])[0] for record in records]
    ended = time.process_time()
    for (image, marks), found in zip(pairs, decoded, strict=True):
        is_kept = keep_pixels(marks, *image.shape[1:3], patch_size)
        if not np.array_equal(found[is_kept], image[is_kept]):
            raise RuntimeError("kept pixels are not what they were")
    found = line(coding, sum(len(record["data"]) for record in records))
    rates = {"encode": encoded - started, "decode": ended - encoded}
    found["images_per_second"] = {key: round(len(images) / s, 1) for key, s in rates.items()}
    n_stored = in_parquet(records) - sum(len(record["mask"]) for record in records)
    return [found, line(f"{coding}, in parquet", n_stored)]


def in_parquet(records: list[Any]) -> int:
    """Give the bytes of the column in a file as a run writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Value

    from dq_multimodal.stages.patching import stored_bytes
    from dq_multimodal.stages.subset import writer_options

    schema = Features({"image": {name: Value(kind) for name, kind in FIELDS.items()}}).arrow_schema
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        with pq.ParquetWriter(path, schema, **writer_options(schema, "image")) as writer:
            writer.write_table(pa.table({"image": records}, schema=schema))
        return stored_bytes([path], "image")


def psnr_of(
    files: list[bytes], pictures: list[np.ndarray], marks: list[np.ndarray] | None
) -> float:
    """Give the mean PSNR of files against the pixels of pictures that count."""
    found = []
    for k, (file, picture) in enumerate(zip(files, pictures, strict=True)):
        made = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(np.float64)
        error = (made - picture) ** 2
        mse = (error if marks is None else error[marks[k]]).mean()
        found.append(10 * math.log10(255**2 / max(mse, 1e-3)))
    return float(np.mean(found))


if __name__ == "__main__":
    main()
