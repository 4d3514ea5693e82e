"""The files of a report: whole, the same every time, small, and true to the run."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import EVIL_TEXTS, draw, make_pairs, pair_values, write_text_report
from datasets import Dataset, Features, Image, List, Value
from report_runs import PAIR_ROWS, clusters, write_run

from dq_multimodal.core import Bins
from dq_multimodal.manifest import Columns, Patches, PatchFacts, make
from dq_multimodal.report import FILES, collect, write_report
from dq_multimodal.report import page as page_module
from dq_multimodal.report.page import as_json, make_page
from dq_multimodal.report.patched import Example
from dq_multimodal.report.rows import RowReader
from dq_multimodal.stages.marks import Marks

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
    """The text of a page, without scripts and their data."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page).replace("&nbsp;", " "))


def page_of(folder, values, dataset=None, **run):
    """Write a run, and give the page of its report."""
    config, manifest = write_run(folder, values, **run)
    return make_page(collect.collect(folder, config, manifest, values, dataset), True)


def test_the_same_run_gives_the_same_bytes(text_report, tmp_path):
    pytest.importorskip("matplotlib")
    write_text_report(tmp_path)
    for name in (*FILES[:2], *(f"figures/{figure}" for figure in FIGURES)):
        assert (tmp_path / name).read_bytes() == (text_report / name).read_bytes(), name
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_the_page_says_is_what_the_run_holds(text_report):
    page, table = read(text_report), pq.read_table(text_report / "selection.parquet")
    assert "<h1>small: 60 of 240 rows kept by adq</h1>" in page
    data = data_of(page)
    points = data["points"]
    assert points["row"] == list(range(240))
    for name in ("kept", "bin", "stratum"):
        assert points[name] == [int(v) for v in table[name].to_pylist()], name
    kept = np.flatnonzero(points["kept"])
    assert set(points["near"]) <= set(kept.tolist())
    assert all(near != row for near, row in zip(points["near"], points["row"], strict=True))
    assert data["pictures"] is None
    assert data["texts"]["3"][0] == "Question number 3: why?"
    long = data["texts"]["239"]
    assert sum(map(len, long)) <= 400 and long[1].endswith("…")
    assert points["length"][239] == len("Question number 239: why?" + "Answer 239, ") + 59 * 17
    text = plain(page)
    assert "Texts are cut at 400 characters" in text
    assert "20 random draws" in text
    assert "Drawn: all 240 rows" in text and "all pairs of all 240 rows" in text
    for name in ("representativeness", "diversity", "importance"):
        assert name in text


def test_why_a_row_was_kept_is_what_decided(text_report):
    """In a bin of a class, rows with a place up to that of the last kept one are the kept ones."""
    page = read(text_report)
    data = data_of(page)
    points = data["points"]
    assert [one[:38] for one in data["sentences"]] == ["Within its bin the seeded draw decides"]
    for kept, place, group in zip(points["kept"], points["place"], points["group"], strict=True):
        n_rows, n_kept = data["groups"][group]
        assert 1 <= place <= n_rows and kept == (place <= n_kept)
    assert sum(n_kept for _, n_kept in data["groups"]) == 60
    assert "For every row, the seeded draw within a bin" in plain(page)


def test_the_first_thing_said_is_why_and_the_last_the_settings(text_report):
    page = read(text_report)
    names = [a["id"] for t, a in Outline(page).elements if t in ("section", "div") and "id" in a]
    assert names.index("summary") < names.index("map") < names.index("coverage")
    assert names[-1] == "run"
    start = page.index('<section id="run"')
    assert page.index("<code>", start) > page.index("<details><summary>Settings", start)


def test_one_file_that_needs_nothing_else(text_report, image_report, pair_report, evil_report):
    for folder in (text_report, image_report, pair_report, evil_report):
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
    assert not [t for t, a in elements if t in ("img", "svg")]
    assert page.count("pwned") > 10 and "\x00" not in page
    document = page[page.index('id="report-data"') :]
    document = document[document.index(">") + 1 : document.index("</script>")]
    assert not set("<>&\u2028\u2029") & set(document)
    assert "\u202e" not in page[page.index("<title>") : page.index("</title>")]
    assert len(page) < 1_500_000
    assert "1 row has no embedding" in plain(page)
    assert data_of(page)["texts"]["0"][0] == EVIL_TEXTS[0]
    texts = pq.read_table(evil_report / "map.parquet")["text"].to_pylist()
    assert max(map(len, texts)) <= 502


