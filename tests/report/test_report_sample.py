"""The report from a sample of rows: totals of the whole run, and true row numbers."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from opened_pages import Opened
from report_runs import clusters
from test_report_browser import lonely_point, spot
from test_report_files import data_of, plain, read

from dq_multimodal import compress
from dq_multimodal.core import row_hash
from dq_multimodal.report import write_report

N, S = 3000, 500
NOTICE = (
    f"The map, coverage and near-duplicates are of a sample of {S} of {N:,} rows, drawn by hash."
)
SAMPLE = np.sort(np.argsort(row_hash(77, N))[:S])


VALUES = clusters(N)
VALUES[SAMPLE[[30, 60, 90]]] = VALUES[SAMPLE[10]]


def unit_norm(rows):
    return VALUES[rows] / np.linalg.norm(VALUES[rows], axis=1, keepdims=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with 3,000 rows of text and their embeddings, some rows alike."""
    folder = tmp_path_factory.mktemp("source")
    columns = {"text": [f"fox <{k}>" for k in range(N)], "y": [f"class {k % 3}" for k in range(N)]}
    Dataset.from_dict(columns).to_parquet(folder / "data.parquet")
    np.save(folder / "emb.npy", VALUES)
    return folder


def show_sample(source, folder, rows=SAMPLE, **options):
    """Compress all rows; give the page of all, and write in folder the report of some rows."""
    if options["method"] != "random":
        options["ready_embeddings"] = str(source / "emb.npy")
    options = {"dataset": str(source / "data.parquet"), "keep_ratio": 0.1} | options
    run = compress(**options, output_dir=folder / "run")
    whole, table = read(run.path), pq.read_table(run.path / "selection.parquet")
    shutil.copytree(run.path, folder / "sampled")
    (folder / "sampled" / "selection.parquet").unlink()
    run.manifest.kept = 0  # it is not known yet where the report is written
    dataset = Dataset.from_parquet(str(source / "data.parquet"), cache_dir=str(folder / "cache"))
    write_report(
        folder / "sampled",
        run.config,
        run.manifest,
        embeddings=VALUES[rows],
        dataset=dataset.select(rows),
        sample=table.take(rows),
    )
    return whole, read(folder / "sampled"), table


@pytest.fixture(scope="module")
def shown(source, tmp_path_factory):
    """The page of a run of two times three bins in classes, that of its sample, and the table."""
    folder = tmp_path_factory.mktemp("shown")
    options = {"method": "dq", "n_bins": 4, "label_column": "y"}
    return *show_sample(source, folder, **options), folder / "sampled"


def section(page, name):
    return plain(re.search(f'<section id="{name}".*?</section>', page, re.DOTALL)[0])


def test_totals_are_those_of_the_whole_run(shown):
    whole, page, _, _ = shown
    assert NOTICE in plain(page) and "drawn by hash" not in plain(whole)
    for find in (r"<title>.*?</title>", r"<h1>.*?</h1>", r'<div id="summary".*?<main'):
        ours, theirs = (re.search(find, text, re.DOTALL)[0] for text in (page, whole))
        assert ours.split("</div>\n</header>")[0] == theirs.split("</div>\n</header>")[0]
    assert "300 of 3,000 rows kept by dq" in page
    for name in ("bins", "run"):
        assert section(page, name) == section(whole, name)
    groups = {tuple(pair) for pair in data_of(page)["groups"]}
    assert groups and groups <= {tuple(pair) for pair in data_of(whole)["groups"]}
    assert f"of all {S} rows of the sample were compared" in section(page, "duplicates")
    assert f"Measured at all {S} rows of the sample" in section(page, "coverage")
    units = unit_norm(SAMPLE)
    n_alike = ((units @ units.T >= 0.95).sum(axis=1) > 1).sum()
    assert f"groups hold {n_alike} rows" in section(page, "duplicates")
    assert f"Drawn: all {S} rows of the sample." in section(page, "map")


