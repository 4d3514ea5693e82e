"""report.html of a condensed set: what it shows is what the set holds, and it stays small."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from condensed_sets import NAMES, make_rows, stand_in
from datasets import ClassLabel
from opened_pages import SIZES, Opened
from PIL import Image as Pillow
from tiny_real import make_real

from dq_multimodal import condense
from dq_multimodal.condensation import page as page_module
from dq_multimodal.condensation.page import draw_sheet, find_nearest, make_page
from dq_multimodal.report import rows as report_rows

EVIL = ("<img src=x onerror=window.pwned=1>", "</style><script>window.pwned=1</script>")


@pytest.fixture
def learner(monkeypatch):
    return stand_in(monkeypatch)


def page_of(made):
    return (made.path / "report.html").read_text(encoding="utf-8")


def pictures(text):
    """The pictures of a page by what is said of them, in their order."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/webp;base64,([^"]*)">', text)
    files = [(alt, io.BytesIO(base64.b64decode(data))) for alt, data in found]
    return [(alt, np.asarray(Pillow.open(file))) for alt, file in files]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_nearest_are_those_of_a_plain_search(channels, monkeypatch):
    monkeypatch.setattr(page_module, "BLOCK_NUMBERS", 200)  # several blocks a class
    real = make_real(31, n_classes=3, channels=channels)
    real = replace(real, mean=real.mean * 0.9, spread=real.spread * torch.rand_like(real.spread))
    pixels = np.random.default_rng(0).random((6, channels, 8, 8)).astype(np.float32)
    found = find_nearest(pixels, real)
    mean, spread = real.mean.numpy(), real.spread.numpy()
    theirs = (real.images.numpy() / 255 - mean) / spread
    typical = []
    for row in range(6):
        ours = (pixels[row] - mean) / spread
        members = [k for k in range(31) if real.classes[k] == row % 3]
        distance = {k: np.sqrt(np.mean((ours - theirs[k]) ** 2)) for k in members}
        wanted = sorted(members, key=distance.__getitem__)[:3]
        assert found.place[row].tolist() == wanted
        assert np.allclose(found.distance[row], [distance[k] for k in wanted], rtol=1e-5)
    for k in range(31):
        others = [j for j in range(31) if j != k and real.classes[j] == real.classes[k]]
        typical.append(min(np.sqrt(np.mean((theirs[k] - theirs[j]) ** 2)) for j in others))
    assert found.typical == pytest.approx(np.median(typical), rel=1e-5)


def test_a_class_with_few_real_pictures(monkeypatch):
    real = make_real(7, n_classes=3)
    found = find_nearest(np.zeros((3, 1, 8, 8), dtype=np.float32), real)
    assert (found.place >= 0).sum(axis=1).tolist() == [3, 2, 2]
    assert np.isnan(found.distance[1, 2])
    assert np.isnan(find_nearest(np.zeros((3, 1, 8, 8), np.float32), make_real(3)).typical)


def test_the_page_shows_the_set_in_its_order(learner, tmp_path):
    learner.soft, learner.choices = True, [(2, 2, 1), (4, 1, 0)]
    options = {"method": "krr", "learn_labels": True, "multisize": True, "iterations": 5}
    made = condense(make_rows(), images_per_class=3, output_dir=tmp_path / "set", **options)
    text = page_of(made)
    shown = [(alt, image) for alt, image in pictures(text) if alt.startswith("Synthetic")]
    order = [(k, j) for k in range(3) for j in range(3)]
    assert [alt for alt, _ in shown] == [
        f"Synthetic picture {j + 1} of class {NAMES[k]}" for k, j in order
    ]
    for (k, j), (_, image) in zip(order, shown, strict=True):
        assert np.array_equal(image, np.asarray(made.dataset[3 * j + k]["img"]))
    real = learner.calls[0][0]
    near = find_nearest(made.read_pixels(), real)
    wanted = [int(real.rows[place]) for k, j in order for place in near.place[3 * j + k]]
    found = [alt for alt, _ in pictures(text) if alt.startswith("Real")]
    assert found == [f"Real picture, row {row} of the source" for row in wanted]
    soft = learner.given.targets.numpy()[0]
    best, second = np.argsort(-soft)[:2]
    assert f"{NAMES[best]} {soft[best]:.2f}, {NAMES[second]} {soft[second]:.2f}" in text
    points = re.search(r'<polyline points="([^"]*)"', text)[1].split()
    assert len(points) == 5 and points[0].endswith(",0.0") and points[-1] == "640.0,200.0"
    bars = re.findall(r'<rect (?:class="(\w+)" )?x="([\d.]+)" y="[\d.]+" width="([\d.]+)" h', text)
    assert bars == [
        *(("", "0.0", "256.0"), ("", "256.0", "256.0"), ("frozen", "256.0", "256.0")),
        ("", "512.0", "128.0"),
    ]
    assert "<script" not in text and "script-src" not in text
    assert "default-src 'none'" in text and "http" not in re.sub(
        r'http-equiv|src="[^"]*"', "", text
    )


