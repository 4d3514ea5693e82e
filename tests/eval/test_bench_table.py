"""eval/harness/table.py against plain loops, a case by hand, and lines that must not be mixed."""

import json
import random

import numpy as np
import pytest
from harness import table


def make_line(value, *, selection="dq", keep_ratio=0.1, draw=0, seed=0, **changed):
    metric, best = changed.pop("metric", "test accuracy"), changed.pop("best", None)
    line = {"suite": "toy", "task": "cifar10", "protocol": "small", "net": "resnet18"}
    line |= {"selection": selection, "options": {"method": selection}, "keep_ratio": keep_ratio}
    line |= {"settings": {"epochs": 5, "optimizer": {"lr": 0.1}}, "data": "abc"}
    line |= {"draw": draw, "seed": seed, "is_fixed": False, "rows": 100, "steps": 40}
    line |= {"metrics": {metric: {"last": value, "best": best}}}
    line |= {"seconds": {"selection": 1.0, "proxy": 2.0, "training": 3.0}}
    return line | {"device": {"type": "cpu", "name": "a CPU", "threads": 2}} | changed


def random_draws(*values):
    """Draws of random, 0, 1, ..."""
    return [make_line(v, selection="random", draw=d) for d, v in enumerate(values)]


def rows_of(groups):
    (group,) = groups
    return {(row.keep_ratio, row.selection): row for row in group.rows}


def test_a_case_by_hand():
    lines = random_draws(60, 70)
    lines += [make_line(v, draw=d) for d, v in enumerate((61, 73))]
    rows = rows_of(table.summarise(lines))
    dq = rows[0.1, "dq"]
    assert dq.value.mean == 67 and dq.difference.mean == 2
    # Two draws: a resample is one of 61, 67, 67, 73, so the interval runs from end to end.
    assert dq.value.interval == (61, 73) and dq.difference.interval == (1, 3)
    assert (dq.value.n_cells, dq.value.n_draws) == (2, 2)
    base = rows[0.1, "random"]
    assert base.value.mean == 65 and base.difference is None


def by_loops(lines, selection, keep_ratio):
    """Mean, interval, paired difference and its interval: by plain loops over the JSON lines."""
    own = [x for x in lines if (x["selection"], x["keep_ratio"]) == (selection, keep_ratio)]
    base = [x for x in lines if (x["selection"], x["keep_ratio"]) == ("random", keep_ratio)]

    def value_of(line):
        return line["metrics"]["test accuracy"]["last"]

    def work_out(of_draws):
        means = [sum(of_draws[draw]) / len(of_draws[draw]) for draw in sorted(of_draws)]
        picks = np.random.default_rng(0).integers(len(means), size=(10_000, len(means)))
        resampled = sorted(sum(means[i] for i in row) / len(means) for row in picks.tolist())
        ends = []
        for share in (0.025, 0.975):
            place = share * (len(resampled) - 1)
            k = int(place)
            ends.append(resampled[k] + (place - k) * (resampled[k + 1] - resampled[k]))
        return sum(means) / len(means), *ends

    values, differences = {}, {}
    for line in own:
        values.setdefault(line["draw"], []).append(value_of(line))
        for other in base:
            if (other["draw"], other["seed"]) == (line["draw"], line["seed"]):
                differences.setdefault(line["draw"], []).append(value_of(line) - value_of(other))
    return work_out(values), work_out(differences)


def test_agrees_with_plain_loops():
    source = random.Random(3)
    lines = [
        make_line(source.gauss(70, 3), selection=name, keep_ratio=ratio, draw=draw, seed=seed)
        for name in ("dq", "random", "adq")
        for ratio in (0.3, 0.1)
        for draw in range(7)
        for seed in range(1 + draw % 3)  # draws with unlike numbers of seeds
    ]
    source.shuffle(lines)
    lines = [json.loads(json.dumps(line)) for line in lines]
    rows = rows_of(table.summarise(lines))
    assert list(rows) == [
        *[(ratio, name) for ratio in (0.1, 0.3) for name in ("random", *order_of(lines))]
    ]
    for (ratio, name), row in rows.items():
        value, difference = by_loops(lines, name, ratio)
        assert (row.value.mean, *row.value.interval) == pytest.approx(value, abs=1e-9)
        if name == "random":
            assert row.difference is None
        else:
            found = row.difference
            assert (found.mean, *found.interval) == pytest.approx(difference, abs=1e-9)
            assert (found.n_draws, found.n_cells) == (7, 13)


