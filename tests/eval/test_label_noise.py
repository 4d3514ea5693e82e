"""eval/label_noise.py: wrong labels are counted among the kept rows, and noisy rows leave them."""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_scripts import load_script

script = load_script("label_noise")
N_ROWS, N_CLASSES, N_WRONG = 400, 4, 40


def test_rows_of_low_margin_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(N_CLASSES, 8))
    true, tests = rng.integers(0, N_CLASSES, N_ROWS), rng.integers(0, N_CLASSES, 100)
    given = true.copy()
    given[:N_WRONG] = (true[:N_WRONG] + 1) % N_CLASSES
    for name, labels in (("train", true), ("test", tests)):
        values = centres[labels] + rng.normal(size=(len(labels), 8))
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
    (tmp_path / "cifar10").mkdir()
    pq.write_table(pa.table({"label": tests}), tmp_path / "cifar10" / "test-0.parquet")
    own = np.where(given == true, 0.8, 0.1) + rng.uniform(-0.05, 0.05, (5, N_ROWS))
    other = (1 - own) / 2
    dynamics = np.stack([own, other, np.sqrt((1 - own) ** 2 + 2 * other**2)], axis=2)
    monkeypatch.setattr(script, "DATA", tmp_path)
    args = argparse.Namespace(
        embeddings=tmp_path / "train.npy", test_embeddings=tmp_path / "test.npy", draws=3
    )
    lines = script.compare(args, dynamics.astype(np.float16), given, true)
    found = {(x["selection"], x["noise_ratio"], x["keep_ratio"]): x for x in lines}
    names = {"random", "coverage", "coverage, cad", "ccs"}
    assert found.keys() == {
        (n, r, k) for n in names for r in script.NOISE_RATIOS for k in script.KEEP_RATIOS
    }
    for name in names:
        assert all(found[name, 0.1, keep]["wrong"] == 0 for keep in script.KEEP_RATIOS)
        assert found[name, 0.0, 0.5]["wrong"] > 0.05
    assert found["random", 0.0, 0.5]["wrong"] == pytest.approx(N_WRONG / N_ROWS, abs=0.03)
    assert found["random", 0.1, 0.1]["accuracy"] > 60
    assert "accuracy" not in found["random", 0.1, 0.5]
    assert found["random", 0.0, 0.5]["draws"] == 3 and found["coverage", 0.0, 0.5]["draws"] == 1
