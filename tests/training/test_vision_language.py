"""Rows of pictures and text as TRL takes them: shape by shape, and the loss of their responses."""

import io
import math
import shutil
from functools import partial

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from dq_multimodal.config import InputError
from dq_multimodal.training.sft_run import describe_rows
from dq_multimodal.training.vision_language import CAPTION_PROMPT, to_vlm_rows

STRING = Value("string")
PLACE = {"type": "image"}


def file_of(grey, mode="RGB"):
    """Give a small picture of one grey value as a file."""
    data = io.BytesIO()
    Pictures.new(mode, (8, 8), grey if mode == "L" else (grey,) * 3).save(data, "png")
    return {"bytes": data.getvalue(), "path": None}


BROKEN = {"bytes": file_of(9)["bytes"][:45], "path": None}


def text(words):
    return {"type": "text", "text": words}


def convert(rows, image=None, *args, **features):
    """Make rows with a column of images (or lists of them) and text, and convert them."""
    name, kind = image or ("image", Image())
    kinds = {name: kind} | {key: features.get(key, STRING) for key in rows[0] if key != name}
    return to_vlm_rows(Dataset.from_list(rows, features=Features(kinds)), *args)


def check(got, images, prompt, answer):
    """Check one row: grey values of its pictures, its prompt and its completion."""
    assert [picture.getpixel((0, 0)) for picture in got["images"]] == [(g,) * 3 for g in images]
    assert all(picture.mode == "RGB" for picture in got["images"])
    assert got["prompt"] == prompt
    assert got["completion"] == [{"role": "assistant", "content": [text(answer)]}]


def user(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("row", "asked", "prompt", "answer"),
    [
        ({"question": "Q?", "answer": "A", "file_name": "x.png"}, None, "Q?", "A"),
        ({"prompt": "P", "completion": "C"}, None, "P", "C"),
        ({"instruction": "Do", "input": "this", "output": "O"}, None, "Do\nthis", "O"),
        ({"instruction": "Do", "input": "", "output": "O"}, None, "Do", "O"),
        ({"caption": "a cat"}, None, CAPTION_PROMPT, "a cat"),
        ({"text": "a cat"}, None, CAPTION_PROMPT, "a cat"),
        ({"title": "a cat", "id": "7"}, None, CAPTION_PROMPT, "a cat"),
        ({"q": "Q", "hint": "H", "a": "A"}, ["q", "a"], "Q", "A"),
    ],
)
def test_one_picture_and_text_columns(row, asked, prompt, answer):
    rows, about = convert([{"image": file_of(7, "L"), **row}], None, asked)
    check(rows[0], [7], [user(PLACE, text(prompt))], answer)
    assert (about["rows"], about["rows_with_images"], about["rows_left_out"]) == (1, 1, {})


def test_answers_that_are_class_labels():
    kinds = {"image": Image(), "question": STRING, "answer": ClassLabel(names=["no", "yes"])}
    rows = [{"image": file_of(1), "question": "Q", "answer": answer} for answer in (1, 0, None)]
    dataset = Dataset.from_list(rows, features=Features(kinds))
    got, about = to_vlm_rows(dataset)
    assert [row["completion"][0]["content"][0]["text"] for row in got] == ["yes", "no"]
    assert about["rows_left_out"] == {"no answer": 1}
    check(to_vlm_rows(dataset, ["answer"])[0][0], [1], [user(PLACE, text(CAPTION_PROMPT))], "yes")


def test_of_several_captions_the_first_is_trained_on():
    rows = [{"image": file_of(1), "captions": ["one", "two"]}, {"image": None, "captions": ["x"]}]
    got, about = convert(rows, captions=List(STRING))
    assert len(got) == 1
    check(got[0], [1], [user(PLACE, text(CAPTION_PROMPT))], "one")
    assert (about["prompt"], about["response"]) == (CAPTION_PROMPT, "captions")
    assert about["rows_left_out"] == {"a caption without its picture": 1}
    wanted = "1 rows, 1 of them with pictures; 1 left out: 1 with a caption without its picture; "
    assert describe_rows(about) == wanted + f"{CAPTION_PROMPT!r} -> captions"


TURN = {"role": STRING, "content": STRING}
PARTS = {"role": STRING, "content": List({"type": STRING, "text": STRING})}
IMAGES = ("images", List(Image()))


def messages(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[k % 2], "content": content} for k, content in enumerate(contents)]