def test_json_inside_a_page_looks_like_no_markup():
    text = as_json({"a": "</script><!-- & \u2028\u2029 é 😀"})
    assert not set("<>&\u2028\u2029") & set(text) and "é 😀" in text
    assert json.loads(text)["a"] == "</script><!-- & \u2028\u2029 é 😀"
    with pytest.raises(ValueError):
        as_json(float("nan"))


def test_map_file_opens_as_a_dataset(text_report, image_report, pair_report):
    from datasets import Dataset

    own = {text_report: {"text"}, image_report: {"image"}, pair_report: {"text", "image"}}
    for folder, names in own.items():
        shown = Dataset.from_parquet(str(folder / "map.parquet"), cache_dir=str(folder / "cache"))
        always = {"row", "x", "y", "bin", "kept", "label", "neighbors"}
        assert always | names == set(shown.column_names)
        command = re.search(r"<code>embedding-atlas map.parquet (.*?)</code>", read(folder))[1]
        asked = dict(zip(*[iter(command.split())] * 2, strict=True))
        assert asked == {f"--{name}": name for name in {"x", "y", "neighbors"} | names}
        for at, row in enumerate(shown):
            ids, distances = row["neighbors"]["ids"], row["neighbors"]["distances"]
            assert ids[0] == at and distances[0] == 0 and distances == sorted(distances)
            assert len(ids) == len(distances) == 16 and max(ids) < len(shown)
            assert 0 <= row["x"] <= 1 and 0 <= row["y"] <= 1
        if folder == image_report:
            assert shown[0]["image"].size == (96, 96) and len(shown) == 84
        elif folder == text_report:
            assert shown[7]["label"] == "odd" and shown[7]["text"].startswith("Question number 7")
        else:
            assert shown[9]["image"].size == (32, 32) and shown[4]["image"] is None
            assert shown[9]["text"] == "Which colour has square 0 of picture 3? Colour 9"


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


def test_coverage_is_set_against_the_interval_of_random_draws(tmp_path):
    """All from one corner: worse than random, and that is said as plainly as the contrary."""
    values = clusters(400)
    kept = np.zeros(400, dtype=bool)
    kept[np.argsort(values[:, 0])[:40]] = True
    page = page_of(tmp_path, values, kept=kept)
    assert "random selection covers the data better than dq" in plain(page)
    places = re.findall(r'class="(band|middle|ours)" style="left:([\d.]+)%', page)[:3]
    band, middle, ours = (float(place) for _, place in places)
    assert 0 <= band <= middle < ours <= 100
    assert "worse" in page[page.index('class="ours"') :][:200]


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_outer_products_are_compared_as_such(tmp_path, similarity):
    values = clusters(120)
    points = data_of(page_of(tmp_path, values, similarity=similarity, n_left=4))["points"]
    wide = np.einsum("ni,nj->nij", values[:, :4], values[:, 4:]).reshape(120, -1)
    row, near = 17, points["near"][17]
    if similarity == "cosine":
        expected = wide[row] @ wide[near] / np.linalg.norm(wide[row]) / np.linalg.norm(wide[near])
    else:
        expected = np.linalg.norm(wide[row] - wide[near])
    assert points["similarity"][row] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_tiny_runs_have_a_report(tmp_path, n_rows):
    """Of nothing there is more than there is: 1 row, not 1 rows."""
    values = clusters(n_rows)
    run = {"n_bins": 1, "keep_ratio": 0.5 if n_rows > 1 else 1}
    page = page_of(tmp_path, values, **run)
    assert len(data_of(page)["points"]["row"]) == n_rows
    blank = page_of(tmp_path / "blank", np.zeros_like(values), **run)
    assert "no embedding (zeros)" in plain(blank)
    for text in map(plain, (page, blank)):
        assert not re.search(r"\b1 (\w+s|of them were)\b(?<!is)(?<!was)(?<!holds)", text)


def test_two_equal_rows_are_one_group_of_two(tmp_path):
    values = clusters(30, size=64)
    values[7] = values[3]
    page = page_of(tmp_path, values, kept=np.arange(30) % 5 == 3)
    text = plain(page)
    assert re.search(
        r"1 group holds 2 rows \([\d.]+ % of those compared\)\. 1 of them was kept", text
    )
    assert "The group " in text and "2 rows, 1 kept" in text


