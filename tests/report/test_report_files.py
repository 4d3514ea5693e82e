"""The files of a report: whole, the same every time, small, and true to the run."""

import json
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import EVIL_TEXTS
from report_runs import TEXT_ROWS, clusters, write_run

from dq_multimodal.core import Bins
from dq_multimodal.report import FILES, duplicates, layout, write_report
from dq_multimodal.report.page import as_json
from dq_multimodal.report.rows import RowReader

FIGURES = ("map.png", "bins.png", "coverage.png")


class Outline(HTMLParser):
    """Collects elements with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def read(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def data_of(page):
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page)
    return json.loads(found[1])


def plain(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page).replace("&nbsp;", " "))


def test_the_same_run_gives_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    from datasets import Dataset

    values = clusters(300)
    made = []
    for name in ("a", "b"):
        config, manifest = write_run(tmp_path / name, values, rows=TEXT_ROWS, has_scores=True)
        dataset = Dataset.from_dict(
            {"instruction": [f"say {k}" for k in range(300)], "output": ["so"] * 300}
        )
        write_report(tmp_path / name, config, manifest, embeddings=values, dataset=dataset)
        files = [*FILES[:2], *(f"figures/{figure}" for figure in FIGURES)]
        made.append([(tmp_path / name / file).read_bytes() for file in files])
    assert made[0] == made[1]
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_the_page_says_is_what_the_run_holds(text_report):
    page, table = read(text_report), pq.read_table(text_report / "selection.parquet")
    assert "<h1>small: 60 of 240 rows kept by adq</h1>" in page
    data = data_of(page)
    points = data["points"]
    assert points["row"] == list(range(240)) and data["nKept"] == 60
    for name in ("kept", "bin", "rank", "order", "stratum"):
        assert points[name] == [int(v) for v in table[name].to_pylist()], name
    kept = np.flatnonzero(points["kept"])
    assert set(points["near"]) <= set(kept.tolist())
    assert all(near != row for near, row in zip(points["near"], points["row"], strict=True))
    assert data["rows"]["3"][0] == "Question number 3: why?"
    long = data["rows"]["239"]
    assert sum(map(len, long)) <= 400 and long[1].endswith("…")
    text = plain(page)
    assert "Texts are cut at 400 characters" in text
    assert "random selection cover" in text or "than random selection" in text
    assert "All 240 rows are drawn" in text and "all 240 rows" in text
    for name in ("representativeness", "diversity", "importance"):
        assert name in text


def test_one_file_that_needs_nothing_else(text_report, image_report, evil_report):
    for folder in (text_report, image_report, evil_report):
        page = read(folder)
        elements = Outline(page).elements
        policy = next(a["content"] for t, a in elements if a.get("http-equiv"))
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "connect" not in policy and "unsafe-eval" not in policy
        for tag, attributes in elements:
            assert tag not in ("link", "iframe", "object", "embed", "base", "form")
            assert not any(name.startswith("on") for name in attributes)
            if tag in ("img", "script"):
                assert attributes.get("src", "data:").startswith("data:")
            if tag == "a":
                assert attributes["href"].startswith("#")
        ids = [a["id"] for _, a in elements if "id" in a]
        assert len(ids) == len(set(ids))


def test_hostile_rows_stay_data(evil_report):
    page = read(evil_report)
    elements = Outline(page).elements
    assert [t for t, _ in elements].count("script") == 2
    assert not [a for t, a in elements if t in ("svg",) and "onload" in a]
    assert not [t for t, a in elements if t == "img"]
    assert page.count("pwned") > 10 and "\x00" not in page
    document = page[page.index("report-data") :]
    document = document[document.index(">") + 1 : document.index("</script>")]
    assert not set("<>&\u2028\u2029") & set(document)
    assert "\u202e" not in page[page.index("<title>") : page.index("</title>")]
    assert len(page) < 1_500_000
    assert "1 row has no embedding" in plain(page)
    shown = data_of(page)["rows"]
    assert shown["0"][0] == EVIL_TEXTS[0] and shown["16"] == shown["16"]
    texts = pq.read_table(evil_report / "map.parquet")["text"].to_pylist()
    assert max(map(len, texts)) <= 502


def test_json_inside_a_page_looks_like_no_markup():
    text = as_json({"a": "</script><!-- & \u2028\u2029 é 😀"})
    assert not set("<>&\u2028\u2029") & set(text) and "é 😀" in text
    assert json.loads(text)["a"] == "</script><!-- & \u2028\u2029 é 😀"
    with pytest.raises(ValueError):
        as_json(float("nan"))


def test_map_file_opens_as_a_dataset(text_report, image_report):
    from datasets import Dataset

    for folder, name in ((text_report, "text"), (image_report, "image")):
        shown = Dataset.from_parquet(str(folder / "map.parquet"), cache_dir=str(folder / "cache"))
        assert {"row", "x", "y", "bin", "kept", "label", "neighbors", name} == set(
            shown.column_names
        )
        for at, row in enumerate(shown):
            ids, distances = row["neighbors"]["ids"], row["neighbors"]["distances"]
            assert ids[0] == at and distances[0] == 0 and distances == sorted(distances)
            assert len(ids) == len(distances) == 16 and max(ids) < len(shown)
            assert 0 <= row["x"] <= 1 and 0 <= row["y"] <= 1
        if name == "image":
            assert shown[0]["image"].size == (96, 96) and len(shown) == 84
        else:
            assert shown[7]["label"] == "odd" and shown[7]["text"].startswith("Question number 7")


def test_pictures_that_cannot_be_read_have_a_place(image_report):
    page = read(image_report)
    images = [a for t, a in Outline(page).elements if t == "img"]
    assert images and all(a["alt"].startswith("Picture of row") for a in images)
    assert all(a["src"].startswith("data:image/webp;base64,") for a in images)
    assert "6 rows have no embedding" in plain(page)


def test_a_random_run_has_neither_bins_nor_map(tmp_path):
    config, manifest = write_run(tmp_path, clusters(50), method="random")
    (tmp_path / "map.parquet").write_bytes(b"of another run")
    write_report(tmp_path, config, manifest, embeddings=None, dataset=None)
    text = plain(read(tmp_path))
    assert "This method makes no bins" in text and "needs the embeddings" in text
    assert "rows are shown by number only" in text and re.search(r"row \d+ kept", text)
    assert not (tmp_path / "map.parquet").exists()
    assert data_of(read(tmp_path))["points"] is None


def test_a_random_run_is_compared_with_another_draw(tmp_path):
    values = clusters(200)
    config, manifest = write_run(tmp_path, values, method="random")
    write_report(tmp_path, config, manifest, embeddings=values, dataset=None)
    assert "other random draws" in plain(read(tmp_path))


def test_where_random_covers_better_the_page_says_so(tmp_path):
    values = clusters(400)
    kept = np.zeros(400, dtype=bool)
    kept[np.argsort(values[:, 0])[:40]] = True  # all from one corner
    config, manifest = write_run(tmp_path, values, kept=kept)
    write_report(tmp_path, config, manifest, embeddings=values, dataset=None)
    assert "random selection covers the data better than dq" in plain(read(tmp_path))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_outer_products_are_compared_as_such(tmp_path, similarity):
    values = clusters(120)
    config, manifest = write_run(tmp_path, values, similarity=similarity, n_left=4)
    write_report(tmp_path, config, manifest, embeddings=values, dataset=None)
    points = data_of(read(tmp_path))["points"]
    wide = np.einsum("ni,nj->nij", values[:, :4], values[:, 4:]).reshape(120, -1)
    row, near = 17, points["near"][17]
    if similarity == "cosine":
        expected = wide[row] @ wide[near] / np.linalg.norm(wide[row]) / np.linalg.norm(wide[near])
    else:
        expected = np.linalg.norm(wide[row] - wide[near])
    assert points["similarity"][row] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_tiny_runs_have_a_report(tmp_path, n_rows):
    values = clusters(n_rows)
    config, manifest = write_run(tmp_path, values, n_bins=1, keep_ratio=0.5 if n_rows > 1 else 1)
    write_report(tmp_path, config, manifest, embeddings=values, dataset=None)
    assert len(data_of(read(tmp_path))["points"]["row"]) == n_rows
    blank = tmp_path / "blank"
    config, manifest = write_run(blank, np.zeros_like(values), n_bins=1, keep_ratio=1)
    write_report(blank, config, manifest, embeddings=np.zeros_like(values), dataset=None)
    assert "no embedding (zeros)" in plain(read(blank))


def test_many_bins_and_labels_are_capped(tmp_path):
    values = clusters(600)
    config, manifest = write_run(
        tmp_path,
        values,
        n_bins=250,
        strata=np.arange(600) // 2 % 150,
        labels=[f"label {k}" for k in range(150)],
    )
    config2, manifest2 = write_run(tmp_path / "b", values, n_bins=250)
    for folder, asked in ((tmp_path, (config, manifest)), (tmp_path / "b", (config2, manifest2))):
        write_report(folder, *asked, embeddings=values, dataset=None)
    assert "30 of 250 bins, evenly spread, are shown" in plain(read(tmp_path / "b"))
    assert "The first 200 of 250 bins are listed" in plain(read(tmp_path / "b"))
    assert 'id="filter-label"' not in read(tmp_path)


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    values = clusters(30)
    config, manifest = write_run(tmp_path, values)
    monkeypatch.setattr("dq_multimodal.report.figures.can_draw", lambda: False)
    write_report(tmp_path, config, manifest, embeddings=values, dataset=None)
    assert "No PNG figures were written" in plain(read(tmp_path))
    assert not (tmp_path / "figures").exists()


class Broken:
    """A source of which one row cannot be read."""

    column_names = ("text",)

    def select_columns(self, names):
        return self

    def __getitem__(self, rows):
        if 3 in rows:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")
        return {"text": [f"row {row} \ud800" for row in rows]}


def test_one_row_that_cannot_be_read_spoils_no_other():
    reader = RowReader(Broken(), {"modality": "text", "columns": ["text"]})
    texts = reader.texts(range(6))
    assert texts[3] == ["(this row cannot be read)"] and texts[4] == ["row 4 ?"]


def test_a_large_run_has_a_small_report(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(layout, "N_ITERATIONS", 250)
    few = partial(duplicates.find_groups, max_rows=20_000)
    monkeypatch.setattr(duplicates, "find_groups", few)
    n_rows = 100_000
    values = clusters(n_rows, n_clusters=500)
    at = np.arange(n_rows)
    bins = Bins(bin=at % 10, rank=at // 10, gain=-at / 7, stratum=0 * at)
    config, manifest = write_run(tmp_path, values, rows=TEXT_ROWS, bins=bins, keep_ratio=0.02)
    long = "<👩‍👩‍👧‍👦&" * 300
    dataset = Dataset.from_dict(
        {"instruction": [str(k) for k in range(n_rows)], "output": [long] * n_rows}
    )
    write_report(tmp_path, config, manifest, embeddings=values, dataset=dataset)
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    assert (tmp_path / "map.parquet").stat().st_size < 10_000_000
    text = plain(read(tmp_path))
    assert "A seeded sample of 4,000 of 100,000 rows is drawn" in text
    assert "all pairs of a seeded sample of 20,000 of 100,000 rows" in text
    assert "Measured on all 100,000 rows" in text