def test_every_row_has_its_own_number_and_text(shown):
    _, page, table, folder = shown
    document, columns = data_of(page), table.to_pydict()
    points = document["points"]
    assert points["row"] == SAMPLE.tolist()
    assert document["texts"] == {str(row): [f"fox <{row}>"] for row in SAMPLE}
    for at, row in enumerate(points["row"]):
        assert (
            points["kept"][at] == columns["kept"][row] and points["bin"][at] == columns["bin"][row]
        )
        assert document["labels"][points["stratum"][at]] == f"class {row % 3}"
        assert points["place"][at] == columns["order"][row] + 1
        in_bin = [k for k in range(row % 3, N, 3) if columns["bin"][k] == columns["bin"][row]]
        n_kept = sum(columns["kept"][k] for k in in_bin)
        assert document["groups"][points["group"][at]] == [len(in_bin), n_kept]
    units = unit_norm(SAMPLE)
    likeness = np.where(table["kept"].to_numpy()[SAMPLE], units @ units.T - 9 * np.eye(S), -9)
    near = [SAMPLE.tolist().index(row) for row in points["near"]]
    best = likeness.max(axis=1)
    assert likeness[np.arange(S), near] == pytest.approx(best, abs=1e-6)
    cards = re.findall(r'class="card is-(kept|out)".*?row ([\d,]+).*?fox &lt;(\d+)', page, re.S)
    assert len(cards) > 20
    for state, number, text in cards:
        row = int(text)
        assert number == f"{row:,}" and row in SAMPLE and columns["kept"][row] == (state == "kept")
    points = pq.read_table(folder / "map.parquet").to_pydict()
    assert points["row"] == SAMPLE.tolist()
    assert points["text"] == [f"fox <{row}>" for row in SAMPLE]
    assert points["kept"] == [columns["kept"][row] for row in SAMPLE]
    assert points["bin"] == [columns["bin"][row] for row in SAMPLE]


@pytest.mark.parametrize(
    "options", [{"method": "random"}, {"method": "random", "label_column": "y"}]
)
def test_without_bins_the_place_is_that_among_all_rows(source, tmp_path, options):
    _, page, table = show_sample(source, tmp_path, **options)
    document = data_of(page)
    assert document["groups"] == [[N, 300]] and f"300 of {N:,} rows" in plain(page)
    assert document["sentences"] == [
        "The seeded draw took it as number {place} of {n_rows} rows; the first {n_kept} are kept."
    ]
    order, kept = table["order"].to_numpy(), table["kept"].to_numpy()
    assert document["points"]["place"] == (order[SAMPLE] + 1).tolist()
    assert ((order < 300) == kept).all()
    assert "This method makes no bins." in plain(page)


def test_a_sample_without_kept_rows_says_so(source, tmp_path):
    whole = np.random.default_rng(0).permutation(N)
    _, page, table = show_sample(
        source, tmp_path, np.sort(whole[:40]), method="dq", keep_ratio=0.001
    )
    assert not table["kept"].to_numpy()[whole[:40]].any()
    assert f"3 of {N:,} rows kept by dq" in plain(page)
    assert "No row of the sample was kept." in section(page, "coverage")
    assert set(data_of(page)["points"]["near"]) == {-1}


def test_a_browser_shows_a_row_of_the_sample(browser, shown):
    folder = shown[-1]
    with Opened(browser, folder) as page:
        assert page.get_by_text(NOTICE).is_visible()
        at = lonely_point(page)
        points = json.loads(page.locator("#report-data").text_content())["points"]
        row, place = points["row"][at], points["place"][at]
        page.mouse.click(*spot(page, at))
        panel = page.locator("#point")
        panel.get_by_text(f"fox <{row}>").wait_for(timeout=3000)
        said = panel.inner_text()
        assert f"Row {row:,}, " in said and f"fox <{points['near'][at]}>" in said
        assert f"rows are kept. In the order of all rows it is number {place:,}." in said
        assert "Within its bin the seeded draw decides: " in said
        page.get_by_label("Search").fill(str(row))
        assert page.locator("#points th[scope=row]").first.inner_text() == f"{row:,}"
