"""Targets: how they load, what is picked for them, and what of them the source holds already."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, Image
from small_language_model import write_language_model

from dq_multimodal import InputError
from dq_multimodal.adapters.choice import choose_adapter
from dq_multimodal.config import CompressConfig
from dq_multimodal.stages.embedding import embed_rows, open_embeddings
from dq_multimodal.stages.targeting import (
    FOLDER,
    PICKS,
    WHOLE_PATTERN,
    describe_target,
    find_leaks,
    forget_vectors,
    load_target,
    note_leaks,
    pick_targets,
)

WORDS = ("fox", "dog", "quick", "lazy", "brown", "over", "the", "jumps")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("llama"))


def sentences(n_rows, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 6)) for _ in range(n_rows)]


def write_text(path, rows):
    Dataset.from_list([{"text": text} for text in rows]).to_parquet(path)
    return str(path)


@pytest.fixture
def places(tmp_path):
    """60 rows and 20 target rows of texts; target row 3 is row 17, and row 5 near row 40."""
    source, target = sentences(60, 0), sentences(20, 1)
    source[17] = target[3].replace(" ", "\n\n")
    source[40] = target[5] + " the"
    return write_text(tmp_path / "s.parquet", source), write_text(tmp_path / "t.parquet", target)


def ask(places, **options):
    return CompressConfig(places[0], **{"target": places[1], "batch_size": 16, **options})


def load_rows(place, request):
    """The source of a run and its adapter."""
    dataset = Dataset.from_parquet(place)
    return dataset, choose_adapter(dataset, request)


def embed(adapter, folder):
    folder.mkdir(parents=True)
    embed_rows(adapter, folder, 16)
    return np.array(open_embeddings(folder))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def round_robin(rows, targets):
    """The definition: every target row in turn takes its nearest row that is not taken."""
    cosines = unit(rows.astype(np.float64)) @ unit(targets.astype(np.float64)).T
    rank, row = np.full(len(rows), -1), np.full(len(rows), -1)
    for place in range(len(rows)):
        number = place % len(targets)
        free = np.where(rank < 0, cosines[:, number], -2)
        rank[free.argmax()], row[free.argmax()] = place, number
    return rank, row


def test_rows_are_picked_in_turn_for_the_target_rows(places, small_encoder, tmp_path):
    """By embeddings of the encoder of the run; the file for the report says the same."""
    request = ask(places, embedding_model=str(small_encoder))
    dataset, adapter = load_rows(places[0], request)
    rows = embed(adapter, tmp_path / "rows")
    target = load_target(request, adapter)
    picks = pick_targets(tmp_path / "run", dataset, adapter, rows, target, request)
    targets = np.load(tmp_path / "run" / FOLDER / "rows" / "embeddings.npy")
    np.testing.assert_array_equal(targets, embed(target.adapter, tmp_path / "again"))
    rank, row = round_robin(rows, targets)
    np.testing.assert_array_equal(picks.rank, rank)
    np.testing.assert_array_equal(picks.row, row)
    assert (picks.rank.dtype, picks.row.dtype) == (np.int64, np.int32)

    found = json.loads((tmp_path / "run" / FOLDER / PICKS).read_text())
    cosines = unit(rows) @ unit(targets).T
    for number, shown in enumerate(found["targets"]):
        first = np.argsort(np.where(row == number, rank, 99))[:3]
        assert [pick[0] for pick in shown["picks"]] == first.tolist()
        for pick, cosine in shown["picks"]:
            assert cosine == pytest.approx(cosines[pick, number], abs=1e-4)
        assert shown["text"] == Dataset.from_parquet(places[1])[number]["text"]
    assert found["n_leaks"] == len(found["leaks"])
    assert [17, 3, pytest.approx(cosines[17, 3], abs=1e-4), True] in found["leaks"]
    for path in sorted((tmp_path / "run" / FOLDER).rglob("*")):
        inner = path.relative_to(tmp_path / "run" / FOLDER).as_posix()
        assert re.fullmatch(WHOLE_PATTERN, inner), inner
    forget_vectors(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / FOLDER).iterdir()] == [PICKS]


@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_language_model_compares_rows(places, language_model, tmp_path, has_gradients):
    request = ask(
        places, method="random", target_model=str(language_model), target_gradients=has_gradients
    )
    dataset, adapter = load_rows(places[0], request)
    target = load_target(request, adapter)
    picks = pick_targets(tmp_path, dataset, adapter, None, target, request)
    work = tmp_path / FOLDER
    rows, targets = (
        np.load(work / name / "embeddings.npy") for name in ("model_source", "model_rows")
    )
    assert rows.shape == (60, 1024 if has_gradients else 32)
    rank, row = round_robin(rows, targets)
    np.testing.assert_array_equal(picks.rank, rank)
    np.testing.assert_array_equal(picks.row, row)
    assert (work / "warm_up" / "lora.safetensors").exists() == has_gradients
    for path in work.rglob("*"):
        assert re.fullmatch(WHOLE_PATTERN, path.relative_to(work).as_posix()), path
    facts = describe_target(target, request)
    assert facts["by"] == ("gradients" if has_gradients else "hidden states")
    assert len(facts["model"]["weights"]) == 16
    assert any("1 row of the source equals 1 of the 20 target rows" in n for n in picks.notes)
    assert not any("is near" in note or "are near" in note for note in picks.notes)
    again = pick_targets(tmp_path, dataset, adapter, None, load_target(request, adapter), request)
    np.testing.assert_array_equal(again.rank, picks.rank)


def test_leaks_by_hand(places, tmp_path):
    """Equal but for white space; near by the cosine; both are named with their target rows."""
    request = ask(places)
    adapter = load_rows(places[0], request)[1]
    target = load_target(request, adapter)
    rows, targets = np.eye(64)[:60], np.eye(64)[:20] * 0
    targets[5] = rows[40] * 3 + 0.9 * rows[41]  # cosines 0.958 and 0.287
    targets[6] = rows[42] + 0.4 * rows[43]  # 0.928
    targets[7] = 7 * rows[44]
    leaks = find_leaks(adapter, target, rows, targets)
    assert leaks.row.tolist() == [17, 40, 44]
    assert leaks.target.tolist() == [3, 5, 7]
    assert leaks.is_equal.tolist() == [True, False, False]
    np.testing.assert_allclose(leaks.cosine, [0, 0.9578, 1], atol=1e-4)
    notes = note_leaks(leaks, 20)
    assert len(notes) == 2
    assert "1 row of the source equals 1 of the 20 target rows" in notes[0]
    assert notes[0].endswith("(row 17)")
    assert "2 rows of the source are near (cosine of at least 0.95) 2 of the 20" in notes[1]
    assert notes[1].endswith("(rows 40, 44)")
    none = find_leaks(None, target, rows, targets[:5])
    assert note_leaks(none, 5) == []
    assert len(none.row) == 0


def test_images_are_targets_too(small_classifier, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (16, 16, 3)).astype(np.uint8) for _ in range(30)]
    for name, part in (("s", pictures), ("t", pictures[25:] + pictures[:3])):
        rows = Dataset.from_dict({"img": part}).cast_column("img", Image())
        rows.to_parquet(tmp_path / f"{name}.parquet")
    places = [str(tmp_path / f"{name}.parquet") for name in "st"]
    request = ask(places, embedding_model=str(small_classifier))
    dataset, adapter = load_rows(places[0], request)
    rows = embed(adapter, tmp_path / "rows")
    target = load_target(request, adapter)
    picks = pick_targets(tmp_path / "run", dataset, adapter, rows, target, request)
    assert picks.row[[25, 26, 27, 28, 29, 0, 1, 2]].tolist() == list(range(8))
    assert sorted(picks.rank[[25, 26, 27, 28, 29, 0, 1, 2]]) == list(range(8))
    assert picks.notes[0] == "a target of 8 rows says little: 20 to 1,000 are wanted"
    leaks = find_leaks(adapter, target)
    assert leaks.row.tolist() == [0, 1, 2, 25, 26, 27, 28, 29]
    assert leaks.is_equal.all()
    with pytest.raises(InputError, match="target_model reads text"):
        load_target(replace(request, target_model="x"), adapter)


def test_columns_of_the_target(places, tmp_path):
    """Named, as the source's, or detected; else one line says how to name them."""
    rows = [{"question": f"Why {k}?", "answer": f"So {k}."} for k in range(30)]
    Dataset.from_list(rows).to_parquet(tmp_path / "qa.parquet")
    qa = str(tmp_path / "qa.parquet")
    request = ask((places[0], qa))
    _, adapter = load_rows(places[0], request)
    with pytest.raises(InputError, match=r"^target .*qa.parquet: .* --target-columns a,b$"):
        load_target(request, adapter)
    named = load_target(replace(request, target_columns=("question", "answer")), adapter)
    assert named.adapter.describe()["template"] == "{question} {answer}"
    own = replace(request, dataset=qa, text_columns=("question",))
    same = load_target(own, load_rows(qa, own)[1])
    assert same.adapter.describe()["columns"] == ["question"]
    facts = describe_target(same, own)
    assert (facts["by"], facts["model"]) == ("embeddings", None)
    assert facts["source"]["rows"] == 30
    assert len(facts["source"]["files"][0]["sha256"]) == 64


