"""eval/text_speed.py measures the embedding stage, and the forward pass inside `compress`."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from eval_scripts import load_script

script = load_script("text_speed")


def test_both_measurements_on_a_tiny_encoder(tmp_path, monkeypatch, small_encoder):
    texts = {name: [f"the fox {k} {name}" for k in range(90)] for name in ("instruction", "output")}
    pq.write_table(pa.table(texts), tmp_path / "source.parquet")
    output = tmp_path / "out.json"
    flags = {"--rows": 80, "--compress_rows": 0, "--rounds": 2}
    flags |= {"--methods": "dq", "--model": small_encoder}
    flags |= {"--source": tmp_path / "source.parquet", "--output": output}
    words = [str(word) for flag in flags.items() for word in flag]
    monkeypatch.setattr(sys, "argv", ["text_speed.py", *words])
    script.main()
    found = json.loads(output.read_text())
    assert found["stage"]["rows"] == 80
    assert {len(seconds) for seconds in found["stage"]["rounds"].values()} == {2}
    assert 0 < found["stage"]["share_of_encoder_rate"] < 2
    (line,) = found["compress"]
    assert line["rows"] == 90
    assert 0 < line["seconds_in_forward"] < line["seconds_in_compress"] < line["seconds"]
    assert 0 < line["share_not_forward_in_compress"] < line["share_not_forward"] < 1
    assert line["stage_seconds"]["embeddings"] > 0


def test_goals_are_held_against_the_figures():
    stage = {"rows": 3000, "share_of_encoder_rate": 0.951}
    commands = [{"rows": 90, "method": "dq", "share_not_forward": 0.05}]
    commands += [{"rows": 90, "method": "adq", "share_not_forward": 0.0501}]
    assert [goal["is_met"] for goal in script.hold(stage, commands)] == [True, True, False]
    assert script.hold({**stage, "share_of_encoder_rate": 0.949}, [])[0]["is_met"] is False
