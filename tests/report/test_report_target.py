"""The section about a target: what was kept for each of its rows."""

import json
import shutil

import numpy as np
import pytest
from conftest import EVIL_TEXTS
from datasets import Dataset
from report_runs import TEXT_ROWS, clusters, write_run
from test_report_files import plain, read

from dq_multimodal import InputError
from dq_multimodal.report import write_report
from dq_multimodal.report.collect import collect
from dq_multimodal.report.decisions import picked_rows
from dq_multimodal.stages.marks import Marks


def test_the_first_of_the_targeted_order_are_there_for_the_target():
    rank = np.array([3, -1, 0, 5, 1, 2, 4, -1])
    kept = np.array([1, 1, 1, 1, 1, 0, 0, 1], dtype=bool)  # by rank: 2, 4, 0, 3
    assert picked_rows(rank, kept, 0.5).nonzero()[0].tolist() == [0, 2, 4]
    assert picked_rows(rank, kept, 0.3).nonzero()[0].tolist() == [2, 4]
    assert picked_rows(rank, kept, 1.0).nonzero()[0].tolist() == [0, 2, 3, 4]


@pytest.fixture(scope="module")
def targeted(tmp_path_factory):
    """A run of 40 rows, of which 10 are kept, 6 of them for two target rows."""
    tmp_path = tmp_path_factory.mktemp("target")
    values = clusters(40)
    kept = np.isin(np.arange(40), [0, 1, 2, 3, 4, 5, 20, 21, 22, 23])
    rank = np.arange(40)
    row = np.where(rank % 2 == 0, 0, 1)
    row[5] = 0
    marks = Marks(target_rank=rank, target_row=row)
    config, manifest = write_run(
        tmp_path, values, rows=TEXT_ROWS, kept=kept, marks=marks, target_share=0.6
    )
    picks = [
        {"text": "What is 1 + 1?", "picks": [[0, 0.93], [2, 0.8], [30, 0.75], [4, 0.7], [5, 0.6]]},
        {"text": EVIL_TEXTS[0], "picks": [[1, 0.5]]},
    ]
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "picks.json").write_text(json.dumps({"targets": picks, "n_leaks": 2}))
    texts = [f"instruction {k}" for k in range(40)]
    dataset = Dataset.from_dict({"instruction": texts, "output": ["so"] * 40})
    write_report(tmp_path, config, manifest, embeddings=values, dataset=dataset)
    return tmp_path, config, manifest


def test_picks_of_every_target_row(targeted):
    """Row 30 was not kept, and row 20 of target row 0 is there by the untargeted order."""
    facts = collect(*targeted, None, None)
    first, second = facts.target.rows
    assert (first.n_kept, first.picks) == (4, [(0, 0.93), (2, 0.8), (4, 0.7)])
    assert (second.n_kept, second.picks) == (2, [(1, 0.5)])
    assert (facts.target.n_rows, facts.target.n_leaks) == (2, 2)
    picked = [row for row in range(40) if facts.decisions.of(row) == "target"]
    assert picked == [0, 1, 2, 3, 4, 5]
    assert "target row 1, as number 4 of" in facts.decisions.sentence(3)


def test_the_page_shows_them_as_text(targeted):
    page = read(targeted[0])
    assert '<a href="#target">Target</a>' in page
    assert EVIL_TEXTS[0] not in page
    shown = plain(page)
    assert "What is 1 + 1? 4 row 0, cosine 0.930 instruction instruction 0 output so row 2" in shown
    assert "2 rows of the source equal a target row or are very near one" in shown


def test_a_run_without_target_has_no_such_section(text_report):
    assert 'href="#target"' not in read(text_report)


@pytest.mark.parametrize("text", ["{", "[]", '{"targets": [{"text": 3, "picks": []}]}', "{}"])
def test_other_picks_are_one_line(targeted, text, tmp_path):
    folder, config, manifest = targeted
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "target" / "picks.json").write_text(text)
    with pytest.raises(InputError, match=r"picks\.json"):
        collect(tmp_path, config, manifest, None, None)
