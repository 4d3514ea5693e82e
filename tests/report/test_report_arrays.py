"""What the report measures, against the definition written plainly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import clusters

from dq_multimodal.report import coverage, duplicates, layout, vectors
from dq_multimodal.report.charts import bin_colours, normalise, round_ticks
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
    monkeypatch.setattr(vectors, "QUERY_ROWS", 16)
    monkeypatch.setattr(vectors, "TARGET_ROWS", 23)
    monkeypatch.setattr(vectors, "QUERY_NUMBERS", 400)
    monkeypatch.setattr(duplicates, "LEFT_ROWS", 17)
    monkeypatch.setattr(duplicates, "RIGHT_ROWS", 29)


@pytest.mark.parametrize(("similarity", "n_left"), SETTINGS)
@pytest.mark.parametrize("is_self_allowed", [True, False])
def test_nearest_is_brute_force(small_blocks, similarity, n_left, is_self_allowed):
    values = clusters(150) + 3
    targets = np.sort(np.random.default_rng(1).permutation(150)[:60])
    opened = vectors.Vectors(values, similarity, n_left)
    pairs = []
    found, distances = vectors.nearest(
        opened,
        np.arange(150),
        targets,
        is_self_allowed=is_self_allowed,
        on_pairs=pairs.append,
    )
    expected = all_distances(values, similarity, n_left)
    if not is_self_allowed:
        np.fill_diagonal(expected, np.inf)
    best = expected[:, targets].min(axis=1)
    np.testing.assert_allclose(distances, best, atol=2e-6 * best.max())
    np.testing.assert_allclose(expected[np.arange(150), found], best, atol=2e-5 * best.max())
    assert sum(pairs) == 150 * 60


def test_one_target_is_not_its_own_neighbour():
    opened = vectors.Vectors(clusters(5), "cosine")
    found, distances = vectors.nearest(opened, np.arange(5), np.array([2]), is_self_allowed=False)
    assert found.tolist() == [2, 2, -1, 2, 2]
    assert np.isnan(distances[2]) and np.isfinite(np.delete(distances, 2)).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_distances_survive_extreme_scales(scale):
    values = clusters(40) * np.float32(scale)
    opened = vectors.Vectors(values, "euclidean")
    distances = vectors.nearest(opened, np.arange(40), np.arange(10))[1]
    expected = all_distances(values, "euclidean", 0)[:, :10].min(axis=1)
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(("similarity", "n_left"), SETTINGS)
def test_coverage_is_brute_force(small_blocks, similarity, n_left):
    values = clusters(150)
    values[[3, 77]] = 0  # unreadable rows neither ask nor answer
    order = np.random.default_rng(2).permutation(150)
    kept, other = order < 30, order >= 120
    opened = vectors.Vectors(values, similarity, n_left)
    found = coverage.measure_coverage(opened, kept, other, seed=0)
    readable = values.any(axis=1)
    expected = all_distances(values[readable], similarity, n_left)
    for chosen, distances in ((kept, found.kept), (other, found.random)):
        best = expected[:, chosen[readable]].min(axis=1)
        np.testing.assert_allclose(distances, best, atol=2e-6 * best.max())
    assert not found.is_sampled and found.n_readable == readable.sum()
    facts = coverage.as_facts(found, "dq")
    assert facts["kept"]["mean"] == pytest.approx(found.kept.mean())
    assert facts["kept"]["p95"] == pytest.approx(np.quantile(found.kept, 0.95))


def test_coverage_of_a_sample_says_so():
    values = clusters(3000)
    kept = np.random.default_rng(0).random(3000) < 0.3
    opened = vectors.Vectors(values, "cosine")
    found = coverage.measure_coverage(opened, kept, ~kept, seed=5, max_pairs=300 * 2200)
    assert found.is_sampled and 256 <= len(found.rows) < 400
    again = coverage.measure_coverage(opened, kept, ~kept, seed=5, max_pairs=300 * 2200)
    np.testing.assert_array_equal(found.rows, again.rows)
    whole = coverage.measure_coverage(opened, kept, ~kept, seed=5)
    np.testing.assert_allclose(found.kept, whole.kept[found.rows], atol=1e-9)


def test_no_readable_kept_row_is_no_coverage():
    values = clusters(20)
    values[:5] = 0
    opened = vectors.Vectors(values, "cosine")
    assert coverage.measure_coverage(opened, np.arange(20) < 5, np.arange(20) > 5, 0) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (0.1, 0.2, "dq covers the data better than random selection"),
        (0.2, 0.1, "random selection covers the data better than dq"),
        (0.2, 0.2001, "equally well"),
    ],
)
def test_the_verdict_does_not_flatter(ours, theirs, words):
    rows = np.arange(100)
    found = coverage.Coverage(rows, np.full(100, ours), np.full(100, theirs), 100)
    assert coverage.judge(found, "dq").count(words) == 2


def test_the_verdict_says_when_measures_disagree():
    ours, theirs = np.full(100, 0.1), np.full(100, 0.2)
    ours[:10] = 0.5
    found = coverage.Coverage(np.arange(100), ours, theirs, 100)
    assert "disagree" in coverage.judge(found, "dq")


def test_measures_that_name_no_winner_do_not_disagree():
    ours, theirs = np.full(100, 0.1), np.full(100, 0.10001)
    ours[:10], theirs[:10] = 0.50001, 0.5
    verdict = coverage.judge(coverage.Coverage(np.arange(100), ours, theirs, 100), "dq")
    assert verdict.count("equally well") == 2
    assert "disagree" not in verdict


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
    found = duplicates.find_groups(vectors.Vectors(values, "cosine", n_left), threshold, 0)
    assert [m.tolist() for m in found.members] == brute_groups(values, n_left, threshold)
    assert found.n_searched == found.n_readable == 140


@pytest.mark.parametrize("many", [0.0, 0.02, 1.0])
def test_comparing_few_directions_first_changes_nothing(small_blocks, monkeypatch, many):
    monkeypatch.setattr(duplicates, "N_DIRECTIONS", 6)
    monkeypatch.setattr(duplicates, "MANY", many)
    values = clusters(140, size=40, n_clusters=9)
    opened = vectors.Vectors(values, "cosine")
    short = duplicates._directions(opened.take(np.arange(140)))
    whole = opened.take(np.arange(140)).products(opened.take(np.arange(140)))
    assert short.shape == (140, 7)
    assert (short @ short.T >= whole - 1e-5).all()
    for threshold in (0.8, 0.9):
        found = duplicates.find_groups(opened, threshold, 0)
        assert [m.tolist() for m in found.members] == brute_groups(values, 0, threshold)


def test_groups_of_a_sample_say_so():
    found = duplicates.find_groups(vectors.Vectors(clusters(500), "cosine"), 0.9, 0, max_rows=100)
    assert (found.n_searched, found.n_readable) == (100, 500)


def test_unreadable_rows_are_no_duplicates():
    values = clusters(30)
    values[:10] = 0
    found = duplicates.find_groups(vectors.Vectors(values, "cosine"), 0.999999, 0)
    assert found.members == [] and found.n_readable == 20
    nothing = duplicates.find_groups(vectors.Vectors(np.zeros((4, 3)), "cosine"), 0.9, 0)
    assert nothing.members == [] and nothing.n_searched == 0


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_rows_that_are_all_alike_stay_cheap(noise):
    rng = np.random.default_rng(0)
    values = np.ones((20_000, 256), dtype=np.float32)
    values += noise * rng.standard_normal(values.shape, dtype=np.float32)
    found = duplicates.find_groups(vectors.Vectors(values, "cosine"), 0.95, 0)
    assert [len(m) for m in found.members] == [20_000]


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
def test_any_rows_have_places(similarity, n_rows, is_same):
    values = np.ones((n_rows, 4), dtype=np.float32) if is_same else clusters(n_rows, 4)
    opened = vectors.Vectors(values, similarity)
    gram = layout.gram_matrix(opened, np.arange(n_rows))
    places = layout.place_points(gram)
    assert places.shape == (n_rows, 2) and ((places >= 0) & (places <= 1)).all()
    assert len(np.unique(places, axis=0)) == n_rows
    ids, distances = layout.nearest_points(gram, similarity == "cosine")
    assert ids.shape == distances.shape == (n_rows, min(15, n_rows - 1))
    assert (ids != np.arange(n_rows)[:, None]).all() and np.isfinite(distances).all()


def test_alike_rows_lie_near_each_other():
    values = clusters(300, n_clusters=3)
    opened = vectors.Vectors(values, "cosine")
    gram = layout.gram_matrix(opened, np.arange(300))
    places = layout.place_points(gram)
    ids = layout.nearest_points(gram, True)[0]
    near = np.linalg.norm(places[ids[:, 0]] - places, axis=1).mean()
    far = np.linalg.norm(places[:, None] - places, axis=2).mean()
    assert near < far / 4


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
    assert round_ticks(0.73) == [0, 0.2, 0.4, 0.6]
    assert round_ticks(0.0) == [0.0] and len(round_ticks(123.4)) >= 3
    for n_bins in (0, 1, 2, 10, 300):
        colours = bin_colours(n_bins)
        assert len(colours) == n_bins and all(len(c) == 7 for c in colours)
