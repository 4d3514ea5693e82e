"""What dropping patches did to the images, as the report shows it."""

import io

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as Pillow

from dq_multimodal import compress
from dq_multimodal.report.collect import collect


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file of 24 smooth pictures of 48 px."""
    files = []
    for k in range(24):
        corners = np.random.default_rng(k).integers(0, 255, (3, 3, 3), dtype=np.uint8)
        file = io.BytesIO()
        Pillow.fromarray(corners).resize((48, 48), Pillow.BICUBIC).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    path = tmp_path_factory.mktemp("pictures") / "pictures.parquet"
    Dataset.from_dict({"img": files}).cast_column("img", Image()).to_parquet(path)
    return path


def open_webp(data):
    return Pillow.open(io.BytesIO(data))


def test_examples_are_original_holes_and_filling(source, tmp_path):
    settings = {"method": "random", "keep_ratio": 0.5, "drop_ratio": 0.25, "fill": "mean"}
    run = compress(str(source), output_dir=tmp_path, attribution="random", report=False, **settings)
    dataset = Dataset.from_parquet(str(source), cache_dir=str(tmp_path / "cache"))
    found = collect(tmp_path, run.config, run.manifest, None, dataset).examples
    assert len(found) == 6 and len({shown.row for shown in found}) == 6
    kept = set(run.subset["dq_row"])
    for shown in found:
        assert shown.row in kept
        original = np.asarray(dataset[shown.row]["img"]).astype(int)
        assert (np.asarray(open_webp(shown.original)) == original).all()  # lossless where small
        holed = np.asarray(open_webp(shown.holed).convert("RGBA"))
        filled = np.asarray(open_webp(shown.filled)).astype(int)
        is_hole = holed[..., 3] == 0
        assert is_hole.mean() == pytest.approx(0.25) and shown.kept_share == 0.75
        assert (filled[~is_hole] == original[~is_hole]).all()
        assert (holed[~is_hole][:, :3] == original[~is_hole]).all()
        error = np.square(filled - original)[is_hole].mean()
        assert shown.psnr == pytest.approx(10 * np.log10(255**2 / error))
    lowest = run.manifest.patches.psnr_of_holes.lowest
    assert lowest <= min(shown.psnr for shown in found) + 1e-3
    without = collect(tmp_path, run.config, run.manifest, None, None).examples
    assert [shown.row for shown in without] == [shown.row for shown in found]
    assert all(shown.original is None and shown.psnr is None for shown in without)
