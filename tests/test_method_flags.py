"""Wrong values of the flags that choose and order rows: one clear line each, and exit code 2."""

import pytest
from test_methods import SELECTION, write_inputs

from dq_multimodal.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    write_inputs(folder)
    return folder


WRONG = {
    "--keep-rows 0": "keep_rows must be a whole number of at least 1, got 0",
    "--keep-rows 121": "keep_rows must be at most the 120 rows, got 121",
    "--keep-rows 5 --keep-ratio 0.5": "give keep_ratio or keep_rows, not both",
    "--method ccs": "ccs needs the training dynamics of the rows: --dynamics",
    "--method dual": "dual needs the training dynamics of the rows: --dynamics",
    "--method dual --dynamics one_epoch.npy": "dual needs dynamics of 2 epochs or more, got 1",
    "--dynamics no.npy": "no.npy",
    "--dynamics d.parquet": "d.parquet",
    "--dynamics e.npy": "dynamics must have shape (epochs, 120, 3), or (checkpoints, 120, 2)",
    "--dynamics short.npy": "dynamics must have shape (epochs, 120, 3)",
    "--method ccs --dynamics losses.npy": "ccs needs training dynamics, (epochs, 120, 3)",
    "--difficulty aum": "difficulty aum needs dynamics of the rows",
    "--difficulty size": "difficulty size is no column of the dataset",
    "--difficulty text": "difficulty text must be a column of finite numbers of at least 0",
    "--difficulty debt": "difficulty debt must be a column of finite numbers of at least 0",
    "--difficulty ifd --dynamics dynamics.npy": "difficulty ifd is of losses of responses",
    "--difficulty aum --dynamics losses.npy": "difficulty aum is of training dynamics",
    "--difficulty length --method dq": "difficulty is for coverage, and the method is dq",
    "--method coverage --similarity euclidean": "coverage compares rows by cosine",
    "--noise-ratio 1 --dynamics dynamics.npy": "noise_ratio must lie in [0, 1), got 1.0",
    "--noise-ratio 0.1": "noise_ratio needs the training dynamics of the rows: --dynamics",
    "--target no.parquet": "no.parquet",
    "--target d.parquet --target-split none": "none",
    "--target d.parquet --target-share 0": "target_share must lie in (0, 1], got 0.0",
    "--target d.parquet --target-columns ,": "target_columns must be a list of names",
    "--target d.parquet --target-columns no": "target d.parquet: ",
    "--target d.parquet --target-gradients": "target_gradients needs a target_model",
    "--target-model m": "settings that begin with target_ need a target",
    "--drop-duplicates 1.5": "drop_duplicates must lie in (0, 1], got 1.5",
    "--drop-duplicates=near": "drop_duplicates must lie in (0, 1], got 'near'",
    "--alpha 1.5": "alpha must lie in [0, 1], got 1.5",
    "--score-rows 1": "score_rows must be a whole number of at least 2",
    "--norm x": "norm must be one of ",
    "--importance x": "importance must be one of ",
    "--representativeness x": "representativeness must be one of ",
    "--preset x": "preset must be one of dq-iccv23, adq-aaai25, got 'x'",
    "--partition kmeans:121": "partition must be of at most the 120 rows, got kmeans:121",
    "--partition kmeans:2 --label-column label": "label makes strata already",
    "--cap-by source": "cap_by and cap go together",
    "--cap 5": "cap_by and cap go together",
    "--cap-by origin --cap 5": "cap_by origin is no column of the dataset",
    "--cap-by source --cap 0": "cap must be a number of rows, or a share below 1, got 0.0",
    "--cap-by source --cap 1.5": "cap must be a number of rows, or a share below 1, got 1.5",
    "--cap-by source --cap 2": "a cap of 2 on source leaves at most 6 rows, and 24 were asked for",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_value_is_one_clear_line(flags, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = {path.name for path in place.iterdir()}
    given = ("compress", "d.parquet", "--ready-embeddings", "e.npy", *flags.split())
    with pytest.raises(SystemExit) as end:
        main([*given, "--output-dir", str(tmp_path / "o")])
    found = capsys.readouterr()
    line = found.err.strip().splitlines()[-1]
    assert end.value.code == 2, found
    assert line.startswith("error: ")
    assert WRONG[flags] in line
    assert "Traceback" not in found.err
    assert {path.name for path in place.iterdir()} == before
    assert not (tmp_path / "o" / SELECTION).exists()


def test_wrong_values_of_resample(place, tmp_path, command):
    asked = ("compress", "d.parquet", "--method", "random", "--no-report")
    command(place, *asked, "--output-dir", tmp_path / "run")
    for flags, message in (
        (("--method", "auto", "--keep-ratio", 0.1), "method must be one of random, blocks,"),
        ((), "resample needs a keep_ratio or keep_rows, one of them"),
        (("--keep-ratio", 0.1, "--keep-rows", 3), "one of them"),
        (("--method", "ccs", "--keep-ratio", 0.1), "ccs needs the training dynamics of the rows"),
    ):
        done = command(tmp_path, "resample", "run", *flags, "--output-dir", "out", code=2)
        assert message in done.stderr.splitlines()[-1]
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out" / SELECTION).exists()
