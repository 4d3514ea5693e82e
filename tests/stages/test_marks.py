"""Marks from training dynamics."""

import numpy as np
import pytest

from dq_multimodal.config import CompressConfig
from dq_multimodal.core import difficulty
from dq_multimodal.stages.marks import make_marks


def test_all_scores_are_of_one_copy_of_the_dynamics(tmp_path, monkeypatch):
    values = np.random.default_rng(0).uniform(size=(4, 9, 3)).astype(np.float32)
    values[1, 5] = np.nan
    np.save(tmp_path / "d.npy", values)
    known = np.delete(np.arange(9), 5)
    seen, wanted = [], {}
    for name in ("aum", "confidence", "dual"):
        score = getattr(difficulty, name)
        wanted[name] = score(values[:, known])
        monkeypatch.setattr(difficulty, name, lambda v, score=score: (seen.append(v), score(v))[1])
    request = CompressConfig("rows", method="dual", dynamics=str(tmp_path / "d.npy"))
    marks = make_marks(None, request, 9)
    assert len(seen) == 3 and all(v is seen[0] for v in seen)
    for name, score in wanted.items():
        found = getattr(marks, name)
        assert np.isnan(found[5]) and found.dtype == np.float32
        assert found[known] == pytest.approx(score)
