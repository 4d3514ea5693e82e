"""What runs say of themselves as results lines, which the table writer of eval/ takes."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness.results import read_lines
from harness.table import summarise
from PIL import Image

from dq_multimodal.config import InputError
from dq_multimodal.training.result_lines import lay_out, read_line, write_lines

ASKED = {"method": "dq", "keep_ratio": 0.2, "selection_seed": 3, "seed": 3, "max_steps": 40}


def make_text_run(folder, loss=4.5, seed=3, **changed):
    metrics = {
        "asked": {**ASKED, "selection_seed": seed, "seed": seed, **changed},
        "selection": {"rows": 80, "bytes": 1000, "seconds": {"embeddings": 2.0, "bins": 0.5}},
        "steps": 40,
        "held_out": {"response_loss": loss, "rows": 9},
        "seconds": {"train": 7.0, "is_resumed": False},
        "device": "cpu, 2 threads",
        "versions": {"torch": "2"},
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def make_image_run(folder, method, accuracy):
    (folder / "selection" / "subset").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 200).save(buffer, "png")
    files = [{"bytes": buffer.getvalue(), "path": None}] * 3
    pq.write_table(pa.table({"img": files}), folder / "selection/subset/0.parquet")
    seconds = {"embeddings": 2.0, "scores": 3.0, "selection": 0.5}
    metrics = {
        "asked": {**ASKED, "method": method, "drop_ratio": 0.0},
        "selection": {"rows": 3, "bytes": {"subset_data": 5}, "seconds": seconds},
        "steps": 30,
        "use_weights": "loss",
        "accuracy": accuracy,
        "train_seconds": 2.5,
        "is_resumed": True,
        "device": "NVIDIA X",
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder, 3 * len(buffer.getvalue())


def test_a_text_run(tmp_path):
    line = read_line(make_text_run(tmp_path / "run"), "demo", "docs", "dq", "Llama")
    assert line["metrics"] == {"loss: held out": {"last": 4.5, "best": None}}
    assert line["seconds"] == {"selection": 0.5, "proxy": 2.0, "training": 7.0}
    assert line["device"] == {"type": "cpu", "name": "2 threads", "threads": 2}
    assert (line["rows"], line["bytes"], line["keep_ratio"]) == (80, 1000, 0.2)
    assert (line["draw"], line["seed"], line["options"]) == (3, 3, {"method": "dq"})
    assert line["use_weights"] == "none"
    full = make_text_run(tmp_path / "full", method="full")
    assert read_line(full, "demo", "docs", "full", "Llama")["keep_ratio"] == 1


@pytest.mark.parametrize(("method", "selection", "proxy"), [("adq", 0.5, 17), ("random", 5.5, 12)])
def test_an_image_run(tmp_path, method, selection, proxy):
    folder, n_bytes = make_image_run(tmp_path / "run", method, 0.75)
    line = read_line(folder, "demo-images", "digits", method, "net", 12.0)
    assert line["metrics"] == {"test accuracy": {"last": 75, "best": None}}
    assert (line["bytes"], line["use_weights"]) == (n_bytes, "loss")
    # The encoder is a cost of the proxy, as in the suites; training was resumed.
    assert line["seconds"] == {"selection": selection, "proxy": proxy, "training": None}
    assert line["device"] == {"type": "cuda", "name": "NVIDIA X", "threads": None}


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        read_line(tmp_path, "demo", "docs", "dq", "Llama")
    with pytest.raises(InputError, match="no held-out rows"):
        read_line(make_text_run(tmp_path / "run", loss=None), "demo", "docs", "dq", "Llama")


def test_the_table_writer_takes_the_lines_and_the_short_table_agrees(tmp_path):
    lines = []
    for method, losses in {"random": (5.0, 5.5), "dq": (4.0, 4.75)}.items():
        for seed, loss in enumerate(losses):
            folder = make_text_run(tmp_path / f"{method}-{seed}", loss, seed, method=method)
            lines.append(read_line(folder, "demo", "docs", method, "Llama"))
    write_lines(tmp_path / "lines.jsonl", lines)
    assert read_lines(tmp_path / "lines.jsonl") == lines
    (group,) = summarise(lines)
    assert [(row.selection, row.value.mean) for row in group.rows] == [
        ("random", 5.25),
        ("dq", 4.375),
    ]
    assert group.rows[1].difference.mean == -0.875
    shown = lay_out(lines).splitlines()
    assert len({len(row) for row in shown}) == 1
    assert [cell.strip() for cell in shown[3].split("|")[1:-1]] == [
        *("20 %, dq", "80", "1,000", "0.5", "2.0", "7.0", "40", "4.3750 ± 0.5303 (2 seeds)")
    ]