def test_without_the_source_the_page_shows_the_set_alone(learner, tmp_path):
    make_rows().to_parquet(tmp_path / "rows.parquet")
    made = condense(str(tmp_path / "rows.parquet"), images_per_class=2, output_dir=tmp_path / "set")
    before = page_of(made)
    made.write_report()
    assert page_of(made) == before
    (tmp_path / "rows.parquet").unlink()
    made.write_report()
    text = page_of(made)
    assert "The source could not be read" in text and "Real picture" not in text
    assert len(pictures(text)) == 6


def test_what_does_not_fit_is_cut_and_said(learner, tmp_path, monkeypatch):
    made = condense(make_rows(60), images_per_class=9, output_dir=tmp_path / "set")
    config, manifest, pixels = made.config, made.manifest, made.read_pixels()
    real = learner.calls[0][0]

    def show(most):
        monkeypatch.setattr(page_module, "MAX_BYTES", most)
        return make_page(config, manifest, made.dataset, pixels, real)

    whole = show(10**9)
    assert "To keep the page small" not in whole
    size = sum(len(data) for data in re.findall(r'src="([^"]*)"', whole))
    text = show(size // 2)
    n_shown = [alt for alt, _ in pictures(text) if alt.startswith("Synthetic")]
    per_class = len(n_shown) // 3
    assert 2 <= per_class <= 5 and len(n_shown) == 3 * per_class
    assert f"To keep the page small, the first {per_class} of 9 of each class are shown" in text
    text = show(size // 20)
    assert "the first 1 of 9 of each class and the first 1 of 3 classes are shown" in text


def test_many_classes_of_many_pictures_stay_a_few_megabytes(learner, tmp_path):
    """100 classes of 50 pictures of 32 px; noise is what takes most bytes."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (5000, 3, 32, 32), dtype=np.uint8))
    small = condense(make_rows(), images_per_class=2, output_dir=tmp_path / "set")
    names = tuple(f"class {k}" for k in range(100))
    classes = torch.arange(5000) % 100
    rows, level = np.arange(5000), torch.full((3, 1, 1), 0.5)
    real = type(learner.calls[0][0])(images, classes, names, names, rows, level, level)
    manifest = replace(small.manifest, rows=5000, classes=[*names], side=32)
    pixels = rng.random((5000, 3, 32, 32), dtype=np.float32)
    text = make_page(small.config, manifest, small.dataset, pixels, real)
    assert len(text) < 4_500_000
    shown = re.search(r"the first (\d+) of 50 of each class are shown", text)
    assert int(shown[1]) >= 2 and text.count("<details") == 101
    assert len(draw_sheet(pixels, 100)) < 3_000_000


def test_large_pictures_are_scaled_down(learner, tmp_path):
    made = condense(
        make_rows(6, side=120), image_size=120, images_per_class=1, output_dir=tmp_path / "set"
    )
    text = page_of(made)
    assert "Pictures of 120 px are scaled down." in text
    assert {image.shape for _, image in pictures(text)} == {(96, 96, 3)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(browser, learner, tmp_path, size, scheme):
    """It reaches for nothing, runs nothing, does not overflow, and shows pixels as squares."""
    learner.soft, learner.choices = True, [(2, 2, 1)]
    rows = make_rows(label=ClassLabel(names=[*EVIL, "long " * 30]))
    options = {"method": "krr", "learn_labels": True, "multisize": True, "iterations": 5}
    made = condense(rows, images_per_class=3, output_dir=tmp_path / "set", **options)
    with Opened(browser, made.path, size, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not page.evaluate("window.pwned")
        style = "getComputedStyle(document.querySelector('.one img')).imageRendering"
        assert page.evaluate(style) == "pixelated"
        loaded = "[...document.images].every(i => i.complete && i.naturalWidth == 8)"
        assert page.evaluate(loaded) and page.locator("img").count() == 36
        assert page.locator("summary").first.inner_text() == report_rows.clean_name(EVIL[0])
        box = page.locator("#loss svg").bounding_box()
        assert box["width"] > 250 and box["height"] > 100
        page.get_by_text("The choices, one by one").click()
        assert page.locator("#prefixes tbody tr").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
