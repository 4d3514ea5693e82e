"""compress on images: strata, odd files, gradients, patches, through the public interface."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from forging import RUN_FILES, SUBSET, change_table
from nasty_images import image_rows, nasty_images, picture, save
from PIL import Image as Pictures
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from dq_multimodal import InputError, Run, compress, verify
from dq_multimodal.adapters.image import ImageAdapter
from dq_multimodal.core import make_bins
from dq_multimodal.data import local
from dq_multimodal.data.pixels import BLANK, UNDECODED
from dq_multimodal.models.classifiers import read_classifier, save_classifier
from dq_multimodal.models.image import load_image_model
from dq_multimodal.patches import restore
from dq_multimodal.patches.attribution import GradCamPlusPlus, patch_scores
from dq_multimodal.patches.grid import unpack_mask
from dq_multimodal.stages import embedding, patching, subset

N = 90
SIDE = 16


def smooth(k):
    """A smooth picture with some texture, so that coders have something to save."""
    rng = np.random.default_rng(k)
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = np.stack([np.sin(3 * rows + k), np.cos(4 * columns * (k % 3)), rows * columns], axis=2)
    values = 128 + 90 * waves + rng.normal(0, 3, (SIDE, SIDE, 3))
    return Pictures.fromarray(np.clip(values, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """90 pictures of three classes of 45, 30 and 15 rows, in mixed order."""
    names = ["cat", "dog", "emu"]
    labels = np.random.default_rng(0).permutation([0] * 45 + [1] * 30 + [2] * 15).tolist()
    features = Features({"img": Image(), "label": ClassLabel(names=names), "id": Value("int64")})
    rows = {"img": [smooth(k) for k in range(N)], "label": labels, "id": list(range(N))}
    path = tmp_path_factory.mktemp("images") / "data.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def patched(labelled, small_classifier, tmp_path_factory):
    """A run of 36 of them that dropped a quarter of the patches."""
    settings = options(small_classifier, drop_ratio=0.25, keep_ratio=0.4)
    return compress(str(labelled), output_dir=tmp_path_factory.mktemp("patched"), **settings)


def options(small_classifier, **more):
    plain = {"method": "dq", "report": False, "n_bins": 3, "batch_size": 16}
    return {"embedding_model": str(small_classifier), **plain, **more}


def test_labels_become_strata_in_proportion(labelled, small_classifier, tmp_path):
    labels = np.array(load_dataset("parquet", data_files=str(labelled), split="train")["label"])
    run = compress(
        str(labelled), keep_ratio=0.5, output_dir=tmp_path / "r", **options(small_classifier)
    )
    for ratio in (1.0, 0.7, 0.5, 0.31, 0.1, 0.05):
        drawn = run.resample(ratio, output_dir=tmp_path / f"r{ratio}") if ratio != 0.5 else run
        kept = drawn.kept
        assert len(kept) == round(ratio * N)
        share = np.bincount(labels[kept], minlength=3)
        assert np.abs(share - len(kept) * np.array([45, 30, 15]) / N).max() <= 1
    by_bin = pq.read_table(run.path / "bins.parquet").to_pydict()
    assert by_bin["label"] == [name for name in ("cat", "dog", "emu") for _ in range(3)]
    vectors = np.load(run.path / "embeddings.npy")
    np.testing.assert_array_equal(run.bins.bin, make_bins(vectors, 3, strata=labels).bin)
    assert [check.result for check in verify(run)] == ["passed"] * 5


def test_embeddings_are_the_pooled_features_of_the_model(labelled, small_classifier, tmp_path):
    run = compress(str(labelled), output_dir=tmp_path / "r", **options(small_classifier))
    model = load_image_model(str(small_classifier))
    pictures = load_dataset("parquet", data_files=str(labelled), split="train")[:8]["img"]
    batch = torch.tensor(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 255
    batch = (batch - 0.5) / 0.25
    with torch.no_grad():
        want = model.net.forward_head(model.net.forward_features(batch), pre_logits=True)
    np.testing.assert_allclose(np.load(run.path / "embeddings.npy")[:8], want, atol=1e-5)


def test_gradients_are_those_of_the_loss(labelled, small_classifier, tmp_path):
    settings = options(small_classifier, image_embedding="gradients")
    run = compress(str(labelled), output_dir=tmp_path / "r", **settings)
    rows = load_dataset("parquet", data_files=str(labelled), split="train")[:4]
    model = load_image_model(str(small_classifier))
    stored = np.load(run.path / "embeddings.npy")
    assert stored.shape == (N, 3 + 128)
    for k in range(4):
        batch = model.to_input(np.asarray(rows["img"][k])[None])
        logits = model.net(batch)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([rows["label"][k]]))
        want = torch.autograd.grad(loss, model.net.fc.weight)[0].numpy()
        got = np.outer(stored[k, :3], stored[k, 3:])
        np.testing.assert_allclose(got, want, atol=1e-6)
    whole = np.einsum("ni,nj->nij", stored[:, :3], stored[:, 3:]).reshape(N, -1)
    want = make_bins(whole.astype(np.float64), 3, strata=run.bins.stratum)
    np.testing.assert_array_equal(run.bins.bin, want.bin)
    assert {check.result for check in verify(run)} == {"passed"}
    with pytest.raises(InputError, match="gradients need a classifier of the labels in label"):
        names = ClassLabel(names=["x", "y", "z"])
        other = Dataset.from_parquet(str(labelled)).cast_column("label", names)
        compress(other, output_dir=tmp_path / "o", **settings)


def test_rows_without_a_label_are_a_stratum_of_their_own(labelled, small_classifier, tmp_path):
    rows = Dataset.from_parquet(str(labelled))
    labels = [None if k % 9 == 0 else rows[k]["label"] for k in range(N)]
    named = rows.remove_columns("label").add_column("label", labels)
    run = compress(named, keep_ratio=0.2, output_dir=tmp_path / "r", **options(small_classifier))
    assert run.manifest["labels"][-1] == "(no label)"
    note = next(note for note in run.manifest["notes"] if "no label" in note)
    assert note.startswith("10 rows with no label, a stratum of their own")
    assert sum(run.bins.stratum[k] == 3 for k in run.kept) == 2


def test_label_column_none_and_no_labels_at_all(labelled, small_classifier, tmp_path):
    settings = options(small_classifier)
    one = compress(str(labelled), output_dir=tmp_path / "a", label_column="none", **settings)
    bare = Dataset.from_parquet(str(labelled)).remove_columns("label")
    two = compress(bare, output_dir=tmp_path / "b", **settings)
    assert one.bins.stratum.max() == two.bins.stratum.max() == 0
    np.testing.assert_array_equal(one.kept, two.kept)


def test_a_folder_of_nasty_images_compresses_and_says_so(small_classifier, tmp_path, cli):
    folder = tmp_path / "pictures"
    folder.mkdir()
    kinds = {name: (data, odd) for name, (data, odd) in nasty_images().items() if data is not None}
    for name, (data, _) in kinds.items():
        is_jpeg = data[:2] == b"\xff\xd8"
        suffix = "jpg" if is_jpeg else "gif" if data[:3] == b"GIF" else "png"
        (folder / f"{name.replace(' ', '_')}.{suffix}").write_bytes(data)
    done = cli(
        *("compress", folder, "--embedding-model", small_classifier, "--n-bins", 2),
        *("--keep-ratio", 0.5, "--output-dir", "out"),
    )
    report = done.stdout
    run = Run(tmp_path / "out")
    assert run.manifest["rows"] == len(kinds)
    problems = run.manifest["problems"]
    lost = {row for what in UNDECODED if what in problems for row in problems[what]["rows"]}
    assert len(run.subset) == round(0.5 * (len(kinds) - len(lost)))
    assert all(row["image"] is not None for row in run.subset)  # a training loop reads them all
    files = sorted(path.stem for path in folder.iterdir())
    vectors = np.load(run.path / "embeddings.npy")
    for what, found in run.manifest["problems"].items():
        assert report.count(f"with {what}") == 1
        for row in found["rows"]:
            odd = kinds[files[row].replace("_", " ")][1]
            assert odd is None or what in odd, files[row]
            assert (not vectors[row].any()) == (what in BLANK)
    wanted = {what for _, odd in kinds.values() for what in odd or ()}
    assert wanted <= set(run.manifest["problems"])


def test_the_bytes_of_a_folder_are_those_of_its_files(small_classifier, tmp_path, monkeypatch):
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for k in range(8):
            data = save(picture((40, 40), seed=k))
            (tmp_path / "pictures" / label / f"{k}.png").write_bytes(data)
    settings = options(small_classifier, n_bins=2, keep_ratio=0.5)
    run = compress(str(tmp_path / "pictures"), output_dir=tmp_path / "r", **settings)
    sizes = {path: path.stat().st_size for path in (tmp_path / "pictures").rglob("*.png")}
    found = run.manifest["bytes"]
    assert found["source_files"] == sum(sizes.values())
    assert found["source_data"] > found["source_files"]
    assert found["subset_data"] > 0.4 * found["source_files"]
    assert run.manifest["labels"] == ["cat", "dog"]
    assert [row["img" if "img" in row else "image"].size for row in run.subset] == [(40, 40)] * 8
    monkeypatch.setattr(local, "MAX_LISTED", 10)
    again = compress(str(tmp_path / "pictures"), output_dir=tmp_path / "s", **settings)
    assert [file["name"] for file in again.config["source"]["files"]] == ["16 files"]
    assert [check.result for check in verify(again)] == ["passed"] * 5
    (tmp_path / "pictures" / "cat" / "0.png").write_bytes(save(picture((40, 40), seed=99)))
    assert verify(again)[2].result == "skipped"
    monkeypatch.setattr(subset, "BLOCK_BYTES", 10_000)
    small = compress(str(tmp_path / "pictures"), output_dir=tmp_path / "t", **settings)
    assert len(small.subset) == 8


def test_images_in_memory_and_by_column(small_classifier, tmp_path):
    rows = {"a": [smooth(k) for k in range(20)], "b": [smooth(50 + k) for k in range(20)]}
    two = Dataset.from_dict(rows, features=Features({"a": Image(), "b": Image()}))
    with pytest.raises(InputError, match=r"several columns of images \(a, b\)"):
        compress(two, output_dir=tmp_path / "x", **options(small_classifier))
    run = compress(two, output_dir=tmp_path / "y", image_column="b", **options(small_classifier))
    assert run.config["rows"]["columns"] == ["b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "nope"}, "no column nope: the dataset has img, label, id"),
        ({"image_column": "id"}, "the image column id must hold images"),
        ({"text_columns": ("id",), "modality": "image"}, "text_columns are for text"),
        ({"modality": "text"}, "found none of messages"),
        ({"embedding_model": "no-such-model"}, "neither a folder, a timm model nor a Hub id"),
        ({"embedding_model": None}, "recipes/train_extractor.py makes one"),
        ({"min_psnr": 20.0}, "min_psnr is for dropped patches"),
        ({"drop_ratio": 0.2, "fill": "mae"}, "fill mae needs a mae_model"),
    ],
)
def test_bad_input_is_one_clear_line(settings, message, labelled, small_classifier, tmp_path):
    with pytest.raises(InputError, match=message):
        compress(str(labelled), output_dir=tmp_path / "r", **options(small_classifier) | settings)
    assert not (tmp_path / "r").exists()


def test_dropped_patches_are_stored_and_restored(labelled, patched):
    run = patched
    path = str(run.path / "subset" / "*.parquet")
    subset = load_dataset("parquet", data_files=path, split="train")
    source = Dataset.from_parquet(str(labelled))
    assert len(subset) == 36
    assert subset.column_names == ["img", "label", "id", "dq_row", "dq_bin", "dq_rank"]
    for fill, wanted in (("zero", 0), ("mean", None)):
        for row in restore(subset, fill=fill):
            original = np.asarray(source[row["dq_row"]]["img"])
            pixels = np.asarray(row["img"])
            same = (pixels == original).all(axis=2)
            patches = same.reshape(4, 4, 4, 4).all(axis=(1, 3))
            assert patches.sum() >= 12
            holes = pixels.reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4)[~patches]
            assert (holes == holes[:, :1, :1]).all()
            assert wanted is None or (holes == wanted).all()
            assert row["label"] == source[row["dq_row"]]["label"]
    before, after = run.manifest.bytes.source_images, run.manifest.bytes.stored_images
    files = source.cast_column("img", Image(decode=False))["img"]
    assert before == sum(len(files[k]["bytes"]) for k in run.kept.tolist())
    assert after < 0.8 * before
    found = run.manifest["patches"]
    assert (found["coded"], found["kept_share"], found["answers"]["compared"]) == (36, 0.75, 36)
    assert [check.result for check in verify(run)] == ["passed"] * 5
    assert "restore(subset" in (run.path / "README.md").read_text()
    assert {path.name for path in run.path.iterdir()} == RUN_FILES


def test_the_least_important_patches_go(labelled, patched, small_classifier):
    model = load_image_model(str(small_classifier))
    source = Dataset.from_parquet(str(labelled))
    for row in patched.subset:
        original = source[row["dq_row"]]
        pixels = model.to_input(np.asarray(original["img"])[None])
        with GradCamPlusPlus(model.net) as explain:
            found = explain(pixels, torch.tensor([original["label"]]))
        scores = patch_scores(found.maps, 4)[0].numpy()
        keep = unpack_mask(row["img"]["mask"], 16)
        assert (~keep).sum() == 4
        assert scores[~keep].max() <= scores[keep].min() + 1e-9


def test_resampling_a_run_of_patches(patched, tmp_path):
    run = patched
    smaller = run.resample(0.2, output_dir=tmp_path / "s")
    by_row = {row["dq_row"]: row["img"] for row in run.subset}
    assert all(by_row[row["dq_row"]] == row["img"] for row in smaller.subset)
    assert smaller.manifest.bytes.stored_images is None
    with pytest.raises(InputError, match="patches were not dropped: compress the source anew"):
        run.resample(0.8, output_dir=tmp_path / "t")


def test_a_run_of_version_0_1_says_what_to_do(patched, tmp_path, cli):
    """Its lossless coding cannot be read; all else of the run can."""
    shutil.copytree(patched.path, tmp_path / "r")

    def make_old(column):
        return pa.array(
            [{**record, "coding": "exact"} for record in column.to_pylist()], column.type
        )

    change_table(tmp_path / "r", SUBSET, "img", make_old)
    with pytest.raises(InputError, match=r"stored by dq-multimodal 0\.1, .* compress the source"):
        restore(Run(tmp_path / "r").subset)[0]
    done = cli("resample", "r", "--keep-ratio", 0.2, "--output-dir", "s", code=2)
    assert done.stderr.splitlines()[-1].startswith("error: r cannot be resampled: the images were")
    assert not (tmp_path / "s" / "subset").exists()
    rows = verify(Run(tmp_path / "r"))[2]
    assert (rows.result, "dq-multimodal 0.1" in rows.detail) == ("skipped", True)


def test_a_model_folder_with_other_weights_is_another_run(labelled, small_classifier, tmp_path):
    net, described = read_classifier(small_classifier)
    save_classifier(net, described, tmp_path / "m")
    settings = options(tmp_path / "m", output_dir=tmp_path / "r")
    compress(str(labelled), **settings)
    assert compress(str(labelled), **settings).was_complete
    with torch.no_grad():
        net.fc.bias[0] += 1
    save_classifier(net, described, tmp_path / "m")
    with pytest.raises(InputError, match="a model folder held other weights"):
        compress(str(labelled), **settings)


def test_an_image_below_the_gate_keeps_its_original(labelled, small_classifier, tmp_path):
    settings = options(small_classifier, drop_ratio=0.25, keep_ratio=0.4)
    loose = compress(str(labelled), output_dir=tmp_path / "a", **settings)
    middle = loose.manifest["patches"]["psnr_of_holes"]["mean"]
    run = compress(str(labelled), output_dir=tmp_path / "b", min_psnr=middle, **settings)
    n_original = run.manifest["patches"]["originals"]["a filled image below min_psnr"]
    assert 0 < n_original < 36
    source = Dataset.from_parquet(str(labelled)).cast_column("img", Image(decode=False))
    whole = [r for r in run.subset if r["img"]["coding"] == "original"]
    assert len(whole) == n_original
    assert all(r["img"]["data"] == source[r["dq_row"]]["img"]["bytes"] for r in whole)
    assert any(
        "keep their original, a filled image below" in note for note in run.manifest["notes"]
    )
    assert verify(run)[2].result == "passed"
    found = run.manifest["patches"]
    assert found["psnr_of_holes"]["lowest"] >= middle
    assert found["answers"]["compared"] == 36 - n_original
    np.testing.assert_allclose(found["kept_share"], 1 - 0.25 * (36 - n_original) / 36)
    again = compress(str(labelled), output_dir=tmp_path / "b", min_psnr=middle, **settings)
    assert again.was_complete
    with pytest.raises(InputError, match=r"below min_psnr\); nothing was kept: lower --min-psnr"):
        compress(str(labelled), output_dir=tmp_path / "c", min_psnr=99.0, **settings)


def test_images_alone_grey_and_lossy(small_classifier, tmp_path):
    pictures = [smooth(k).convert("L" if k % 2 else "RGB") for k in range(30)]
    rows = Dataset.from_dict({"img": pictures}, features=Features({"img": Image()}))
    settings = options(small_classifier, keep_ratio=0.5, drop_ratio=0.25)
    run = compress(rows, output_dir=tmp_path / "a", **settings)
    modes = {image.mode for image in restore(run.subset)[:]["img"]}
    assert modes == {"L", "RGB"}
    rows.to_parquet(tmp_path / "rows.parquet")
    local = compress(str(tmp_path / "rows.parquet"), output_dir=tmp_path / "b", **settings)
    assert [check.result for check in verify(local)] == ["passed"] * 5
    settings |= {"patch_coding": "webp", "patch_quality": 60}
    lossy = compress(str(tmp_path / "rows.parquet"), output_dir=tmp_path / "c", **settings)
    kept = lossy.manifest["patches"]["psnr_of_kept"]
    assert 20 < kept["lowest"] <= kept["mean"] < 60
    assert "sizes only (lossy)" in verify(lossy)[2].detail
    assert local.manifest["patches"]["psnr_of_kept"]["mean"] is None


def test_random_masks_need_no_model_that_can_be_explained(labelled, tmp_path):
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**shape, intermediate_size=32, image_size=16, patch_size=8)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    settings = options(tmp_path / "vit", drop_ratio=0.25)
    with pytest.raises(InputError, match=r"gradcam\+\+ needs a classifier.*--attribution random"):
        compress(str(labelled), output_dir=tmp_path / "a", **settings)
    run = compress(str(labelled), output_dir=tmp_path / "b", attribution="random", **settings)
    assert run.manifest["patches"]["coded"] == 18
    again = compress(str(labelled), output_dir=tmp_path / "c", attribution="random", **settings)
    assert run.subset[:]["img"] == again.subset[:]["img"]


def test_labels_are_matched_by_name(labelled, small_classifier, tmp_path):
    rows = Dataset.from_parquet(str(labelled))
    names = np.array(["cat", "dog", "emu"])[rows["label"][:]]
    few = rows.remove_columns("label").add_column("label", names.tolist())
    few = few.filter(lambda row: row["label"] != "dog")
    settings = options(small_classifier, image_embedding="gradients")
    part = compress(few, output_dir=tmp_path / "a", **settings)
    whole = compress(rows, output_dir=tmp_path / "b", **settings)
    stored = np.load(whole.path / "embeddings.npy")[few["id"][:]]
    np.testing.assert_allclose(np.load(part.path / "embeddings.npy"), stored, atol=1e-5)


def test_images_that_another_writer_put_into_parquet(small_classifier, tmp_path):

    files = [{"bytes": save(smooth(k)), "path": None} for k in range(20)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"picture": pa.array(files, kind)}), tmp_path / "p.parquet")
    settings = options(small_classifier, output_dir=tmp_path / "r")
    run = compress(str(tmp_path / "p.parquet"), **settings)
    assert run.config["rows"]["columns"] == ["picture"]
    assert np.load(run.path / "embeddings.npy").any(axis=1).all()


def test_a_result_that_is_not_smaller_is_refused(small_classifier, tmp_path, cli):
    folder = tmp_path / "jpegs"
    folder.mkdir()
    for k in range(12):
        image = picture((40, 40), seed=k)
        (folder / f"{k:02d}.jpg").write_bytes(save(image, "JPEG", quality=20))
    arguments = (
        *("compress", "jpegs", "--embedding-model", small_classifier, "--n-bins", 2),
        *("--keep-ratio", 1.0, "--drop-ratio", 0.1, "--output-dir", "r"),
    )
    done = cli(*arguments, code=2)
    assert done.stderr.splitlines()[-1].startswith("error: dropping patches would not make")
    assert not (tmp_path / "r" / "subset").exists()
    with pytest.raises(InputError, match="has not finished"):
        Run(tmp_path / "r")


def test_an_interrupted_run_drops_no_patch_twice(labelled, small_classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(patching, "BLOCK_ROWS", 8)
    settings = options(small_classifier, drop_ratio=0.25, keep_ratio=0.4)
    want = compress(str(labelled), output_dir=tmp_path / "want", **settings)
    real, written = patching.write_table, []

    def stop_at_third(table, path):
        if len(written) == 3:
            raise KeyboardInterrupt
        real(table, path)
        written.append(path.name)

    monkeypatch.setattr(patching, "write_table", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        compress(str(labelled), output_dir=tmp_path / "got", **settings)
    assert len(list((tmp_path / "got" / "patches").iterdir())) == 3
    again = []
    monkeypatch.setattr(
        patching, "write_table", lambda table, path: (again.append(path.name), real(table, path))
    )
    got = compress(str(labelled), output_dir=tmp_path / "got", **settings)
    assert again == ["000003.parquet", "000004.parquet"]
    files = [next((run.path / "subset").iterdir()).read_bytes() for run in (want, got)]
    assert files[0] == files[1]
    shutil.rmtree(got.path / "subset")
    whole = compress(str(labelled), output_dir=tmp_path / "got", **settings)
    assert whole.manifest["notes"] == want.manifest["notes"]
    assert next((whole.path / "subset").iterdir()).read_bytes() == files[0]


def test_problems_found_before_a_stop_are_not_forgotten(small_classifier, tmp_path, monkeypatch):
    rows = image_rows([save(smooth(k)) if k % 7 else b"" for k in range(60)])
    monkeypatch.setattr(embedding, "SAVE_SECONDS", 0.0)
    real, calls = ImageAdapter.embed, []

    def stop_at_third(self, batch):
        calls.append(len(batch[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(ImageAdapter, "embed", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        compress(rows, output_dir=tmp_path / "r", **options(small_classifier))
    run = compress(rows, output_dir=tmp_path / "r", **options(small_classifier))
    assert calls == [16, 16, 16, 16, 12]
    wanted = list(range(0, 60, 7))
    assert run.manifest["problems"]["an empty image file"]["rows"] == wanted


def test_real_cifar_shrinks_and_keeps_its_classes(real_data, small_classifier, tmp_path):
    path = real_data / "cifar10" / "test-00000-of-00001.parquet"
    settings = {"embedding_model": str(small_classifier), "split": "train[:1500]", "method": "dq"}
    settings |= {"label_column": "label", "drop_ratio": 0.25, "attribution": "random"}
    run = compress(str(path), keep_ratio=0.125, output_dir=tmp_path / "r", **settings)
    source = load_dataset("parquet", data_files=str(path), split="train[:1500]")
    labels = np.array(source["label"][:])
    assert len(run.kept) == 188
    share = np.bincount(labels[run.kept], minlength=10) - np.bincount(labels) * len(run.kept) / 1500
    assert np.abs(share).max() <= 1
    sizes = run.manifest["bytes"]
    assert sizes["stored_images"] < 0.75 * sizes["source_images"]  # lossless WebP of the whole
    for row in restore(run.subset).select(range(20)):
        original = np.asarray(source[row["dq_row"]]["img"])
        same = (np.asarray(row["img"]) == original).all(axis=2)
        assert same.mean() >= 0.75
    assert [check.result for check in verify(run)] == ["passed"] * 5