def test_messages_with_marks_and_a_list_of_images():
    chats = [
        messages("<image>\nWhat?", "This.", "And here: <image_2> and\n<image>?", "That.", "More"),
        messages("First.", "So.", "What?", "This."),
        messages("No picture.", "None."),
    ]
    images = ([10, 20, 30], [40, 50], [])
    rows = [
        {"images": list(map(file_of, greys)), "messages": chat}
        for greys, chat in zip(images, chats, strict=True)
    ]
    got, about = convert(rows, IMAGES, messages=List(TURN))
    said = {"role": "assistant", "content": [text("This.")]}
    last = user(text("And here: "), PLACE, text(" and"), PLACE, text("?"))
    check(got[0], images[0], [user(PLACE, text("What?")), said, last], "That.")
    said = {"role": "assistant", "content": [text("So.")]}
    first = user(PLACE, PLACE, text("First."))
    check(got[1], images[1], [first, said, user(text("What?"))], "This.")
    check(got[2], [], [user(text("No picture."))], "None.")
    assert (about["chat"], about["rows_with_images"]) == (["messages"], 2)


def test_messages_with_parts():
    parts = [{"type": "text", "text": "Compare"}, PLACE, {"type": "text", "text": "and"}, PLACE]
    chat = messages([part | {"text": part.get("text")} for part in parts], [text("Equal.")])
    rows = [{"images": [file_of(1), file_of(2)], "messages": chat}]
    got, _ = convert(rows, IMAGES, messages=List(PARTS))
    check(got[0], [1, 2], [user(text("Compare"), PLACE, text("and"), PLACE)], "Equal.")


def test_pictures_inside_the_turns():
    kind = List({"role": STRING, "content": List(PARTS["content"].feature | {"image": Image()})})
    words = {"type": "text", "text": "What is", "image": None}
    places = [{"type": "image", "text": None, "image": file_of(grey)} for grey in (8, 9)]
    chat = messages([words, places[0], places[1]], [words | {"text": "This."}])
    got, about = convert([{"id": "0", "messages": chat}], ("messages", kind))
    check(got[0], [8, 9], [user(text("What is"), PLACE, PLACE)], "This.")
    assert (about["images"], about["chat"]) == (["messages"], ["messages"])
    chat[0]["content"][2]["image"] = None
    with pytest.raises(InputError, match="1 with another number of places for pictures"):
        convert([{"id": "0", "messages": chat}], ("messages", kind))


def test_conversations_of_sharegpt():
    chat = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    row = {"image": file_of(5), "system": "Be kind.", "conversations": chat}
    got, about = convert([row], conversations=List({"from": STRING, "value": STRING}))
    system = {"role": "system", "content": [text("Be kind.")]}
    check(got[0], [5], [system, user(PLACE, text("What?"))], "This.")
    assert about["chat"] == ["system", "conversations"]


def test_turns_of_the_cauldron():
    pairs = [{"user": "What?", "assistant": "This.", "source": "x"}]
    pairs += [{"user": "And?", "assistant": "That.", "source": "x"}]
    kind = List({"user": STRING, "assistant": STRING, "source": STRING})
    got, _ = convert([{"images": [file_of(4)], "texts": pairs}], IMAGES, texts=kind)
    said = {"role": "assistant", "content": [text("This.")]}
    check(got[0], [4], [user(PLACE, text("What?")), said, user(text("And?"))], "That.")


def test_prompt_and_completion_that_are_chats():
    row = {"image": file_of(5), "prompt": messages("What?"), "completion": [messages("", "It.")[1]]}
    got, _ = convert([row], prompt=List(TURN), completion=List(TURN))
    check(got[0], [5], [user(PLACE, text("What?"))], "It.")


def test_an_answer_in_two_turns_is_one():
    turns = [*messages("Q", "Well,"), {"role": "assistant", "content": "this."}]
    got, _ = convert([{"images": [file_of(3)], "messages": turns}], IMAGES, messages=List(TURN))
    assert got[0]["prompt"] == [user(PLACE, text("Q"))]
    said = [text("Well,"), text("this.")]
    assert got[0]["completion"] == [{"role": "assistant", "content": said}]


def test_of_two_answers_none_is_taken_for_the_prompt_of_the_other():
    chosen, rejected = ([turn] for turn in messages("Good.", "Bad."))
    row = {"image": file_of(5), "prompt": messages("Q"), "chosen": chosen, "rejected": rejected}
    kinds = dict.fromkeys(("prompt", "chosen", "rejected"), List(TURN))
    with pytest.raises(InputError, match="found chats in prompt, chosen, rejected: name the"):
        convert([row], **kinds)


def test_rows_that_cannot_be_trained_on_are_left_out_and_counted():
    good, odd = file_of(3), {"role": "narrator", "content": "Once"}
    file = io.BytesIO()
    Pictures.new("RGB", (400, 2)).save(file, "PNG")
    thin = {"bytes": file.getvalue(), "path": None}
    chats = {
        "no answer": ([good], messages("Q")),
        "no question": ([], messages("", "A")),
        "a picture that cannot be read": ([good, BROKEN], messages("Q", "A")),
        "a picture at least 200 times as long as it is wide": ([thin], messages("Q", "A")),
        "a picture in the answer": ([good], messages("Q", "See <image>")),
        "another number of places for pictures than of pictures": ([], messages("<image>Q", "A")),
        "turns that are no chat": ([good], [odd]),
        "": ([good, None], messages("Q", "A")),
    }
    rows = [{"images": images, "messages": chat} for images, chat in chats.values()]
    got, about = convert(rows, IMAGES, messages=List(TURN))
    assert about["rows_left_out"] == dict.fromkeys([reason for reason in chats if reason], 1)
    assert len(got) == about["rows"] == 1
    check(got[0], [3], [user(PLACE, text("Q"))], "A")
    with pytest.raises(InputError, match="no row of 1 can be trained on: 1 with no answer"):
        convert(rows[:1], IMAGES, messages=List(TURN))


