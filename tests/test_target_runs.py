"""compress with a target, end to end through the command line."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from small_language_model import write_language_model

from dq_multimodal import InputError, Run, compress, resample, verify
from dq_multimodal.models.language import Gradients, HiddenStates

TOPICS = ("fox dog", "over the", "lazy jumps", "quick brown")


@pytest.fixture
def places(tmp_path):
    """80 rows of four topics, and 20 target rows of the first one, one of which is row 8."""
    rng = np.random.default_rng(0)

    def write(name, topics):
        texts = [" ".join(rng.choice(TOPICS[k].split(), 5)) + f" {n}" for n, k in enumerate(topics)]
        columns = {"instruction": texts, "output": [text[::-1] for text in texts]}
        if name == "target":
            texts[3], columns["output"][3] = rows["instruction"][8], rows["output"][8]
        Dataset.from_dict(columns).to_parquet(tmp_path / f"{name}.parquet")
        return columns

    rows = write("source", [n % 4 for n in range(80)])
    write("target", [0] * 20)
    return tmp_path / "source.parquet", tmp_path / "target.parquet"


def columns_of(run):
    table = pq.read_table(run.path / "selection.parquet")
    return {name: table[name].to_numpy() for name in ("order", "kept", "target_rank", "target_row")}


def test_a_targeted_run(places, small_encoder, cli, tmp_path):
    """Most kept rows are of the topic of the target; smaller budgets are nested."""
    source, target = places
    call = (
        *("compress", source, "--target", target, "--embedding-model", small_encoder),
        *("--keep-ratio", 0.25, "--output-dir", "run"),
    )
    done = cli(*call)
    assert "20 target rows, and may be picked: do not test on" in done.stdout + done.stderr
    run = Run(tmp_path / "run")
    found = columns_of(run)
    kept = np.flatnonzero(found["kept"])
    assert len(kept) == 20
    assert set(np.flatnonzero(np.isin(found["target_rank"], range(14)))) <= {*kept}
    assert (kept % 4 == 0).sum() >= 14
    assert 8 in kept
    page = (run.path / "report.html").read_text()
    assert "Picked for the target" in page
    assert all(check.result != "failed" for check in verify(run))
    assert "already complete" in cli(*call).stdout
    stamp = (run.path / "manifest.json").read_bytes()
    small = resample(run.path, 0.1, output_dir=tmp_path / "small")
    assert {*small.kept.tolist()} <= {*kept.tolist()}
    assert len(small.kept) == 8
    assert (run.path / "manifest.json").read_bytes() == stamp


def test_another_target_is_another_run(places, small_encoder, tmp_path):
    """Also where its texts are as long as those before: no vector is taken from that run."""
    source, target = places
    options = {"target": str(target), "embedding_model": str(small_encoder), "report": False}
    first = columns_of(compress(str(source), output_dir=tmp_path / "run", **options))
    rows = Dataset.from_parquet(str(target)).to_dict()
    for name in rows:
        rows[name] = [text.translate(str.maketrans("fox", "the")) for text in rows[name]]
    Dataset.from_dict(rows).to_parquet(target)
    with pytest.raises(InputError, match="its target had another content"):
        compress(str(source), output_dir=tmp_path / "run", **options)
    again = compress(str(source), output_dir=tmp_path / "run", overwrite=True, **options)
    clean = compress(str(source), output_dir=tmp_path / "clean", **options)
    found, wanted = columns_of(again), columns_of(clean)
    np.testing.assert_array_equal(found["target_rank"], wanted["target_rank"])
    assert (found["order"] != first["order"]).any()


@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_stopped_run_of_a_language_model_goes_on(places, tmp_path, has_gradients, monkeypatch):
    """The second half of the work is done by the second run, with the same rows at the end."""
    source, target = places
    model = write_language_model(tmp_path / "llama")
    options = {
        "target": str(target), "target_model": str(model), "batch_size": 4, "method": "random",
        "target_gradients": has_gradients, "report": False,
    }  # fmt: skip
    whole = compress(str(source), output_dir=tmp_path / "whole", **options)
    adapter = Gradients if has_gradients else HiddenStates
    plain, calls = adapter.embed, []

    def embed(self, batch):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return plain(self, batch)

    monkeypatch.setattr(adapter, "embed", embed)
    monkeypatch.setattr("dq_multimodal.stages.embedding.SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        compress(str(source), output_dir=tmp_path / "run", **options)
    calls[:] = [1] * 20
    run = compress(str(source), output_dir=tmp_path / "run", **options)
    assert len(calls) - 20 == 25 - 14  # batches of 4 of 20 + 80 rows
    for name in ("selection.parquet", "target/picks.json"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_stream_has_the_same_picks(places, small_encoder, tmp_path):
    """And so has a split of a folder, whose target is another split of it."""
    folder = tmp_path / "both" / "data"
    folder.mkdir(parents=True)
    for place, name in zip(places, ("train-0", "test-0"), strict=True):
        shutil.copy(place, folder / f"{name}.parquet")
    model = write_language_model(tmp_path / "llama")
    splits = {"target": str(folder), "target_split": "test[:10]"}
    one = {"target": str(places[1]), "target_split": "train[:10]"}
    for more in ({"embedding_model": str(small_encoder)}, {"target_model": str(model)}):
        options = {"batch_size": 16, "report": False, **more}
        found = [
            columns_of(
                compress(str(source), output_dir=tmp_path / name / next(iter(more)), **given)
            )
            for name, source, given in (
                ("one", places[0], options | one),
                ("stream", places[0], options | one | {"streaming": True}),
                ("folder", folder, options | splits),
            )
        ]
        for other in found[1:]:
            for name, wanted in found[0].items():
                np.testing.assert_array_equal(other[name], wanted)
