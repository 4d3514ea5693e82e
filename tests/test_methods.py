"""Methods coverage, blocks, ccs, dual and auto, and what else orders rows, end to end."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from forging import (
    BINS,
    FILES,
    NUMBERS,
    ORDER,
    SUBSET,
    change_document,
    change_table,
    record_again,
    swap,
)
from nasty_images import picture, save

from dq_multimodal import InputError, Run, compress, resample, verify
from dq_multimodal.pipeline import plan
from dq_multimodal.stages.marks import MARK_TYPES
from dq_multimodal.stages.ordering import bin_by_method, order_by_method
from dq_multimodal.stages.selection import write_selection

N = 120
SELECTION = "selection.parquet"
GIVEN = ("--label-column", "label", "--ready-embeddings", "e.npy")
DYNAMICS = ("--label-column", "label", "--dynamics", "dynamics.npy")
FLAGS = {
    "coverage": (*GIVEN, "--dynamics", "dynamics.npy", "--difficulty", "dual"),
    "blocks": GIVEN,
    "ccs": DYNAMICS,
    "dual": DYNAMICS,
}
ALL_PASSED = ["passed"] * 5


def write_inputs(folder: Path) -> None:
    """d.parquet, e.npy, dynamics.npy and losses.npy of 120 rows in three classes.

    Rows 100 ... 103 equal rows 0 ... 3, row 104 has a cosine of 0.9 with row 4.
    """
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1, 2], [60, 40, 20])[rng.permutation(N)]
    label[100:105] = label[:5]
    text = [f"row {k}" for k in range(N)]
    sources = [["web", "book"][k % 2] if k % 10 else "code" for k in range(N)]
    columns = {"text": text, "label": label, "source": sources, "length": rng.uniform(1, 9, N)}
    columns["debt"] = -columns["length"]
    Dataset.from_dict(columns).to_parquet(folder / "d.parquet")
    rows = rng.normal(size=(N, 16)) + 2 * np.eye(3, 16)[label]
    rows[100:104] = rows[:4]
    rows[4] = 9 * np.eye(16)[15]
    rows[104] = 0.9 * np.eye(16)[15] + np.sqrt(0.19) * np.eye(16)[14]
    np.save(folder / "e.npy", rows.astype(np.float32))
    p = np.clip(rng.uniform(0.5, 0.9, N) + rng.normal(0, 0.05, (12, N)), 0.02, 0.98)
    p[:, 7::20] /= 10  # six rows that seem to be labelled wrong
    other = (1 - p) * rng.uniform(0.5, 1, p.shape)
    dynamics = np.stack([p, other, 1.2 * (1 - p)], axis=2).astype(np.float16)
    np.save(folder / "dynamics.npy", dynamics)
    np.save(folder / "one_epoch.npy", dynamics[:1])
    np.save(folder / "short.npy", dynamics[:, 1:])
    np.save(folder / "losses.npy", rng.uniform(1, 4, (1, N, 2)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def made(place, command):
    """A run of 24 rows of every method, by the command line."""
    return {
        method: run_of(command, place, "--method", method, *flags, output_dir=f"run-{method}")
        for method, flags in FLAGS.items()
    }


def run_of(command, folder, *flags, output_dir, **options):
    arguments = ("compress", "d.parquet", *flags, "--no-report", "--output-dir", output_dir)
    command(folder, *arguments, **options)
    return Run(folder / output_dir)


def copy_of(run, tmp_path, name="copy", *, with_embeddings=True):
    shutil.copytree(run.path, tmp_path / name)
    if not with_embeddings:
        (tmp_path / name / "embeddings.npy").unlink(missing_ok=True)
    return tmp_path / name


def columns(run):
    return pq.read_table(run.path / SELECTION).to_pydict()


def weights(run):
    """Row and weight of the kept rows, as they stand in the subset."""
    return dict(zip(run.subset["dq_row"], run.subset["dq_weight"], strict=True))


def results(run):
    return [check.result for check in verify(run)]


@pytest.mark.parametrize("method", FLAGS)
def test_a_run_passes_all_checks(made, method, command, place):
    run = made[method]
    assert run.kept.tolist() == sorted(np.argsort(run.order)[:24])
    found = json.loads(command(place, "verify", f"run-{method}", "--json").stdout)
    makes_none = method in ("ccs", "dual")
    wanted = ["passed"] * 3 + ["skipped" if makes_none else "passed", "passed"]
    assert [check["result"] for check in found] == wanted, found
    assert ("dq_weight" in run.subset.column_names) == (method in ("coverage", "ccs"))


def test_rows_likely_to_be_labelled_wrong_are_last(made):
    wrong = np.arange(7, N, 20)
    assert sorted(made["coverage"].order[wrong]) == list(range(N - 6, N))  # 5 % of 120
    assert made["ccs"].order[wrong].min() >= N - 36  # 30 %
    for method, share in (("coverage", 0.05), ("ccs", 0.3), ("dual", None)):
        card = (made[method].path / "README.md").read_text()
        assert "looks at how a model learned the rows, never at what one learns" in card
        assert re.findall(r"\| noise_ratio \| `(.*)` \|", card) == ([str(share)] if share else [])


def test_a_weight_counts_the_rows_that_a_kept_row_stands_for(made, place):
    run = made["coverage"]
    rows = np.load(place / "e.npy").astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    counts = dict.fromkeys(run.kept.tolist(), 0)
    covered = np.setdiff1d(np.arange(N), np.arange(7, N, 20))
    for row in covered:
        own = [k for k in run.kept if run.bins.stratum[k] == run.bins.stratum[row]]
        own.sort(key=lambda k: run.bins.rank[k])  # of equal ones the first
        cosines = np.round(rows[own] @ rows[row], 9)
        counts[row if row in own else own[int(cosines.argmax())]] += 1
    assert sum(counts.values()) == len(covered)
    found, mean = weights(run), len(covered) / 24
    assert found == {k: pytest.approx(n / mean) for k, n in counts.items()}
    assert len(set(found.values())) > 3


def test_a_weight_of_ccs_is_the_inverse_of_the_share_that_was_kept(made):
    found = weights(made["ccs"])
    assert np.mean([*found.values()]) == pytest.approx(1)
    aum = np.array(columns(made["ccs"])["aum"])
    first = np.sort(np.argsort(aum, kind="stable")[36:])
    edges = np.linspace(aum[first].min(), aum[first].max(), 51)[1:-1]
    stratum = {row: int(np.searchsorted(edges, aum[row], side="right")) for row in first}
    held, kept = (np.bincount([stratum[k] for k in some], minlength=50) for some in (first, found))
    shares = {k: held[stratum[k]] / kept[stratum[k]] for k in found}
    mean = np.mean([*shares.values()])
    assert found == {k: pytest.approx(share / mean) for k, share in shares.items()}


@pytest.mark.parametrize("method", ["coverage", "blocks", "ccs"])
def test_sizes_are_nested_and_need_no_embeddings(made, method, tmp_path, command):
    run = made[method]
    copy_of(run, tmp_path, with_embeddings=False)
    command(tmp_path, "resample", "copy", "--keep-ratio", 0.1, "--output-dir", "small")
    command(tmp_path, "resample", "copy", "--keep-rows", 50, "--output-dir", "large")
    small, large = Run(tmp_path / "small"), Run(tmp_path / "large")
    assert (len(small.kept), len(large.kept)) == (12, 50)
    assert set(small.kept) < set(run.kept) < set(large.kept)
    assert "failed" not in results(small) + results(large)


def test_another_method_needs_no_embeddings_where_its_marks_are_there(made, tmp_path):
    bare = copy_of(made["coverage"], tmp_path, with_embeddings=False)
    for method in ("random", "ccs", "dual"):
        drawn = resample(bare, 0.3, method=method, output_dir=tmp_path / method)
        wanted = made.get(method)
        if method == "ccs":
            assert drawn.order.tolist() == wanted.order.tolist()
        assert len(drawn.kept) == 36
        assert ("dq_weight" in drawn.subset.column_names) == (method == "ccs")
        assert "failed" not in results(drawn)
    back = resample(tmp_path / "ccs", 0.2, method="coverage", output_dir=tmp_path / "back")
    assert weights(back) == weights(made["coverage"])
    for method in ("blocks", "graphcut", "dq"):
        with pytest.raises(InputError, match=rf"{method} needs bins .* nor embeddings\.npy"):
            resample(bare, 0.3, method=method, output_dir=tmp_path / "no")
    whole = resample(made["blocks"], 0.2, method="coverage", output_dir=tmp_path / "whole")
    assert "dq_weight" in whole.subset.column_names
    assert "failed" not in results(whole)


@pytest.fixture(scope="module")
def marked(place, command, small_encoder):
    """A run of all that marks rows but a target, and one with a target."""
    Dataset.from_dict({"text": [f"row {k} too" for k in range(20)]}).to_parquet(place / "t.parquet")
    return {
        "coverage": run_of(
            *(command, place, "--method", "coverage", *FLAGS["coverage"], "--keep-ratio", 0.5),
            *("--drop-duplicates", "--cap-by", "source", "--cap", 0.5),
            output_dir="marked",
        ),
        "target": run_of(
            *(command, place, "--ready-embeddings", "e.npy", "--embedding-model", small_encoder),
            *("--target", "t.parquet"),
            output_dir="targeted",
        ),
    }


def put(value, at):
    """Change one value of a column."""

    def change(column):
        values = column.to_pylist()
        place = at(values) if callable(at) else at
        values[place] = value(values[place]) if callable(value) else value
        return pa.array(values, column.type)

    return change


def name_another(record):
    """A record of two or more picks whose last one is another pick."""
    return [*record[:-1], record[-1] - 1 if record[-1] - 1 not in record else record[-1] + 1]


FORGED = {
    "dq_weight": ("coverage", SUBSET, put(lambda w: w + 0.25, 3), [NUMBERS]),
    "aum": ("coverage", SELECTION, put(0.9, 7), [ORDER]),
    "duplicate_of": ("coverage", SELECTION, put(None, 100), [ORDER]),
    "difficulty": ("coverage", SELECTION, put(lambda w: 50 * w + 5, 11), [BINS]),
    "group": ("coverage", SELECTION, lambda c: pa.array([0] * N, pa.int32()), [ORDER]),
    "nearest": (
        "coverage",
        SELECTION,
        put(name_another, lambda v: next(k for k, r in enumerate(v) if len(r) > 2)),
        [BINS],
    ),
    "target_rank": ("target", SELECTION, swap, [ORDER]),
}


@pytest.mark.parametrize("column", FORGED)
def test_verify_finds_a_changed_number(marked, tmp_path, column):
    which, file, change, at = FORGED[column]
    run = copy_of(marked[which], tmp_path)
    wanted = ["passed"] * 3 + ["passed" if which == "coverage" else "skipped", "passed"]
    assert results(run) == wanted, verify(run)
    change_table(run, file, column, change)
    assert verify(run)[FILES].result == "failed"
    record_again(run)
    found = verify(run)
    assert found[FILES].result == "passed"
    assert all(found[k].result == "failed" for k in at), found


def test_a_forged_record_of_nearest_rows_is_found_by_the_weights_alone(made, tmp_path):
    run = made["coverage"]
    bare = copy_of(run, tmp_path, with_embeddings=False)
    records, ranks = columns(run)["nearest"], run.bins.rank
    kept = {(run.bins.stratum[k], run.bins.rank[k]) for k in run.kept}
    strata = run.bins.stratum
    row = next(  # its nearest kept row is the second one of its stratum or a later one
        k
        for k, record in enumerate(records)
        if k not in run.kept and any(r and (strata[k], r) in kept for r in record)
    )
    assert ranks[row] > 1

    def forget(record):
        return [r for r in record if not r or (strata[row], r) not in kept]

    change_table(bare, SELECTION, "nearest", put(forget, row))
    record_again(bare)
    found = verify(bare)
    assert found[NUMBERS].result == "failed", found


def test_rows_left_out_of_coverage_are_those_that_its_marks_say(made, tmp_path):
    run = Run(copy_of(made["coverage"], tmp_path))
    request, is_out = run.request, np.isin(np.arange(N), run.kept[:5])
    marks = replace(run.marks, unreadable=is_out)
    rows, strata = run.open_embeddings(), run.bins.stratum
    bins, marks = bin_by_method(rows, strata, "coverage", request, marks)
    marks = replace(marks, unreadable=None)
    order = order_by_method(bins, request, None, marks)
    labels = run.manifest["labels"]
    write_selection(run.path, bins, "coverage", order, request, labels, None, marks)
    record_again(run.path)
    found = verify(run)
    assert found[ORDER].result == "passed"
    assert found[BINS].result == "failed"


def test_a_subset_of_coverage_has_its_weights(made, tmp_path):
    run = copy_of(made["coverage"], tmp_path)
    pq.write_table(pq.read_table(run / SUBSET).drop_columns(["dq_weight"]), run / SUBSET)
    record_again(run)
    assert verify(run)[NUMBERS].result == "failed"
    with pytest.raises(InputError, match="does not hold the rows marked as kept"):
        resample(run, 0.1, output_dir=tmp_path / "out")


@pytest.mark.parametrize("mark", MARK_TYPES)
def test_marks_that_no_run_writes_end_in_one_line(marked, mark, tmp_path):
    run = copy_of(marked["coverage"], tmp_path)
    table = pq.read_table(run / SELECTION)
    table = table.drop_columns([mark]) if mark in table.column_names else table
    pq.write_table(table.append_column(mark, pa.array([b"x"] * N)), run / SELECTION)
    assert verify(run)[ORDER].result == "failed"
    with pytest.raises(InputError, match=r"the columns of .*selection\.parquet must be"):
        resample(run, 0.1, output_dir=tmp_path / "out")


def test_keep_rows(made, tmp_path, place, command):
    run = run_of(
        *(command, place, "--method", "coverage", *FLAGS["coverage"], "--keep-rows", 24),
        output_dir=tmp_path / "run",
    )
    assert run.order.tolist() == made["coverage"].order.tolist()
    assert weights(run) == weights(made["coverage"])
    assert "24 of the 120 rows" in (run.path / "README.md").read_text()
    drawn = run.resample(keep_rows=7, output_dir=tmp_path / "seven")
    assert len(drawn.kept) == 7
    assert len(drawn.resample(0.05, output_dir=tmp_path / "six").kept) == 6


def test_folders_of_numbers_of_rows_do_not_meet(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(place / "d.parquet")
    for n_rows in (30, 40):
        run = compress(source, method="random", keep_rows=n_rows, report=False)
        assert run.path == Path(f"runs/d-random-{n_rows}-rows")
    assert run.resample(keep_rows=5).path == Path("runs/d-random-5-rows")


@pytest.mark.parametrize(("cap", "n_kept", "most"), [(10, 24, 10), (0.4, 50, 20)])
def test_cap_by(cap, n_kept, most, place, tmp_path, command):
    flags = ("--method", "random", "--cap-by", "source", "--cap", cap, "--keep-rows", n_kept)
    run = run_of(command, place, *flags, output_dir=tmp_path / "run")
    kept = run.subset["source"]
    counts = {value: kept.count(value) for value in ("web", "book", "code")}
    assert sum(counts.values()) == n_kept
    assert max(counts.values()) == most
    assert results(run)[:3] == ["passed"] * 3
    half = run.resample(keep_rows=n_kept // 2, output_dir=tmp_path / "half")
    assert set(half.kept) < set(run.kept)


@pytest.mark.parametrize(("number", "alike"), [([], [100, 101, 102, 103]), ([0.8], [104])])
def test_drop_duplicates(number, alike, place, tmp_path, command):
    run = run_of(
        *(command, place, "--method", "random", "--ready-embeddings", "e.npy"),
        *("--drop-duplicates", *number, "--keep-rows", 100),
        output_dir=tmp_path / "run",
    )
    repeats = columns(run)["duplicate_of"]
    dropped = [k for k, first in enumerate(repeats) if first is not None]
    for row in alike:
        assert (repeats[row] == row - 100) != (repeats[row - 100] == row)
    assert len(dropped) == 4 if not number else len(dropped) > 4
    assert min(run.order[dropped]) == N - len(dropped)
    assert not set(run.kept) & set(dropped)
    assert any(f"{len(dropped):,} near-duplicates" in note for note in run.manifest["notes"])
    bare = copy_of(run, tmp_path, with_embeddings=False)
    drawn = resample(bare, 0.5, seed=0, output_dir=tmp_path / "drawn")
    assert drawn.order.tolist() == run.order.tolist()


AUTO = {
    "random": ((), "no method is known to be better for such rows at this size"),
    "blocks": (GIVEN[2:], "there are embeddings, and no method is known to do more with them"),
    "coverage": (
        FLAGS["coverage"][:6],
        "there are training dynamics, by which rows weigh as cad says",
    ),
}


@pytest.mark.parametrize("method", AUTO)
def test_auto_names_the_method_and_says_why(method, place, tmp_path, command):
    flags, why = AUTO[method]
    arguments = ("compress", "d.parquet", *flags, "--no-report", "--output-dir", tmp_path / "run")
    note = f"method auto is {method}, since {why}"
    assert f"note     {note}" in command(place, *arguments).stdout
    run = Run(tmp_path / "run")
    assert run.request.method == method
    assert note in run.manifest["notes"]
    assert "already complete" in command(place, *arguments).stdout
    again = run.resample(0.1, output_dir=tmp_path / "again")
    assert again.request.method == method
    assert note not in again.manifest["notes"], "it is of another size"


def test_the_folder_of_auto_has_the_name_of_its_method(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(place / "d.parquet")
    assert plan(source)["output_dir"] == "runs/d-random-0.2"
    assert compress(source, report=False).path == Path("runs/d-random-0.2")


def test_auto_with_a_target_mixes_it_with_random(marked):
    run = marked["target"]
    assert run.request.method == "random"
    assert any(note.startswith("method auto is random, since") for note in run.manifest["notes"])
    assert "dq_weight" not in run.subset.column_names


def test_auto_of_an_image_folder_is_weighted_coverage_where_few_are_kept(tmp_path, command):
    for k in range(60):
        name = "cat" if k % 3 else "dog"
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name / f"{k:02}.png").write_bytes(save(picture(seed=k)))
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(60, 4)))
    flags = ("--ready-embeddings", "e.npy", "--keep-ratio", 0.05, "--output-dir", "run")
    done = command(tmp_path, "compress", "pictures", *flags)
    assert (
        "method auto is coverage, since there are images, and at most 10% are kept" in done.stdout
    )
    run = Run(tmp_path / "run")
    assert results(run) == ALL_PASSED
    assert np.bincount(run.bins.stratum[run.kept]).tolist() == [2, 1]
    assert np.mean([*weights(run).values()]) == pytest.approx(1)
    assert "dq_weight" in (run.path / "README.md").read_text()
    assert (run.path / "report.html").is_file()


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "coverage", *FLAGS["coverage"]),
        ("--method", "ccs", *DYNAMICS),
        ("--method", "dq", *GIVEN[2:], "--partition", "kmeans:3"),
    ],
    ids=["coverage", "ccs", "parts"],
)
def test_a_run_of_the_hub_is_resampled_as_if_it_were_here(hub, place, tmp_path, command, flags):
    hub.add_repo("owner/source", {"data/train.parquet": (place / "d.parquet").read_bytes()})
    for name in ("e.npy", "dynamics.npy"):
        shutil.copy(place / name, tmp_path)
    asked = ("compress", "owner/source", *flags, "--no-report")
    command(tmp_path, *asked, "--push-to-hub", "me/small")
    assert "embeddings.npy" not in hub.files("me/small")
    for ratio in (0.1, 0.5):
        ask = ("--keep-ratio", ratio, "--output-dir")
        command(tmp_path, "resample", "me/small", *ask, f"drawn-{ratio}")
        command(tmp_path, *asked, *ask, f"fresh-{ratio}")
        drawn, fresh = (Run(tmp_path / f"{name}-{ratio}") for name in ("drawn", "fresh"))
        assert drawn.order.tolist() == fresh.order.tolist()
        assert drawn.bins.stratum.tolist() == fresh.bins.stratum.tolist()
        assert drawn.subset.to_list() == fresh.subset.to_list()  # weights are a column
    checks = json.loads(command(tmp_path, "verify", "me/small", "--json").stdout)
    assert [check["result"] for check in checks] == ["passed"] * 3 + ["skipped", "passed"]


NEW_SETTINGS = (
    *("keep_rows", "dynamics", "difficulty", "noise_ratio", "target", "target_split"),
    *("target_config", "target_columns", "target_share", "target_model", "target_gradients"),
    *("drop_duplicates", "cap_by", "cap"),
)


def test_a_folder_of_an_earlier_release_opens_verifies_and_resamples(
    place, tmp_path, small_encoder
):
    options = {"method": "adq", "embedding_model": str(small_encoder), "n_bins": 4}
    options |= {"report": False, "output_dir": tmp_path / "run"}
    run = compress(str(place / "d.parquet"), **options)
    assert "dq_weight" in run.subset.column_names
    own = weights(run)
    pq.write_table(pq.read_table(run.path / SUBSET).drop_columns(["dq_weight"]), run.path / SUBSET)

    def forget(config):
        for name in NEW_SETTINGS:
            config["request"].pop(name)
        config.pop("dynamics", None)
        config["model_folders"].pop("target_model", None)

    change_document(run.path / "config.yaml", forget)
    record_again(run.path)
    assert not set(columns(run)) & set(MARK_TYPES)
    old = Run(run.path)
    assert results(old) == ALL_PASSED
    assert "dq_weight" not in old.subset.column_names
    drawn = old.resample(0.2, output_dir=tmp_path / "drawn")
    assert weights(drawn) == own
    assert results(drawn)[:3] == ["passed"] * 3
    assert compress(str(place / "d.parquet"), **options).was_complete


def test_a_config_whose_method_is_auto_is_no_run(made, tmp_path):
    run = copy_of(made["blocks"], tmp_path)
    change_document(run / "config.yaml", lambda found: found["request"].update(method="auto"))
    with pytest.raises(InputError, match="its method is auto, and its bins are blocks"):
        Run(run)
