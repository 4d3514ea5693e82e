"""Image files for tests: one of every nasty kind, with what has to be said of it."""

import io

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from dq_multimodal.data import pixels


def picture(size=(20, 14), seed=0):
    width, height = size
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    base = np.stack([rows * 9, columns * 7, rows + columns * 5], axis=2)
    noisy = base + rng.integers(0, 30, base.shape)
    return Image.fromarray((noisy % 256).astype(np.uint8))


def save(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_rows(files, column="img", **columns):
    """Give a dataset of image files, some of them None, and of other columns."""
    files = [None if file is None else {"bytes": file, "path": None} for file in files]
    return Dataset.from_dict({column: files, **columns}).cast_column(column, ImageFeature())


def nasty_images():
    """Give name -> (file, remarks)."""
    rgb = picture()
    clear = rgb.copy()
    clear.putalpha(128)
    grey = rgb.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    real = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    whole = Image.fromarray(np.asarray(grey).astype(np.int32) * 200)
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg = save(picture((200, 150)), "JPEG", quality=95)
    frames = [picture(seed=k).convert("P") for k in range(3)]
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    return {
        "plain": (save(rgb), []),
        "jpeg": (save(rgb, "JPEG"), []),
        "grey": (save(grey), [pixels.GREY]),
        "one bit": (save(grey.convert("1")), [pixels.GREY]),
        "grey with alpha": (save(clear.convert("LA")), [pixels.TRANSPARENT]),
        "opaque alpha": (save(rgb.convert("RGBA")), []),
        "alpha": (save(clear), [pixels.TRANSPARENT]),
        "palette": (save(palette), [pixels.OTHER_COLOURS]),
        "palette with a clear colour": (save(palette, transparency=0), [pixels.TRANSPARENT]),
        "cmyk": (save(rgb.convert("CMYK"), "JPEG"), [pixels.OTHER_COLOURS]),
        "16 bit": (save(deep), [pixels.DEEP]),
        "32 bit": (save(whole, "TIFF"), [pixels.DEEP]),
        "float": (save(real, "TIFF"), [pixels.DEEP]),
        "rotated": (save(rgb, "JPEG", exif=turned), [pixels.ROTATED]),
        "gif animation": (
            save(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            [pixels.ANIMATED, pixels.OTHER_COLOURS],
        ),
        "webp animation": (
            save(rgb, "WEBP", save_all=True, append_images=[picture(seed=9)]),
            [pixels.ANIMATED],
        ),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], [pixels.CUT_SHORT]),
        "truncated png": (save(rgb)[:-40], [pixels.CUT_SHORT]),
        "truncated header": (jpeg[:30], None),
        "zero bytes": (b"", [pixels.EMPTY]),
        "text": (b"this is no image, whatever its name says", [pixels.UNREADABLE]),
        "none": (None, [pixels.NO_IMAGE]),
    }
