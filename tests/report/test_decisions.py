"""What decided that a row was kept: the order within its bin, and what goes before that."""

import numpy as np
import pytest

from dq_multimodal.config import CompressConfig
from dq_multimodal.core import Bins, order_rows
from dq_multimodal.manifest import Config, Origin
from dq_multimodal.report.decisions import Selection, Totals, decide
from dq_multimodal.stages.marks import Marks
from dq_multimodal.stages.ordering import count_subset, order_by_method

N_ROWS = 200
RNG = np.random.default_rng(3)
STRATUM = RNG.integers(2, size=N_ROWS)
BIN = RNG.integers(4, size=N_ROWS)
AUM = RNG.random(N_ROWS).astype(np.float32)
BINS = Bins(BIN, RNG.permutation(N_ROWS), np.full(N_ROWS, np.nan), STRATUM)


def config_of(request):
    source = Origin(kind="hub", name="x", split="train")
    told = {"rows": None, "label_column": "y", "embedding": None, "bins": "dq"}
    return Config(request=request, source=source, **told)


def selection_of(stratum, bins, order, kept, marks):
    totals = Totals(
        stratum, BIN * 0 if bins is None else bins, np.ones_like(stratum), kept.astype(int)
    )
    return Selection(np.arange(len(order)), stratum, bins, order, kept, marks, totals)


def decide_by(marks=None, **options):
    """Order 200 rows as a run does; give what decided, and which rows are kept."""
    request = CompressConfig("x", keep_ratio=0.3, **options)
    marks = marks or Marks()
    order = order_by_method(BINS, request, None, marks)
    kept = order < count_subset(STRATUM, request, marks)
    return decide(selection_of(STRATUM, BIN, order, kept, marks), config_of(request)), kept, order


@pytest.mark.parametrize(("draw", "kind"), [("random", "draw"), ("rank", "rank")])
def test_within_a_bin_the_draw_decides_or_the_rank(draw, kind):
    found, kept, _ = decide_by(method="dq", draw=draw)
    places = order_rows(BINS, draw=draw)
    for stratum in (0, 1):
        for number in range(4):
            rows = np.flatnonzero((stratum == STRATUM) & (number == BIN))
            drawn = rows[np.argsort(places[rows])]
            assert found.place[drawn].tolist() == list(range(1, len(rows) + 1))
            n_kept = kept[rows].sum()
            assert (kept[rows] == (found.place[rows] <= n_kept)).all()
            for row in drawn[:2]:
                assert found.of(row) == kind
                said = found.sentence(row)
                assert f"number {found.place[row]} of {len(rows)} rows" in said
                assert f"the first {n_kept} are kept" in said


@pytest.mark.parametrize(
    ("method", "group"), [("random", STRATUM), ("graphcut", STRATUM), ("coverage", STRATUM)]
)
def test_without_bins_the_order_of_the_class_decides(method, group):
    found, kept, order = decide_by(method=method)
    row = int(np.flatnonzero(kept)[0])
    mine = np.flatnonzero(group == group[row])
    assert found.of(row) == method
    place = 1 + (order[mine] < order[row]).sum()
    assert f"number {place} of {len(mine)} rows of its class" in found.sentence(row)


def test_what_goes_before_the_order_of_the_bin():
    duplicate_of = np.full(N_ROWS, -1)
    duplicate_of[[20, 30]] = 10
    unreadable = np.zeros(N_ROWS, dtype=bool)
    unreadable[5] = True
    group = np.zeros(N_ROWS, dtype=np.int64)
    group[100:] = np.arange(1, 101)
    rank = np.full(N_ROWS, -1)
    rank[[150, 151]] = [0, 1]
    marks = Marks(
        unreadable=unreadable,
        aum=AUM,
        duplicate_of=duplicate_of,
        group=group,
        target_rank=rank,
        target_row=np.where(rank < 0, -1, 7),
    )
    options = {"dynamics": "x.npy", "noise_ratio": 0.1, "cap_by": "source", "cap": 15}
    options |= {"target": "t", "target_share": 0.01}
    found, kept, _ = decide_by(marks, method="dq", **options)
    assert kept[150] and found.of(150) == "target"
    assert "target row 7, as number 1 of" in found.sentence(150)
    assert found.of(5) == "unreadable" and not kept[5]
    assert kept[group == 0].sum() == 15
    for row in (20, 30):
        assert found.of(row) in ("duplicate", "noise")
    noisy = np.argsort(AUM)[:15]
    assert all(found.of(row) in ("noise", "target", "unreadable") for row in noisy)
    capped = [row for row in range(100) if found.of(row) == "cap"]
    assert len(capped) > 50 and not kept[capped].any()
    assert "in the column source" in found.sentence(capped[0])


def test_rows_without_dynamics_come_last():
    aum = AUM.copy()
    aum[[3, 4]] = np.nan
    found, kept, _ = decide_by(Marks(aum=aum), method="ccs", dynamics="x.npy")
    assert [found.of(row) for row in (3, 4)] == ["unknown", "unknown"] and not kept[[3, 4]].any()
    assert {found.of(row) for row in np.flatnonzero(kept)} == {"ccs"}


def test_a_class_of_one_kept_row_keeps_it_for_the_class():
    strata = np.where(np.arange(N_ROWS) < 3, 1, 0)
    request = CompressConfig("x", keep_ratio=0.05, method="random", keep_every_class=True)
    bins = Bins(BIN * 0, BIN * 0, BIN * np.nan, strata)
    order = order_by_method(bins, request, None)
    kept = order < 10
    found = decide(selection_of(strata, None, order, kept, Marks()), config_of(request))
    rows = np.flatnonzero(kept & (strata == 1))
    assert [found.of(row) for row in rows] == ["class"]
