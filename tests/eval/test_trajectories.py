"""eval/trajectories.py: thirds by texture, distances by hand, going on where it stopped."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_scripts import load_script
from PIL import Image
from safetensors.numpy import load_file, save_file

from dq_multimodal.core.texture import image_texture
from dq_multimodal.training import record
from dq_multimodal.training.pictures import Pictures

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "trajectories.py"
SIZE = 8


script = load_script("trajectories")


def make_pictures(n=24, seed=0, missing=()):
    """Grey pictures with the same noise, but each with a strength of its own."""
    rng = np.random.default_rng(seed)
    strength = rng.permutation(n)
    noise = rng.choice([-1, 1], (SIZE, SIZE, 1)) * strength[:, None, None, None] * 4
    pixels = np.repeat(np.clip(128 + noise, 0, 255), 3, axis=3).astype(np.uint8)
    classes = np.arange(n) % 2

    def read(rows):
        return [None if k in missing else Image.fromarray(pixels[k]) for k in rows]

    return Pictures(read, classes, SIZE), pixels, strength


def make_plan(folder, pictures, seed=0):
    args = argparse.Namespace(
        model="resnet10-narrow",
        batch_size=4,
        learning_rate=0.05,
        work_dir=folder,
        epochs=1,
        seeds=1,
    )
    n_steps = len(pictures.rows) // 3 // args.batch_size
    return script.Plan(args, 2, [0.5] * 3, [0.2] * 3, n_steps, torch.device("cpu"), seed)


def test_texture_levels_are_those_of_the_formula():
    pictures, pixels, _ = make_pictures()
    luma = pixels.astype(float) @ np.array([0.299, 0.587, 0.114]) / 255
    want = [image_texture(one[None])[0][0] for one in luma]
    assert np.allclose(script.texture_levels(pictures), want, rtol=1e-4)


def test_thirds_are_equal_and_ranked():
    pictures, _, strength = make_pictures(n=23, missing=(5,))
    thirds = script.cut_thirds(pictures.rows, script.texture_levels(pictures))
    assert list(thirds) == ["High", "Medium", "Low"]
    assert [len(part) for part in thirds.values()] == [7, 7, 7]
    used = np.concatenate(list(thirds.values()))
    assert len(set(used)) == 21
    assert 5 not in used
    lowest, highest = [[f(strength[p]) for p in thirds.values()] for f in (np.min, np.max)]
    assert lowest[0] > highest[1] > lowest[1] > highest[2]


def test_ties_go_to_the_lower_row():
    thirds = script.cut_thirds(np.arange(6), np.zeros(6))
    assert [part.tolist() for part in thirds.values()] == [[0, 1], [2, 3], [4, 5]]


def test_distance_counts_parameters_alone(tmp_path):
    a = {"parameter.w": np.float32([[1, 2], [3, 4]]), "parameter.b": np.float32([0])}
    b = {"parameter.w": np.float32([[1, 2], [3, 1]]), "parameter.b": np.float32([4])}
    extra = {"buffer.mean": np.float32([9]), "momentum.w": np.float32([7])}
    save_file(a | extra, tmp_path / "a")
    save_file(b, tmp_path / "b")
    assert script.distance(tmp_path / "a", tmp_path / "b") == pytest.approx(5)


def test_it_goes_on_where_it_stopped(tmp_path):
    pictures, _, _ = make_pictures()
    whole, broken = (make_plan(tmp_path / name, pictures) for name in ("whole", "broken"))
    assert script.train_net(whole, "Expert", pictures, pictures.rows, 4) == 4
    assert script.train_net(broken, "Expert", pictures, pictures.rows, 1) == 1
    assert script.train_net(broken, "Expert", pictures, pictures.rows, 4) == 3
    for number in range(5):
        one, other = (load_file(plan.file_of("Expert", number)) for plan in (whole, broken))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one), number
    assert script.distance(whole.file_of("Expert", 0), whole.file_of("Expert", 1)) > 0
    assert script.train_net(whole, "Expert", pictures, pictures.rows, 4) == 0
    assert script.train_net(whole, "Expert", pictures, pictures.rows, 2) == 0


def test_all_of_it_small_and_again(tmp_path, monkeypatch):
    (train, _, _), (test, _, _) = make_pictures(), make_pictures(n=6, seed=1)
    args = make_plan(tmp_path, train).args
    found = script.measure_all(args, train, test, ("a", "b"))
    (run,) = found["runs"]
    assert list(run["students"]) == ["High", "Medium", "Low", "Random"]
    folder = tmp_path / "seed-0"
    starts = [load_file(folder / n / "round-000.safetensors") for n in ("Expert", "Low")]
    assert all(np.array_equal(starts[0][name], starts[1][name]) for name in starts[0])
    by_epochs, by_steps = (run["students"]["High"][f"equal_{u}"][0] for u in ("epochs", "steps"))
    high, one, three = (
        folder / name / f"round-00{k}.safetensors"
        for name, k in (("High", 1), ("Expert", 1), ("Expert", 3))
    )
    assert by_steps["distance"] == script.distance(high, one)
    assert by_epochs["distance"] == script.distance(high, three)
    assert by_epochs["ratio"] == by_epochs["distance"] / run["expert"]["from_start"][2]
    assert by_steps["steps"] == found["steps_an_epoch"]["student"] == 2
    assert sum(found["rows_a_class"]["Low"].values()) == found["rows_a_third"] == 8
    assert 0 <= run["students"]["Low"]["accuracy"] <= 1

    monkeypatch.setattr(script, "save_round", lambda *_: pytest.fail("trained again"))
    assert script.measure_all(args, train, test, ("a", "b")) == found


def run_script(folder):
    environment = os.environ | {"DQ_TEST_DATA": str(folder)}
    return subprocess.run(
        [sys.executable, SCRIPT, "--work_dir", folder / "work"],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_missing_data_and_other_work_are_one_line(tmp_path):
    done = run_script(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no cifar10 in")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "work").exists()
    record.start(tmp_path / "work", {"model": "resnet10-narrow", "batch_size": 64})
    done = run_script(tmp_path)
    assert done.returncode == 2
    assert "holds a run with another batch_size, learning_rate" in done.stderr
    assert done.stderr.count("\n") == 1