def test_rows_without_a_picture_are_text_and_weights_stay():
    rows = [{"image": None, "question": "Q", "answer": f"A{k}", "dq_weight": k} for k in range(3)]
    got, about = convert(rows, dq_weight=Value("float64"))
    check(got[1], [], [user(text("Q"))], "A1")
    assert about["rows_with_images"] == 0
    assert got.with_format(None)["dq_weight"][:] == [0, 1, 2]
    assert [row["completion"] for row in got.__getitems__([2, 0])] == [
        [{"role": "assistant", "content": [text(answer)]}] for answer in ("A2", "A0")
    ]


def test_several_columns_of_pictures_or_one_that_is_named():
    kinds = {"left": Image(), "right": Image(), "question": STRING, "answer": STRING}
    row = {"left": file_of(1), "right": file_of(2), "question": "Q", "answer": "A"}
    dataset = Dataset.from_list([row], features=Features(kinds))
    check(to_vlm_rows(dataset)[0][0], [1, 2], [user(PLACE, PLACE, text("Q"))], "A")
    check(to_vlm_rows(dataset, None, "right")[0][0], [2], [user(PLACE, text("Q"))], "A")


def test_what_columns_are_is_not_guessed():
    with pytest.raises(InputError, match=r"no column of images among question, answer: .*alpaca"):
        to_vlm_rows(Dataset.from_list([{"question": "Q", "answer": "A"}]))
    row = {"image": file_of(1), "head": "h", "body": "b"}
    for odd in (row, {"image": file_of(1), "question": "Q"}):
        with pytest.raises(InputError, match="name them with --text_columns PROMPT RESPONSE"):
            convert([odd])


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    from dq_multimodal.training.tiny_models import write_llava

    folder = tmp_path_factory.mktemp("models") / "llava"
    write_llava(folder, ["What colour is this?", "It is red."], image_size=16, hidden_size=64)
    return folder


def test_the_loss_is_of_the_response_alone(llava):
    """Against the definition: prompts written by hand, log-softmax of each token of the answers."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from dq_multimodal.training.sft import response_loss

    rows = [
        {"image": file_of(9), "question": "What colour is this?", "answer": "It is red."},
        {"image": file_of(200), "question": "What?", "answer": "It is white, I think."},
        {"image": None, "question": "What colour is blood?", "answer": "red"},
    ]
    model = AutoModelForImageTextToText.from_pretrained(llava).eval()
    with torch.no_grad():  # so that no token is as likely as another
        model.get_output_embeddings().weight.mul_(20)
    processor = AutoProcessor.from_pretrained(llava)
    total, count = 0.0, 0
    for row in rows:
        grey = row["image"] and Pictures.open(io.BytesIO(row["image"]["bytes"]))
        prompt = f"<|bos|>user: {'<image>' if grey else ''}{row['question']}\nassistant: "
        inputs = processor(text=prompt, images=grey, return_tensors="pt")
        answer = processor.tokenizer(row["answer"] + "<|eos|>", return_tensors="pt")["input_ids"]
        pixels = {"pixel_values": inputs["pixel_values"]} if grey else {}
        with torch.no_grad():
            ids = torch.cat([inputs["input_ids"], answer], dim=1)
            log_p = model(input_ids=ids, **pixels).logits[0].log_softmax(-1)
        total -= log_p[-answer.shape[1] - 1 : -1].gather(1, answer[0][:, None]).sum().item()
        count += answer.shape[1]

    class Trainer:
        accelerator = Accelerator(cpu=True)
        model_wrapped = model
        data_collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)

    got, _ = convert(rows)
    for batch_size in (1, 2, 3):
        found = response_loss(Trainer(), got, batch_size)
        assert found["response_loss"] == pytest.approx(total / count, rel=1e-4)
        assert (found["response_tokens"], found["rows"]) == (count, 3)
    assert abs(total / count - math.log(len(processor.tokenizer))) > 0.1


def test_models_that_do_not_fit_are_one_line(llava, small_encoder, tmp_path):
    from dq_multimodal.training.sft import check_model

    check = partial(check_model, needs_chat_template=True, has_images=True)
    check(str(llava))
    with pytest.raises(InputError, match="is no vision-language model: it holds a model of type"):
        check(str(small_encoder))
    silent = shutil.copytree(llava, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"the rows are chats and .* has no chat template"):
        check(str(silent))
