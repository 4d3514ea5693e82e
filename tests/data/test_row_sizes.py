"""How large rows are by their offsets, and blocks of rows by their bytes."""

import numpy as np
from datasets import Dataset

from dq_multimodal.data.row_sizes import cut_rows, measure_rows, read_blocks


def test_rows_are_measured_by_their_offsets():
    rows = [
        {
            "text": "a" * k if k % 5 else None,
            "turns": [{"role": "u", "content": "x" * k}] * (k % 3) if k % 4 else None,
            "file": {"bytes": b"q" * k, "path": "zz"} if k % 7 else None,
            "vector": [1.0] * k,
            "is_odd": k % 2 == 1,
        }
        for k in range(120)
    ]
    dataset = Dataset.from_list(rows)
    wanted = [
        len(row["text"] or "")
        + sum(1 + len(turn["content"]) for turn in row["turns"] or [])
        + (len(row["file"]["bytes"]) + 2 if row["file"] else 0)
        + 8 * len(row["vector"])
        + 1
        for row in rows
    ]
    assert measure_rows(dataset).tolist() == wanted
    assert measure_rows(dataset.select(range(30, 77))).tolist() == wanted[30:77]
    assert measure_rows(dataset.select([5, 99, 3])).tolist() == [wanted[k] for k in (5, 99, 3)]
    sizes = np.array([1, 2, 300, 1, 1, 1, 1, 400, 90, 10, 1])
    blocks = [(0, 2), (2, 3), (3, 6), (6, 7), (7, 8), (8, 10), (10, 11)]
    assert list(cut_rows(sizes, 3, 100)) == blocks


def test_blocks_end_before_they_grow_too_large():
    texts = [f"short {k}" for k in range(5000)] + ["long " * 600_000] * 6
    blocks = [len(block["text"]) for block in read_blocks(Dataset.from_dict({"text": texts}), 4096)]
    assert blocks == [4096, 906, 2, 2]