def order_of(lines):
    return [name for name in dict.fromkeys(x["selection"] for x in lines) if name != "random"]


@pytest.mark.parametrize(
    "other",
    [
        {"device": {"type": "cuda", "name": "a GPU", "threads": 2}},
        {"protocol": "paper"},
        {"net": "vit"},
        {"task": "cifar100"},
        {"suite": "other"},
        {"settings": {"epochs": 5, "optimizer": {"lr": 0.2}}},
        {"data": "def"},
        {"metric": "loss: held out"},
    ],
)
def test_what_differs_is_another_group(other):
    lines = [make_line(60, selection="random"), make_line(90, **other), make_line(61)]
    for made in (lines, lines[::-1]):
        groups = table.summarise(made)
        assert len(groups) == 2
        assert sorted(row.value.mean for group in groups for row in group.rows) == [60, 61, 90]
        (alone,) = (g for g in groups if len(g.rows) == 1)
        assert alone.rows[0].difference is None
        if "settings" in other or "data" in other:
            named = "optimizer.lr 0.2" if "settings" in other else "data def"
            assert alone.note == named and named in table.headline(alone)
        else:
            assert alone.note == ""


def test_other_options_of_a_selection_are_another_row():
    lines = [make_line(60, selection="random"), make_line(61), make_line(90, draw=1)]
    lines[2]["options"] = {"method": "dq", "draw": "rank"}
    rows = rows_of(table.summarise(lines))
    assert {name: row.value.mean for (_, name), row in rows.items()} == {
        "random": 60,
        "dq (draw not set)": 61,
        "dq (draw rank)": 90,
    }


def test_what_became_of_the_weights_is_said_and_never_mixed():
    lines = [make_line(60, selection="random"), make_line(61)]
    assert "| weights |" not in table.markdown(table.summarise(lines))
    lines += [make_line(62, use_weights=use) for use in ("loss", "sample")]
    groups = table.summarise(lines)
    assert {name: (r.use_weights, r.value.mean) for (_, name), r in rows_of(groups).items()} == {
        "random": ("none", 60),
        "dq (use_weights none)": ("none", 61),
        "dq (use_weights loss)": ("loss", 62),
        "dq (use_weights sample)": ("sample", 62),
    }
    said = table.markdown(groups)
    assert "| kept | selection | weights |" in said and "factors of their losses" in said
    one = table.markdown(table.summarise([lines[0], lines[3]]))
    assert "| 10 % | dq | sample |" in one and "| 10 % | random | none |" in one


@pytest.mark.parametrize(
    "other", [{"options": {"method": "random", "by_class": False}}, {"is_fixed": True}]
)
def test_two_kinds_of_random_leave_no_difference_and_are_said(other):
    lines = [make_line(61), make_line(60, selection="random")]
    groups = table.summarise(lines)
    assert rows_of(groups)[0.1, "dq"].difference.mean == 1 and groups[0].note == ""
    groups = table.summarise([*lines, make_line(50, selection="random", **other)])
    assert all(row.difference is None for row in rows_of(groups).values())
    assert "no differences at 10 %" in table.headline(groups[0])


def make_list(place, metric, *, is_listed=True, shift=0.0, **changed):
    """Twenty draws of random, and a line that equals the draw at a place from the best."""
    values = [60 + 0.37 * (7 * k % 20) for k in range(20)]
    best = sorted(values, reverse="accuracy" in metric)
    lines = [make_line(v, selection="random", draw=k, metric=metric) for k, v in enumerate(values)]
    options = {"row_list": "published.npy"} if is_listed else {"method": "graphcut"}
    about = {"options": options, "metric": metric, **changed}
    return [*lines, make_line(best[place] + shift, selection="own", **about)], values


