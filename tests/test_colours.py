"""What patch records would lose of an image beside its pixels: kept, given back, or said."""

import io
import struct
import zlib

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from imagecodecs import png_encode, tiff_encode
from nasty_images import image_rows, save
from PIL import Image as Pictures
from PIL import ImageCms, PngImagePlugin

from dq_multimodal import Run, compress, verify
from dq_multimodal.data.pixels import DEEP, SEVERAL, decode_image
from dq_multimodal.patches import restore

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth(k, side=48):
    rows, columns = np.mgrid[:side, :side] / side
    waves = [np.sin(3 * rows + k), np.cos(4 * columns * (k % 3)), rows * columns]
    noise = np.random.default_rng(k).normal(0, 3, (side, side, 3))
    return np.clip(128 + 90 * np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep(k, n):
    """An image of 16 bits a channel: 1 is grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    low = np.random.default_rng(k).integers(0, 256, (48, 48, 4))
    high = np.concatenate([smooth(k), smooth(k)[..., :1]], axis=2).astype(int)
    return (high * 256 + low)[..., :n].squeeze().astype(np.uint16)


DEEP_FILES = {f"png {n}": lambda k, n=n: png_encode(deep(k, n)) for n in (1, 2, 3, 4)}
DEEP_FILES |= {f"tiff {n}": lambda k, n=n: tiff_encode(deep(k, n)) for n in (1, 3, 4)}
DEEP_FILES |= {
    "ppm": lambda k: b"P6\n48 48\n65535\n" + deep(k, 3).astype(">u2").tobytes(),
    "jpeg 2000": lambda k: save(Pictures.fromarray(deep(k, 1)), "JPEG2000"),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_more_than_8_bits_a_channel_are_seen(name):
    image, odd = decode_image(DEEP_FILES[name](1))
    assert image.mode == "RGB" and odd[0] == DEEP and odd.count(DEEP) == 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000", "AVIF", "WEBP", "BMP", "SGI"])
def test_8_bits_are_not_called_more(kind):
    assert decode_image(save(Pictures.fromarray(smooth(0)), kind))[1] == []


def drop(files, small_classifier, folder):
    settings = {"method": "dq", "keep_ratio": 1.0, "n_bins": 2, "report": False}
    settings |= {"embedding_model": str(small_classifier), "drop_ratio": 0.25}
    image_rows(files, "image").to_parquet(folder / "d.parquet")
    return compress(str(folder / "d.parquet"), output_dir=folder / "r", **settings)


def test_files_that_hold_more_than_records_keep_the_original(small_classifier, tmp_path, cli):
    plain = [save(Pictures.fromarray(smooth(k))) for k in range(10)]
    gamma = chunk(b"gAMA", struct.pack(">I", 100000))
    second = {"save_all": True, "append_images": [Pictures.fromarray(smooth(9))]}
    odd = {
        **{name: make(1) for name, make in DEEP_FILES.items()},
        "cmyk": save(Pictures.fromarray(smooth(1)).convert("CMYK"), "TIFF"),
        "gamma": plain[1][:33] + gamma + plain[1][33:],
        "two pictures": save(Pictures.fromarray(smooth(1)), "MPO", quality=95, **second),
    }
    image_rows([*odd.values(), *plain], "image").to_parquet(tmp_path / "d.parquet")
    said = cli(
        *("compress", "d.parquet", "--method", "dq", "--keep-ratio", 1.0, "--n-bins", 2),
        *("--embedding-model", small_classifier, "--drop-ratio", 0.25, "--output-dir", "r"),
        "--no-report",
    ).stdout
    subset = Run(tmp_path / "r").subset
    codings = subset[:]["image"]
    for (name, file), record in zip(odd.items(), codings, strict=False):
        assert (record["coding"], record["data"]) == ("original", file), name
    assert {record["coding"] for record in codings[len(odd) :]} == {"jxl"}
    assert f"{len(DEEP_FILES)} rows with {DEEP}, still candidates" in said
    assert "1 row keeps its original, an image with a gamma or primaries of its own" in said
    assert f"1 row with {SEVERAL}" in said and "animation" not in said
    assert "verify" not in said and [c.result for c in verify(tmp_path / "r")] == ["passed"] * 5


def test_a_colour_profile_comes_back(small_classifier, tmp_path):
    other = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    profiles = [SRGB, other, None]
    files = []
    for k in range(30):
        image = Pictures.fromarray(smooth(k)).convert("L" if k % 5 == 4 else "RGB")
        files.append(save(image, icc_profile=profiles[k % 3]))
    srgb_gamma = chunk(b"gAMA", struct.pack(">I", 45455))
    files[2] = files[2][:33] + srgb_gamma + files[2][33:]  # what most writers add: nothing lost
    run = drop(files, small_classifier, tmp_path)
    assert run.manifest["patches"]["coded"] == 30
    path = str(tmp_path / "r" / "subset" / "*.parquet")
    back = restore(load_dataset("parquet", data_files=path, split="train"))
    for k, row in enumerate(back):
        assert row["image"].info.get("icc_profile") == profiles[k % 3]
    assert verify(run)[2].result == "passed"
    assert not any("lose" in note for note in run.manifest["notes"])


def test_a_store_without_profiles_is_read_as_before(small_classifier, tmp_path):
    files = [save(Pictures.fromarray(smooth(k))) for k in range(8)]
    run = drop(files, small_classifier, tmp_path)
    records = run.subset[:]["image"]
    assert records[0].pop("icc_profile") is None
    old = [{key: record[key] for key in records[0]} for record in records]
    back = restore(Dataset.from_dict({"image": old}))
    new = restore(run.subset)
    assert all(back[k]["image"].tobytes() == new[k]["image"].tobytes() for k in range(8))


def test_what_files_say_beside_their_pixels_is_said_to_be_lost(small_classifier, tmp_path):
    exif, turned = Pictures.Exif(), Pictures.Exif()
    exif[0x010F] = "Maker"
    turned[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "what it shows")
    more = [{"exif": exif}, {"exif": exif}, {"exif": turned}, {"pnginfo": text}, {}]
    files = [save(Pictures.fromarray(smooth(k)), **some) for k, some in enumerate(more)]
    run = drop(files, small_classifier, tmp_path)
    assert run.manifest["patches"]["lost"] == {"EXIF": 2, "comments": 1}
    note = (
        "patch records hold pixels and colour profile alone; images lose: EXIF of 2, comments of 1"
    )
    assert note in run.manifest["notes"]


def test_files_are_read_to_their_end_when_only_checked():
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        data = save(Pictures.fromarray(smooth(1)), "JPEG", quality=90, **options)
        for end in range(2, len(data) + 1, 7):
            full, quick = (decode_image(data[:end], is_check=c)[0] for c in (False, True))
            assert (full is None) == (quick is None), (options, end)
    assert Pictures.open(io.BytesIO(data)).size == (48, 48)
