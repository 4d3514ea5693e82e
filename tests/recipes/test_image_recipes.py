"""The image recipes, tiny: each once, each resumable; the launchers of their users start some."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from launching import ONE, TWO, launch
from PIL import Image as Pictures

from dq_multimodal import Run, compress

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}


def write_images(path, n_rows, size, seed):
    """Write pictures whose class is the colour of a disc on a noisy ground."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images, labels = [], []
    for k in range(n_rows):
        label = k % 3
        ground = rng.integers(90, 140, (size, size, 3))
        y, x = rng.integers(size // 3, 2 * size // 3, 2)
        is_disc = (rows - y) ** 2 + (columns - x) ** 2 < (size // 3) ** 2
        ground[is_disc] = np.array(list(COLOURS.values())[label]) + rng.integers(-20, 20, 3)
        images.append(Pictures.fromarray(ground.astype(np.uint8)))
        labels.append(label)
    features = Features({"img": Image(), "label": ClassLabel(names=list(COLOURS))})
    Dataset.from_dict({"img": images, "label": labels}, features=features).to_parquet(path)
    return path


def run(name, *flags, launcher=(), code=0, **options):
    flags = [*flags, *(part for key, value in options.items() for part in (f"--{key}", value))]
    return launch(f"recipes/{name}", *flags, launcher=launcher, code=code)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images, an extractor and an autoencoder, the last two made by their recipes."""
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "train.parquet", 360, 16, 0)
    write_images(folder / "test.parquet", 90, 16, 1)
    data = {"dataset_name": folder / "train.parquet"}
    run(
        "train_extractor.py",
        **data,
        model="resnet10-narrow",
        num_train_epochs=4,
        per_device_train_batch_size=32,
        learning_rate=0.05,
        output_dir=folder / "extractor",
    )
    run(
        "train_mae.py",
        **data,
        num_train_epochs=6,
        per_device_train_batch_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        output_dir=folder / "mae",
    )
    return folder


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def arguments(work, out, **more):
    return {
        "dataset_name": work / "train.parquet",
        "eval_dataset_name": work / "test.parquet",
        "model": "resnet10-narrow",
        "max_steps": 40,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.05,
        "output_dir": out,
        **more,
    }


def test_extractor_and_autoencoder_learn_and_are_ready_for_use(work):
    from dq_multimodal.models.image import load_image_model
    from dq_multimodal.patches.mae import load_mae

    extractor = load_image_model(str(work / "extractor" / "model"))
    assert extractor.labels == ("red", "green", "blue")
    assert extractor.size == 16
    assert metrics(work / "extractor")["accuracy"] > 0.5
    assert load_mae(str(work / "mae" / "model")).patch_size == 4
    psnr = metrics(work / "mae")["psnr_of_holes"]
    assert psnr["mae"] > psnr["zero"]


@pytest.mark.slow
def test_dynamics_of_all_rows_on_two_processes(work, tmp_path):
    out = tmp_path / "out"
    options = {
        "dataset_name": work / "train.parquet",
        "model": "resnet10-narrow",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.05,
        "output_dir": out,
    }
    done = run("train_extractor.py", "--record_dynamics", launcher=TWO, **options)
    assert "trained on all 360 labelled rows" in done.stdout
    dynamics, about = np.load(out / "dynamics.npy"), json.loads((out / "dynamics.json").read_text())
    assert (dynamics.shape, dynamics.dtype) == ((3, 360, 3), np.float16)
    assert np.isfinite(dynamics).all()
    own, other, el2n = np.moveaxis(dynamics.astype(float), 2, 0)
    assert (own[-1] > other[-1]).mean() > (own[0] > other[0]).mean()
    third = 1 - own - other  # of three classes
    np.testing.assert_allclose(el2n**2, (1 - own) ** 2 + other**2 + third**2, atol=5e-3)
    assert (about["epochs"], about["rows"], about["mode"]) == (3, 360, "train")
    found = metrics(out)
    assert about["source"] == found["asked"]["source"]
    assert (found["rows_trained"], found["steps"]) == (360, 36)
    assert "accuracy" not in found
    run("train_extractor.py", "--record_dynamics", code=2, **options, max_steps=5)


def test_the_whole_sequence_with_patches(work, tmp_path):
    out = tmp_path / "out"
    flags = arguments(
        work,
        out,
        method="dq",
        keep_ratio=0.5,
        n_bins=3,
        drop_ratio=0.25,
        embedding_model=work / "extractor" / "model",
        fill="mae",
        mae_model=work / "mae" / "model",
    )
    done = run("cifar10.py", launcher=ONE, **flags)
    found = metrics(out)
    assert "test rows right" in done.stdout
    assert found["rows_tested"] == 90
    assert found["rows_trained"] == 180
    assert found["steps"] == 40
    assert found["accuracy"] > 0.6
    assert found["selection"]["patches"]["fill"] == "mae"
    sizes = found["selection"]["bytes"]
    assert sizes["stored_images"] < sizes["source_images"]
    labels = np.array(Run(out / "selection").subset["label"][:])
    assert np.bincount(labels).tolist() == [60, 60, 60]
    assert (out / "model" / "classifier.json").is_file()
    assert "already complete" in run("cifar10.py", **flags).stdout
    other = run("cifar10.py", **{**flags, "seed": 1}, code=2)
    assert other.stderr.splitlines()[-1].startswith("error:")


def test_rows_of_a_finished_run_need_no_encoder(work, tmp_path):
    model = str(work / "extractor" / "model")
    settings = {"method": "adq", "n_bins": 3, "keep_ratio": 0.5, "report": False}
    source, finished = str(work / "train.parquet"), tmp_path / "run"
    compress(source, embedding_model=model, output_dir=finished, **settings)
    asked = {"keep_ratio": 0.25, "from_run": finished, "importance": "diversity"}
    run("cifar10.py", **arguments(work, tmp_path / "out", **asked))
    drawn = Run(tmp_path / "out" / "selection")
    assert metrics(tmp_path / "out")["rows_trained"] == 90
    assert (drawn.request.method, drawn.request.importance) == ("adq", "diversity")
    assert not (drawn.path / "embeddings.npy").exists()
    write_images(tmp_path / "train.parquet", 60, 16, 2)
    flags = arguments(work, tmp_path / "no", **asked)
    flags["dataset_name"] = tmp_path / "train.parquet"
    done = run("cifar10.py", **flags, code=2)
    assert "is of other rows than" in done.stderr.splitlines()[-1]
    flags = arguments(work, tmp_path / "bins", **asked, n_bins=7)
    done = run("cifar10.py", **flags, code=2)
    assert "n_bins 7 was asked, and the run" in done.stderr.splitlines()[-1]
    flags = arguments(work, tmp_path / "half", **asked, dataset_split="train[:50%]")
    done = run("cifar10.py", **flags, code=2)
    assert "is of other rows than" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_all_rows_on_two_processes(work, tmp_path):
    run("cifar10.py", launcher=TWO, **arguments(work, tmp_path / "out", method="full"))
    found = metrics(tmp_path / "out")
    assert found["rows_tested"] == 90
    assert found["rows_trained"] == 360
    assert found["accuracy"] > 0.6


def test_weights_of_a_subset_are_used_and_stated(work, tmp_path):
    rows = Dataset.from_parquet(str(work / "train.parquet"))
    weights = [1.5 if k % 3 == 2 else 0.0 for k in range(len(rows))]  # the blue ones
    rows.add_column("dq_weight", weights).to_parquet(tmp_path / "subset.parquet")
    out = tmp_path / "out"
    flags = arguments(work, out, method="full", dataset_name=tmp_path / "subset.parquet")
    done = run("cifar10.py", **flags, use_weights="loss")
    found = metrics(out)
    assert (found["use_weights"], found["rows_trained"]) == ("loss", 360)
    assert "weights in the loss" in done.stdout
    assert found["accuracy"] == pytest.approx(1 / 3)  # all are called blue


def test_large_images_stay_on_disk(work, tmp_path):
    write_images(tmp_path / "train.parquet", 60, 128, 2)
    write_images(tmp_path / "test.parquet", 15, 128, 3)
    flags = arguments(
        tmp_path,
        tmp_path / "out",
        image_size=112,
        max_steps=4,
        per_device_train_batch_size=8,
        dataloader_num_workers=2,
        embedding_model=work / "extractor" / "model",
        n_bins=2,
        eval_split="train",
    )
    run("imagenet_60pct.py", **flags)
    found = metrics(tmp_path / "out")
    assert found["rows_trained"] == 36
    assert found["rows_tested"] == 15
    assert found["selection"]["source_rows"] == 60


def test_bad_input_is_one_line(work, tmp_path):
    out = tmp_path / "out"
    wrong = [
        ({"model": "no-such-net"}, "no model no-such-net"),
        ({"method": "magic"}, "method must be one of"),
    ]
    for change, message in wrong:
        flags = arguments(work, out, keep_ratio=0.5, **{"method": "random", **change})
        done = run("cifar10.py", **flags, code=2)
        assert message in done.stderr.splitlines()[-1]


def test_bad_input_under_the_launcher_is_one_line(tmp_path):
    flags = {"dataset_name": tmp_path / "none.parquet", "output_dir": tmp_path / "out"}
    done = run("cifar10.py", launcher=(*ONE, "--quiet"), code=1, **flags)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error:") and "none.parquet" in line


def test_a_selection_that_fails_ends_all_processes_with_one_line(work, tmp_path):
    flags = arguments(work, tmp_path / "out", method="dq", embedding_model=tmp_path / "gone")
    done = run("cifar10.py", launcher=TWO, code=1, **flags)
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert line.startswith("error: cannot find model") and "gone" in line
    assert "choose_rows" not in done.stderr  # in a traceback of the one that waits


def test_processes_wait_a_day_for_the_one_that_selects(tmp_path):
    (tmp_path / "wait.py").write_text(
        "import torch\n"
        "from dq_multimodal.training.record import make_accelerator\n"
        "make_accelerator()\n"
        "group = torch.distributed.group.WORLD._get_backend(torch.device('cpu'))\n"
        "print(group.options._timeout.total_seconds())\n"
    )
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "1")
    assert float(launch(tmp_path / "wait.py", launcher=launcher).stdout) == 24 * 3600