def test_many_bins_and_labels_are_capped(tmp_path):
    values, at = clusters(600), np.arange(600)
    bins = Bins(bin=at % 250, rank=at // 250, gain=-at / 7, stratum=at // 2 % 150)
    labels = [f"label {k}" for k in range(150)]
    page = page_of(tmp_path, values, bins=bins, strata=bins.stratum, labels=labels)
    assert 'id="filter-label"' not in page and 'id="filter-bin"' in page
    assert "30 of 250 bins, evenly spread, are shown" in plain(page)
    assert "The first 200 of 250 bins are listed" in plain(page)


def test_near_duplicates_that_the_run_found_are_shown_as_they_are(tmp_path):
    values = clusters(60)
    marks = Marks(duplicate_of=np.array([-1, 0, 0, *[-1] * 57]))
    text = plain(page_of(tmp_path, values, marks=marks, drop_duplicates=0.8))
    assert "from a cosine similarity of 0.8 on; each group is a row with those after it" in text
    assert "1 group holds 3 rows" in text


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    values = clusters(30)
    config, manifest = write_run(tmp_path, values)
    monkeypatch.setattr("dq_multimodal.report.figures.can_draw", lambda: False)
    write_report(tmp_path, config, manifest, embeddings=values, dataset=None)
    assert "No PNG figures were written" in plain(read(tmp_path))
    assert not (tmp_path / "figures").exists()


def test_dropped_patches_are_shown(tmp_path):
    config, manifest = write_run(tmp_path, clusters(30))
    facts = collect.collect(tmp_path, config, manifest, None, None)
    example = Example(3, b"before", b"holed", b"filled", 0.75, 21.25)
    facts.examples = [example, Example(4, None, b"holed", b"filled", 0.5, None)]
    config.patches = Patches(patch_size=16, fill="mean", attribution_model=None)
    manifest.bytes.source_images, manifest.bytes.stored_images = 10_000, 7_000
    found = {"fill": "mean", "images": 8, "coded": 7, "originals": {"a <b>reason</b>": 1}}
    found |= {"kept_share": 0.75, "psnr_of_holes": {"mean": 22.5, "lowest": 18.0}}
    found |= {"psnr_of_kept": {"mean": None, "lowest": None}}
    found |= {"answers": {"compared": 7, "changed": 1}}
    manifest.patches = make(PatchFacts, found)
    page = make_page(facts, True)
    text = plain(page)
    assert "25 % of the patches (16 px a side) were dropped, from 7 of 8 images" in text
    assert "10 kB → 7 kB" in text and "1 image keeps its original file" in text
    assert "at least 18.0 dB 22.5 dB" in text and "kept patches exact" in text
    assert "answer of the classifier changed by it, of 7 1" in text
    assert "row 3 75 % of its patches kept, 21.2 dB" in text
    images = [a["alt"] for t, a in Outline(page).elements if t == "img"]
    assert images == [f"Row 3, {name}" for name in ("original", "holed", "filled")] + [
        "Row 4, holed",
        "Row 4, filled",
    ]
    assert "<b>" not in page and "#patches" in page


def test_picture_and_words_of_a_row_are_shown_together(pair_report):
    data, page = data_of(read(pair_report)), read(pair_report)
    assert data["points"]["row"] == list(range(96)) and data["lengthName"] == "characters"
    assert data["points"]["length"][9] == len("Which colour has square 0 of picture 3?Colour 9")
    for row in range(96):
        (address, note), texts = data["pictures"][str(row)], data["texts"][str(row)]
        assert address.startswith("data:image/webp;base64,") == (row % 12 not in (4, 6))
        said = {4: "no picture", 5: "1 of 3 pictures", 6: "no picture that can be read"}
        assert note == said.get(row % 12, "")
        assert texts[0].endswith(f"picture {row // 3}?" if row % 12 != 7 else "")
    text = plain(page)
    settings = text[text.index("Settings of the run setting value") :]
    assert "embedding dimension 16, text_share 0.5 embedding of the image model eye," in settings
    assert "embedding of the text model owner/ear, dimension 6" in settings
    assert "embedded image-text image, more, question, answer (columns)" in settings
    assert "Pictures are scaled down" in text and "Texts are cut at 400 characters" in text
    cards = re.findall(r'<li class="card.*?</li>', page, re.DOTALL)
    cards = [card for card in cards if "no picture" not in card and "(no text)" not in card]
    assert cards and all("<img" in card and "Which colour" in card for card in cards)


def test_pictures_with_other_words_are_counted(pair_report, tmp_path):
    """Of every 12 rows, 0 to 2, 3 with 5, and 9 to 11 share a picture; 8 is alone with 6 and 7."""
    page = read(pair_report)
    text, kept = plain(page), np.array(data_of(page)["points"]["kept"], dtype=bool)
    groups = [g for k in range(0, 96, 12) for g in ([k, k + 1, k + 2], [k + 3, k + 5])]
    groups += [[k + 9, k + 10, k + 11] for k in range(0, 96, 12)]
    several = sum(kept[g].sum() > 1 for g in groups)
    assert "from a cosine similarity of 0.97 on" in text
    assert f"24 pictures are shared by {8 * 8} rows with other words; {several} of those" in text
    assert "The 20 with the most rows are listed" in text
    values = pair_values(96)
    run = {"rows": PAIR_ROWS, "dataset": make_pairs(96)}
    one = plain(page_of(tmp_path / "one", values, **run))
    assert "make one vector here, so rows of the same picture" in one
    assert "from a cosine similarity of 0.97 on" in one and "are shared by" not in one
    dropped = {"marks": Marks(duplicate_of=np.full(96, -1)), "drop_duplicates": 0.9}
    two = plain(page_of(tmp_path / "two", values, halves=(10, 0.25), **run, **dropped))
    assert "24 pictures are shared" in two
    values[:, 10:] = 1
    none = plain(page_of(tmp_path / "none", values, halves=(10, 0.25), **run))
    assert "from a cosine similarity of 0.98 on" in none
    assert "No picture has other words in another row." in none


def test_a_page_has_room_for_so_many_pictures_and_words(tmp_path, monkeypatch):
    values = pair_values(96)
    monkeypatch.setattr(page_module, "MAX_PICTURE_BYTES", 9000)
    monkeypatch.setattr(page_module, "MAX_TEXT_BYTES", 12_000)
    page = page_of(tmp_path, values, make_pairs(96), rows=PAIR_ROWS, halves=(10, 0.5))
    data, text = data_of(page), plain(page)
    assert len(as_json(data["texts"]).encode()) <= 6000
    assert sum(len(address) for address, _ in data["pictures"].values()) <= 9000
    assert f"{96 - len(data['pictures'])} found no room in this file" in text


class Broken:
    """A source of which one row cannot be read."""

    column_names, features = ("text",), {"text": Value("string")}

    def select_columns(self, names):
        return self

    def __getitem__(self, rows):
        if 3 in rows:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")
        return {"text": [f"row {row} \ud800" for row in rows]}


def test_one_row_that_cannot_be_read_spoils_no_other():
    reader = RowReader(Broken(), Columns(modality="text", shape="text", columns=["text"]))
    texts = reader.texts(range(6))
    assert texts[3] == ["(this row cannot be read)"] and texts[4] == ["row 4 ?"]


def test_pictures_inside_chat_turns_are_shown_and_a_broken_one_hides_no_words():
    def turn(row, file):
        parts = [{"type": "image", "image": file and {"bytes": file, "path": None}, "text": None}]
        parts.append({"type": "text", "image": None, "text": f"What is on picture {row}?"})
        return [{"role": "user", "content": parts}]

    part = {"type": Value("string"), "image": Image(), "text": Value("string")}
    features = Features({"chat": List({"role": Value("string"), "content": List(part)})})
    files = [draw(0), draw(1)[:60], None]
    rows = Dataset.from_dict({"chat": [turn(k, file) for k, file in enumerate(files)]}, features)
    columns = {"shape": "messages", "columns": ["chat"], "image_columns": ["chat"]}
    reader = RowReader(rows, Columns(modality="image-text", **columns))
    assert reader.texts(range(3)) == {k: [f"What is on picture {k}?"] for k in range(3)}
    notes = [picture.note for picture in reader.pictures(range(3)).values()]
    assert notes == ["", "no picture that can be read", "no picture"]


def test_a_large_run_has_a_small_page(large_report):
    page = read(large_report)
    assert len(page.encode()) < 10_000_000
    text = plain(page)
    assert "Drawn: 4,000 of 6,000 rows, a seeded sample." in text
    assert "Texts are cut at 150 characters (75 for the nearest kept row)" in text