@pytest.mark.parametrize("metric", ["test accuracy", "loss: held out"])
@pytest.mark.parametrize("place", [0, 2, 17, 19])
def test_a_row_list_has_a_rank_among_the_draws_and_no_verdict(metric, place):
    lines, values = make_list(place, metric, is_fixed=True)
    groups = table.summarise(lines)
    row = rows_of(groups)[0.1, "own"]
    own = row.value.mean
    n_better = sum(v > own if "accuracy" in metric else v < own for v in values)
    assert n_better == place and row.rank == (n_better + 1, 21)
    assert row.difference.mean == pytest.approx(own - sum(values) / 20)
    assert row.difference.interval is None
    assert table.judge(row, groups[0]) == f"rank {place + 1} of 21"
    assert f"(one list) | rank {place + 1} of 21 |" in table.markdown(groups)
    # What is fixed by its method, and no draw of something, keeps its verdict.
    lines, _ = make_list(place, metric, is_listed=False, is_fixed=True)
    groups = table.summarise(lines)
    row = rows_of(groups)[0.1, "own"]
    assert row.rank is None and row.difference.interval is not None
    assert table.judge(row, groups[0]) == ("**better**" if place < 10 else "**worse**")


def test_a_row_list_that_is_trained_has_an_interval_and_no_verdict():
    metric = "test accuracy"
    for is_listed, said in ((True, ""), (False, "**better**")):
        lines, _ = make_list(0, metric, is_listed=is_listed, shift=5)
        of_draws = [{**lines[-1], "draw": k} for k in range(20)]
        groups = table.summarise([*lines, *of_draws])
        row = rows_of(groups)[0.1, "own"]
        assert row.difference.interval[0] > 0 and row.rank is None
        assert table.judge(row, groups[0]) == said


@pytest.mark.parametrize("key", ["metrics", "settings", "is_fixed", "device"])
def test_a_line_without_what_is_needed_is_one_message(key):
    line = make_line(60)
    del line[key]
    with pytest.raises(ValueError, match=f"a results line with .*{key}.*, got one without {key}"):
        table.summarise([make_line(61), line])


def test_the_later_line_of_a_cell_counts():
    (row,) = rows_of(
        table.summarise([make_line(60), make_line(62, draw=1), make_line(64)])
    ).values()
    assert row.value.mean == 63 and row.value.n_cells == 2


