"""What the report measures, against the definition written plainly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import clusters
from scipy.sparse.csgraph import connected_components

from dq_multimodal.adapters.image_text import join_halves
from dq_multimodal.core import one_bin, order_rows
from dq_multimodal.report import compare, layout
from dq_multimodal.report.figures import bin_colours, normalise
from dq_multimodal.report.rows import clean, clean_name, cut_fields, shorten

SETTINGS = [("cosine", 0), ("euclidean", 0), ("cosine", 5), ("euclidean", 5)]


def expand(values, n_left):
    if not n_left:
        return values.astype(np.float64)
    wide = values.astype(np.float64)
    return np.einsum("ni,nj->nij", wide[:, :n_left], wide[:, n_left:]).reshape(len(values), -1)


def all_distances(values, similarity, n_left):
    rows = expand(values, n_left)
    if similarity == "euclidean":
        return np.linalg.norm(rows[:, None] - rows, axis=2)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.maximum(1 - unit @ unit.T, 0)


@pytest.fixture
def small_blocks(monkeypatch):
    sizes = {"READ_ROWS": 16, "TILE_ROWS": 23, "LEFT_ROWS": 17, "RIGHT_ROWS": 29, "MERGED_PAIRS": 9}
    for name, size in sizes.items():
        monkeypatch.setattr(compare, name, size)
    monkeypatch.setattr(layout, "AT_ONCE", 31)


@pytest.mark.parametrize(("similarity", "n_left"), SETTINGS)
def test_nearest_is_brute_force(small_blocks, similarity, n_left):
    values = clusters(150) + 3
    targets = np.sort(np.random.default_rng(1).permutation(150)[:60])
    opened = compare.Vectors(values, similarity, n_left)
    pairs = []
    rows = np.arange(150)
    found, distances = compare.nearest(opened, rows, targets, on_pairs=pairs.append)
    expected = all_distances(values, similarity, n_left)
    np.fill_diagonal(expected, np.inf)
    best = expected[:, targets].min(axis=1)
    np.testing.assert_allclose(distances, best, atol=2e-6 * best.max())
    np.testing.assert_allclose(expected[rows, found], best, atol=2e-5 * best.max())
    assert sum(pairs) == 150 * 60


def test_one_target_is_not_its_own_neighbour():
    opened = compare.Vectors(clusters(5), "cosine")
    found, distances = compare.nearest(opened, np.arange(5), np.array([2]))
    assert found.tolist() == [2, 2, -1, 2, 2]
    assert np.isnan(distances[2]) and np.isfinite(np.delete(distances, 2)).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_distances_survive_extreme_scales(scale):
    values = clusters(40) * np.float32(scale)
    opened = compare.Vectors(values, "euclidean")
    distances = compare.nearest(opened, np.arange(10, 40), np.arange(10))[1]
    expected = all_distances(values, "euclidean", 0)[10:, :10].min(axis=1)
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(("similarity", "n_left"), SETTINGS)
def test_coverage_is_brute_force(small_blocks, similarity, n_left):
    values = clusters(150)
    values[[3, 77]] = 0  # unreadable rows neither ask nor answer
    rng = np.random.default_rng(2)
    sets = np.array([rng.permutation(150) < 30 for _ in range(8)])
    opened = compare.Vectors(values, similarity, n_left)
    readable = np.flatnonzero(values.any(axis=1))
    found = compare.measure_coverage(opened, sets[0], sets[1:], "dq", 0)
    distances = all_distances(values[readable], similarity, n_left)
    nearest = np.array([distances[:, chosen[readable]].min(axis=1) for chosen in sets])
    shares = np.linspace(0, 1, 201)
    curves = np.quantile(nearest, shares, axis=1).T
    close = {"atol": 1e-5 * nearest.max()}
    np.testing.assert_allclose(found.kept_curve, curves[0], **close)
    np.testing.assert_allclose(found.random_curve, curves[1:].mean(axis=0), **close)
    low, high = np.quantile(curves[1:], [0.025, 0.975], axis=0)
    np.testing.assert_allclose(found.random_low, low, **close)
    np.testing.assert_allclose(found.random_high, high, **close)
    for name, measure in {
        "mean": lambda d: d.mean(),
        "median": np.median,
        "p95": lambda d: np.quantile(d, 0.95),
        "max": np.max,
    }.items():
        assert found.kept[name] == pytest.approx(measure(nearest[0]), rel=1e-5)
        drawn = [measure(of_draw) for of_draw in nearest[1:]]
        expected = [np.mean(drawn), *np.quantile(drawn, [0.025, 0.975])]
        np.testing.assert_allclose(found.random[name], expected, rtol=1e-5)
    assert not found.is_sampled and found.n_readable == 148 and found.n_draws == 7


def test_coverage_of_a_sample_says_so_and_is_near():
    values = clusters(4000)
    rng = np.random.default_rng(0)
    sets = rng.random((4, 4000)) < 0.3
    opened = compare.Vectors(values, "cosine")
    found = compare.measure_coverage(opened, sets[0], sets[1:], "dq", 0, max_pairs=1)
    assert found.is_sampled and found.n_asked == 1000
    whole = compare.measure_coverage(opened, sets[0], sets[1:], "dq", 0)
    assert not whole.is_sampled
    assert found.kept["mean"] == pytest.approx(whole.kept["mean"], rel=0.05)
    # how many rows are kept, and so the share of the distances that are 0, is not estimated
    for coverage in (found, whole):
        assert np.mean(np.array(coverage.kept_curve) == 0) == pytest.approx(0.3, abs=0.02)


def test_no_readable_kept_row_is_no_coverage():
    values = clusters(20)
    values[:5] = 0
    opened = compare.Vectors(values, "cosine")
    first = np.arange(20) < 5
    assert compare.measure_coverage(opened, first, ~first[None], "dq", 0) is None


def test_random_draws_are_those_of_the_method_with_other_seeds():
    strata = np.arange(1000) % 3
    rows = np.flatnonzero(np.arange(1000) % 10)
    draws = compare.draw_random(strata, 90, 7, rows)
    for number, chosen in enumerate(draws):
        order = order_rows(one_bin(strata[rows]), seed=8 + number, rows=rows)
        np.testing.assert_array_equal(np.flatnonzero(chosen), rows[order < 90])
    assert len({chosen.tobytes() for chosen in draws}) == 20


@pytest.mark.parametrize(
    ("mean", "p95", "words", "is_in_both"),
    [
        (0.1, 0.4, "dq covers the data better than random selection", True),
        (0.3, 0.6, "random selection covers the data better than dq", True),
        (0.199, 0.503, "equally well", True),
        (0.1, 0.6, "The two measures disagree", False),
    ],
)
def test_the_verdict_neither_flatters_nor_wrongs(mean, p95, words, is_in_both):
    random = {"mean": (0.2, 0.19, 0.21), "p95": (0.5, 0.49, 0.51)}
    verdict = compare.judge({"mean": mean, "p95": p95}, random, "dq")
    assert verdict.count(words) == 1 + is_in_both


def brute_groups(values, n_left, threshold):
    rows = expand(values, n_left)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = unit @ unit.T >= threshold
    group = np.arange(len(rows))
    for _ in range(len(rows)):
        new = np.array([group[alike[i]].min() for i in range(len(rows))])
        if (new == group).all():
            break
        group = new
    return sorted(
        (np.flatnonzero(group == g).tolist() for g in np.unique(group) if (group == g).sum() > 1),
        key=lambda members: (-len(members), members[0]),
    )


@pytest.mark.parametrize("n_left", [0, 5])
@pytest.mark.parametrize("threshold", [0.85, 0.97])
def test_groups_are_connected_components(small_blocks, n_left, threshold):
    values = clusters(140, n_clusters=12)
    values[20:30] = values[0:10]  # equal rows
    values[40] = values[0] * 3  # equal up to scale
    found = compare.find_groups(compare.Vectors(values, "cosine", n_left), threshold, 0)
    assert [m.tolist() for m in found.members] == brute_groups(values, n_left, threshold)
    assert found.n_searched == found.n_readable == 140


@pytest.mark.parametrize("many", [0.0, 0.02, 1.0])
def test_comparing_few_directions_first_changes_nothing(small_blocks, monkeypatch, many):
    for name, value in {"N_DIRECTIONS": (6,), "FEW": 1.1, "MANY": many}.items():
        monkeypatch.setattr(compare, name, value)
    values = clusters(140, size=40, n_clusters=9)
    opened = compare.Vectors(values, "cosine")
    for threshold in (0.8, 0.9):
        found = compare.find_groups(opened, threshold, 0)
        assert [m.tolist() for m in found.members] == brute_groups(values, 0, threshold)


def test_pairs_must_be_alike_in_both_halves(small_blocks):
    image, text = clusters(140, n_clusters=5), clusters(140, n_clusters=3)[::-1].copy()
    text[30:40], image[50:60], image[70:73] = text[0], 0, 0
    text[70:73] = text[1]
    whole = join_halves(image.astype("f4"), text.astype("f4"), 0.5)
    size, least = image.shape[1], (0.9, 0.8)
    opened = [compare.Vectors(half, "cosine") for half in (whole[:, :size], whole[:, size:])]
    halves = [*zip(opened, least, strict=True)]
    found = compare.find_groups(compare.Vectors(whole, "cosine"), 0.85, 0, halves=halves)
    is_alike = whole @ whole.T >= 0.85 * np.linalg.norm(whole, axis=1)[:, None] * np.linalg.norm(
        whole, axis=1
    )
    for half, bound in zip((image, text), least, strict=True):
        norms = np.linalg.norm(half, axis=1)
        unit = half / np.where(norms > 0, norms, 1)[:, None]
        neither = (norms == 0)[:, None] & (norms == 0)
        is_alike &= neither | (unit @ unit.T >= bound)
    codes = connected_components(is_alike)[1]
    wanted = [np.flatnonzero(codes == code).tolist() for code in np.unique(codes)]
    wanted = sorted((rows for rows in wanted if len(rows) > 1), key=lambda rows: (-len(rows), rows))
    assert sorted((m.tolist() for m in found.members), key=lambda r: (-len(r), r)) == wanted
    assert any({70, 71, 72} <= {*rows} for rows in wanted)
    assert len(wanted) > 3
    looser = compare.find_groups(compare.Vectors(whole, "cosine"), 0.85, 0)
    assert sum(map(len, looser.members)) > sum(map(len, found.members))


def test_groups_of_the_run_are_each_row_with_those_that_repeat_it():
    duplicate_of = np.array([-1, 0, -1, 2, 0, -1, 2, 2])
    found = compare.read_groups(duplicate_of, np.zeros(8, dtype=bool), 0.9)
    assert [m.tolist() for m in found.members] == [[2, 3, 6, 7], [0, 1, 4]]
    assert found.is_of_run and found.threshold == 0.9


def test_groups_of_a_sample_say_so():
    found = compare.find_groups(compare.Vectors(clusters(500), "cosine"), 0.9, 0, max_rows=100)
    assert (found.n_searched, found.n_readable) == (100, 500)


def test_unreadable_rows_are_no_duplicates():
    values = clusters(30)
    values[:10] = 0
    found = compare.find_groups(compare.Vectors(values, "cosine"), 0.999999, 0)
    assert found.members == [] and found.n_readable == 20
    nothing = compare.find_groups(compare.Vectors(np.zeros((4, 3)), "cosine"), 0.9, 0)
    assert nothing.members == [] and nothing.n_searched == 0


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_rows_that_are_all_alike_stay_cheap(noise):
    rng = np.random.default_rng(0)
    values = np.ones((20_000, 256), dtype=np.float32)
    values += noise * rng.standard_normal(values.shape, dtype=np.float32)
    found = compare.find_groups(compare.Vectors(values, "cosine"), 0.95, 0)
    assert [len(m) for m in found.members] == [20_000]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=12))
def test_same_picture_with_other_words_is_what_it_says(rows):
    """Picture 0 is none, words 0 are none; words 1 and 2 say nearly the same."""
    rng = np.random.default_rng(0)
    pictures, words = rng.standard_normal((4, 8)), rng.standard_normal((5, 8))
    words[2] = words[1] + 0.1 * words[2]
    pictures[0] = words[0] = 0
    images, texts = (
        table[of] for table, of in zip((pictures, words), np.array(rows).T, strict=True)
    )
    images += 1e-5 * rng.standard_normal(images.shape) * images.any(axis=1)[:, None]
    found = compare.find_other_words(
        *(compare.Vectors(half.astype(np.float32), "cosine") for half in (images, texts)), 0
    )
    expected, said = [], (0, 1, 1, 3, 4)
    for picture in (1, 2, 3):
        members = [k for k, (of, what) in enumerate(rows) if of == picture and what]
        if len({said[rows[k][1]] for k in members}) > 1:
            expected.append(members)
    expected.sort(key=lambda members: (-len(members), members[0]))
    assert [m.tolist() for m in found.members] == expected
    assert found.n_searched == sum(p > 0 and w > 0 for p, w in rows)


def test_points_are_sampled_in_proportion():
    readable = np.ones(10_000, dtype=bool)
    readable[::10] = False
    kept = np.arange(10_000) % 5 == 1
    rows = layout.sample_points(readable, kept, 900, seed=3)
    assert len(rows) == 900 and (np.diff(rows) > 0).all() and readable[rows].all()
    assert abs(kept[rows].sum() - 900 * kept[readable].mean()) <= 1
    np.testing.assert_array_equal(rows, layout.sample_points(readable, kept, 900, seed=3))
    assert len(layout.sample_points(readable, kept, 20_000, 0)) == readable.sum()


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 7, 8, 60])
@pytest.mark.parametrize("is_same", [True, False])
def test_any_rows_have_places(small_blocks, similarity, n_rows, is_same):
    values = np.ones((n_rows, 4), dtype=np.float32) if is_same else clusters(n_rows, 4)
    opened = compare.Vectors(values, similarity)
    kept = np.arange(n_rows) < 2
    shown = layout.make_map(opened, kept, 1000, 0)
    assert shown.rows.tolist() == list(range(n_rows))
    assert shown.places.shape == (n_rows, 2)
    assert ((shown.places >= 0) & (shown.places <= 1)).all()
    assert len(np.unique(shown.places, axis=0)) == n_rows
    ids, distances = shown.neighbour_ids, shown.neighbour_distances
    assert ids.shape == distances.shape == (n_rows, min(15, n_rows - 1))
    if not is_same:
        expected = all_distances(values, similarity, 0)
        np.fill_diagonal(expected, np.inf)
        nearest = np.sort(expected, axis=1)[:, : ids.shape[1]]
        np.testing.assert_allclose(distances, nearest, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), nearest, atol=1e-5)
    assert (ids != np.arange(n_rows)[:, None]).all() and np.isfinite(distances).all()


@pytest.mark.parametrize(("n_clusters", "least"), [(3, 0.91), (60, 0.97)])
def test_the_map_keeps_neighbours(n_clusters, least):
    """The trustworthiness of scikit-learn's t-SNE is 0.95 and 0.997, of a PCA 0.88 and 0.75."""
    from sklearn.manifold import trustworthiness

    values = clusters(600, n_clusters=n_clusters)
    shown = layout.make_map(compare.Vectors(values, "cosine"), np.arange(600) < 60, 600, 0)
    score = trustworthiness(values, shown.places, n_neighbors=10, metric="cosine")
    assert score > least


texts = st.lists(st.text(max_size=80), min_size=1, max_size=6)


@given(texts, st.integers(6, 200))
def test_fields_are_cut_together(fields, limit):
    cut = cut_fields(fields, limit)
    assert sum(map(len, cut)) <= limit
    for before, after in zip(fields, cut, strict=True):
        assert after == before or after.endswith("…")
    if sum(map(len, fields)) <= limit:
        assert cut == fields


@given(st.text(st.characters(), max_size=60))
def test_clean_text_can_be_held_by_any_page(text):
    cleaned = clean(text)
    cleaned.encode()
    assert not any(ord(c) < 32 and c not in "\n\t" for c in cleaned)
    assert len(shorten(cleaned, 10)) <= 10
    name = clean_name(text, 20)
    assert 0 < len(name) <= 20 and "\n" not in name and "\u202e" not in name


def test_small_pieces_of_charts():
    assert normalise([1.0, None, 3.0]) == [0.0, None, 1.0]
    assert normalise([2.0, 2.0]) == [0.5, 0.5]
    for n_bins in (0, 1, 2, 10, 300):
        colours = bin_colours(n_bins)
        assert len(colours) == n_bins and all(len(c) == 7 for c in colours)