def test_wrong_targets_are_one_line(places, tmp_path, small_encoder):
    request = ask(places, embedding_model=str(small_encoder))
    dataset, adapter = load_rows(places[0], request)
    many = write_text(tmp_path / "many.parquet", ["x"] * 1001)
    wanted = "a target of 20 to 1,000 rows is wanted, and .* has 1,001 in split 'train'"
    with pytest.raises(InputError, match=wanted):
        load_target(replace(request, target=many), adapter)
    part = load_target(replace(request, target=many, target_split="train[:30]"), adapter)
    assert part.source.origin["rows"] == 30
    blank = write_text(tmp_path / "blank.parquet", [""] * 30)
    with pytest.raises(InputError, match=r"no row of the target .* has anything to embed"):
        load_target(replace(request, target=blank), adapter)
    with pytest.raises(InputError, match="nowhere"):
        load_target(replace(request, target=str(tmp_path / "nowhere.parquet")), adapter)
    with pytest.raises(InputError, match="target_model reads text"):
        load_target(replace(request, target_model="x"), None)
    target = load_target(request, adapter)
    line = "the embeddings of the rows have 5 numbers, and .*, which embeds the target, gives 16"
    with pytest.raises(InputError, match=line):
        pick_targets(tmp_path / "run", dataset, adapter, np.ones((60, 5)), target, request)
    with pytest.raises(InputError, match="needs the embeddings of the rows, or a target_model"):
        pick_targets(tmp_path / "run", dataset, adapter, None, target, request)
