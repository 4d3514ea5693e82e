"""The stage that drops patches: records of all kept images, written block by block, resumable."""

import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.config import CompressConfig, Fill, InputError
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.data.columns import match_classes, read_classes
from dq_multimodal.data.pixels import (
    GREY,
    ORIENTATION_TAG,
    ROTATED,
    decode_image,
    read_bytes,
    undecoded,
)
from dq_multimodal.models.image import ImageModel, load_image_model
from dq_multimodal.patches.attribution import GradCamPlusPlus, find_layer, patch_scores
from dq_multimodal.patches.codec import (
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
from dq_multimodal.patches.store import Filler, make_filler
from dq_multimodal.stages.patch_records import (
    BELOW_GATE,
    NO_SMALLER,
    NOT_PLAIN,
    OWN_COLOURS,
    TOO_LARGE,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor

PROBED_ROWS = 64
SRGB_GAMMA = 1 / 2.2
SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""Of white, red, green and blue, as Pillow gives them."""
XMP_OF_PNG = "XML:com.adobe.xmp"


def find_patch_size(dataset: "Dataset", column: str) -> int:
    """Give the default for the largest of the first images; 16 px where none can be read."""
    files = undecoded(dataset.select(range(min(PROBED_ROWS, len(dataset)))), column)
    sides = [
        max(image.size)
        for value in files[column]
        if (image := decode_image(read_bytes(value))[0]) is not None
    ]
    return default_patch_size(max(sides, default=224))


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
        fill: Fill = self.request.fill or ("mae" if self.request.mae_model else "mean")
        self.filler: Filler = make_filler(fill, self.request.mae_model, self.request.device)
        self.fill_name = fill

    def describe(self) -> dict[str, Any]:
        """Say what config.yaml records of the patches."""
        shown = self.model.describe() if self.model is not None else None
        return {"patch_size": self.patch_size, "fill": self.fill_name, "attribution_model": shown}

    def drop(
        self,
        files: list[bytes | None],
        images: "list[Image | None]",
        odd: list[list[str]],
        rows: Int[ndarray, " b"],
    ) -> list[dict[str, Any]]:
        """Make the records of a few images, with what there is to say of each.

        The classifier looks at all of them in one batch; they are coded and filled shape by shape.
        """
        made: list[dict[str, Any]] = [
            self._original(file, TOO_LARGE if TOO_LARGE in what else NOT_PLAIN)
            for file, what in zip(files, odd, strict=True)
        ]
        plain = []
        for k, image in enumerate(images):
            if image is not None and set(odd[k]) <= {GREY, ROTATED}:
                if has_own_colours(image):
                    made[k] = self._original(files[k], OWN_COLOURS)
                else:
                    plain.append(k)
        if not plain:
            return made
        pixels = [np.asarray(images[k]) for k in plain]
        maps, answers = self._look(pixels, self.classes[rows[plain]])
        together: dict[Any, list[int]] = defaultdict(list)
        for place, k in enumerate(plain):
            together[(*pixels[place].shape[:2], GREY in odd[k])].append(place)
        filled: list[UInt8[ndarray, "h w c"]] = list(pixels)
        for (_, _, is_grey), group in together.items():
            batch = np.stack([pixels[place] for place in group])
            batch = batch[..., :1] if is_grey else batch
            at = np.array(group)
            numbers = rows[np.array(plain)[at]]
            keep = self._choose(batch, None if maps is None else maps[at], numbers)
            coding, quality = self.request.patch_coding, self.request.patch_quality
            records = encode_patches(batch, keep, self.patch_size, coding, quality)
            whole, psnr, psnr_of_kept = self._fill(batch, keep, records)
            for n, place in enumerate(group):
                k, filled[place] = plain[place], whole[n]
                image = images[k]
                assert image is not None
                records[n][PROFILE] = image.info.get(PROFILE) or None
                facts = {
                    "lost": name_metadata(image),
                    "psnr": float(psnr[n]),
                    "psnr_of_kept": float(psnr_of_kept[n]),
                    "is_changed": None,
                    "kept_share": float(keep[n].mean()),
                    "source_bytes": len(files[k] or b""),
                }
                made[k] = self._judge(files[k], records[n], facts)
        if answers is not None:
            new = self._answer(filled)
            for place, k in enumerate(plain):
                if made[k]["reason"] is None:
                    made[k]["is_changed"] = bool(new[place] != answers[place])
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
        batch = self.model.to_input(self._squares(self.model, pixels))
        with GradCamPlusPlus(self.model.net) as explain:
            found = explain(batch, torch.from_numpy(classes).to(self.model.device))
        return found.maps, found.logits.argmax(dim=1).cpu().numpy()

    def _answer(self, pixels: list[UInt8[ndarray, "_ _ c"]]) -> Int[ndarray, " b"]:
        assert self.model is not None
        logits = self.model.look(self._squares(self.model, pixels))[1]
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

    def _squares(
        self, model: ImageModel, pixels: list[UInt8[ndarray, "_ _ c"]]
    ) -> UInt8[ndarray, "b size size 3"]:
        """Scale whole images, edges included, to the input of the model."""
        from PIL import Image

        size = (model.size, model.size)
        return np.stack(
            [
                np.broadcast_to(image, (*size, 3))
                if image.shape[:2] == size
                else np.asarray(
                    Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3))).resize(
                        size, model.resample
                    )
                )
                for image in pixels
            ]
        )

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

    def _judge(self, file: bytes | None, record: Record, facts: dict[str, Any]) -> dict[str, Any]:
        gate = self.request.min_psnr
        reason, profile = None, record.get(PROFILE)
        size = len(record["data"]) + len(record["mask"])
        size += len(zlib.compress(profile)) if profile else 0  # as files hold it
        if gate is not None and facts["psnr"] < gate:
            reason = BELOW_GATE
        elif size >= facts["source_bytes"]:
            reason = NO_SMALLER
        if reason is not None:
            return self._original(file, reason)
        return {"record": record, "reason": None, **facts}

    def _original(self, file: bytes | None, reason: str) -> dict[str, Any]:
        record = None
        if file is not None:
            record = Record(
                coding=ORIGINAL, height=0, width=0, channels=0, patch_size=0, mask=b"", data=file
            )
        unknown = dict.fromkeys(("psnr", "psnr_of_kept", "is_changed"))
        size = len(file or b"")
        return {
            "record": record,
            "reason": reason,
            **unknown,
            "kept_share": 1.0,
            "lost": [],
            "source_bytes": size,
        }


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


def _check_layer(model: ImageModel) -> None:
    """Raise unless GradCAM++ knows where to look in a model."""
    try:
        find_layer(model.net)
    except InputError:
        raise InputError(
            f"gradcam++ does not know the layers of {model.name}: name another classifier with "
            "--attribution-model, or use --attribution random"
        ) from None


def make_dropper(
    dataset: "Dataset", request: CompressConfig, adapter: Adapter | None
) -> PatchDropper:
    """Find the models and the patch size that a request means.

    Raises:
        InputError: If a model cannot be had, or the one that is to say what matters is no
            classifier.
    """
    assert isinstance(adapter, ImageAdapter)  # choose_adapter lets drop_ratio pass for images only
    model, name = None, request.attribution_model or request.embedding_model
    if request.attribution == "gradcam++" or name is not None:
        own = name is not None and name != adapter.model_name
        model = load_image_model(str(name), request.device, request.dtype) if own else adapter.model
        if not model.n_classes and request.attribution == "gradcam++":
            raise InputError(
                f"gradcam++ needs a classifier, and {model.name} has no classes: name one with "
                "--attribution-model, or use --attribution random"
            )
    classes = np.full(len(dataset), -1, dtype=np.int64)
    if model is not None:
        if request.attribution == "gradcam++":
            _check_layer(model)
        found, labels = read_classes(dataset, adapter.label_column)
        classes = match_classes(found, labels, model.labels)
        if (found >= 0).any() and (classes < 0).all() and request.attribution == "gradcam++":
            adapter.notes.append(
                f"{model.name} does not know the labels: patches are chosen by its own answers"
            )
    size = request.patch_size
    filler_size = None
    if request.mae_model is not None:
        filler_size = load_mae(request.mae_model).patch_size
        if size is not None and size != filler_size:
            raise InputError(
                f"patch_size must be that of {request.mae_model}, {filler_size}, got {size}"
            )
    size = size or filler_size or find_patch_size(dataset, adapter.column)
    return PatchDropper(request, adapter.column, size, model, classes)