def test_a_fixed_line_is_one_cell_against_every_draw():
    lines = random_draws(60, 62, 67)
    for draw in (0, 4):
        about = {"selection": "graphcut", "is_fixed": True, "draw": draw, "seed": draw // 2}
        lines.append(make_line(70, **about))
    row = rows_of(table.summarise(lines))[0.1, "graphcut"]
    assert row.value.interval is None and row.value.n_cells == 1
    assert (row.difference.mean, row.difference.n_draws) == (7, 3)
    assert row.difference.interval == (3, 10)
    assert "70.00 (fixed)" in table.markdown(table.summarise(lines))


def test_cells_without_a_partner_are_not_paired():
    lines = random_draws(60, 70)
    lines += [make_line(v, draw=d) for d, v in ((1, 75), (2, 80))]
    lines += [make_line(50, keep_ratio=0.2), make_line(99, selection="random", seed=1, draw=2)]
    groups = table.summarise(lines)
    row = rows_of(groups)[0.1, "dq"]
    assert row.difference.mean == 5 and row.difference.interval is None
    assert "| 2, 1 paired |" in table.markdown(groups)
    lone = rows_of(groups)[0.2, "dq"]
    assert lone.difference is None and lone.value.interval is None
    assert "50.00 (one cell)" in table.markdown(groups)


def test_seeds_of_one_draw_have_no_interval():
    groups = table.summarise([make_line(v, seed=k) for k, v in enumerate((60, 62))])
    (row,) = rows_of(groups).values()
    assert row.value.mean == 61 and row.value.interval is None
    text = table.markdown(groups)
    assert "61.00 (one draw)" in text and "| 2 (1 draw) |" in text


@pytest.mark.parametrize(
    ("metric", "shift", "n_draws", "said"),
    [
        ("test accuracy", 1, 10, "**better**"),
        ("test accuracy", -1, 10, "**worse**"),
        ("loss: gsm8k", 1, 10, "**worse**"),
        ("loss: gsm8k", -1, 10, "**better**"),
        ("test accuracy", 1, 9, "better?"),
        ("test accuracy", 0, 10, ""),
    ],
)
def test_differences_are_marked_where_the_interval_excludes_0(metric, shift, n_draws, said):
    noise = (0.2, -0.3, 0.4, -0.1, 0.3, -0.4, 0.1, -0.2, 0.3, -0.2)
    lines = []
    for draw in range(n_draws):
        about = {"draw": draw, "metric": metric}
        lines += [make_line(60, selection="random", **about)]
        lines += [make_line(60 + shift + noise[draw], **about)]
    groups = table.summarise(lines)
    row = rows_of(groups)[0.1, "dq"]
    assert table.judge(row, groups[0]) == said


def test_best_epoch_tokens_and_seconds_stand_beside():
    lines = [make_line(60, best=61, draw=d, response_tokens=1000 + d) for d in (0, 2)]
    (row,) = rows_of(table.summarise(lines)).values()
    assert (row.best, row.size, row.seconds) == (61, 1001, (1, 2, 3))
    text = table.markdown(table.summarise(lines))
    assert "| response tokens |" in text and "best epoch" in text and "| 1.0 + 2.0 + 3.0 |" in text
    assert "best epoch" not in table.markdown(table.summarise([make_line(60)]))
    (row,) = rows_of(table.summarise([*lines, make_line(60, draw=1)])).values()
    assert (row.best, row.size) == (None, None)


def test_seconds_are_medians():
    spent = [(1, 3), (2, 5), (30, 100)]
    lines = [
        make_line(60, draw=d, seconds={"selection": a, "proxy": None, "training": b})
        for d, (a, b) in enumerate(spent)
    ]
    text = table.markdown(table.summarise(lines))
    assert "| 2.0 + ? + 5.0 |" in text and "Seconds are medians" in text
    assert "Seconds are" not in table.markdown(table.summarise([make_line(60, seconds=None)]))


@pytest.mark.parametrize(("n_bytes", "is_shown"), [(2060, False), (2200, True), (None, False)])
def test_bytes_are_shown_where_they_differ(n_bytes, is_shown):
    lines = [make_line(60, bytes=1000), make_line(60, keep_ratio=0.2, rows=200, bytes=n_bytes)]
    assert ("| bytes |" in table.markdown(table.summarise(lines))) == is_shown


def test_a_metric_without_a_direction_is_refused():
    with pytest.raises(ValueError, match="got 'perplexity'"):
        table.summarise([make_line(60, metric="perplexity")])


def test_a_run_that_diverged_is_shown():
    lines = random_draws(60, 70)
    lines += [make_line(v, draw=d) for d, v in enumerate((float("nan"), None))]
    groups = table.summarise(lines)
    assert "nan" in table.markdown(groups)
    assert table.judge(rows_of(groups)[0.1, "dq"], groups[0]) == ""


@pytest.mark.parametrize(("n_draws", "said"), [(3, 0.76), (6, 0.87), (10, 0.92)])
def test_intervals_of_few_draws_are_as_short_as_the_docs_say(n_draws, said):
    rng = np.random.default_rng(n_draws)
    held = []
    for values in rng.normal(size=(400, n_draws)).tolist():
        low, high = table.estimate({(k, 0): value for k, value in enumerate(values)}).interval
        held.append(low <= 0 <= high)
    assert abs(np.mean(held) - said) < 0.05


def test_the_figure_has_the_same_bytes_each_time(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lines = [
        make_line(60 + 20 * ratio + draw % 3 + len(name), **about, draw=draw, metric=metric)
        for metric in ("test accuracy", "loss: held out", "loss: gsm8k")
        for name in ("random", "dq", "adq")
        for ratio in (0.01, 0.1)
        for draw in range(3)
        for about in [{"selection": name, "keep_ratio": ratio}]
    ]
    groups = table.summarise(lines)
    assert len(groups) == 3
    for name in ("a", "b"):
        assert table.figure(groups, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not table.figure(table.summarise([make_line(60)]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
