"""Rows of pictures and text, as TRL trains a vision-language model on them."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from dq_multimodal.adapters.choice import find_text
from dq_multimodal.adapters.text import IMAGE_MARK, field_texts, holds_turns
from dq_multimodal.config import CompressConfig, InputError
from dq_multimodal.data.columns import find_image_column
from dq_multimodal.data.pixels import (
    decode_image,
    image_columns,
    image_files,
    read_bytes,
    undecoded,
)
from dq_multimodal.data.row_sizes import read_blocks
from dq_multimodal.training.sft import ROLES
from dq_multimodal.training.weights import WEIGHT_COLUMN

CAPTION_PROMPT = "Describe the picture."
"""What is asked of a row that has a caption and no question."""
QUESTIONS = ("question", "query", "instruction", "prompt", "problem")
ANSWERS = ("answer", "answers", "response", "output", "completion", "solution")
PLACES = ("image", "image_url", "input_image")
"""Types of the parts of a turn that stand for an image."""
PAIR = ("user", "assistant")
"""Keys of a question and its answer, where both are one turn, as in The Cauldron."""
KNOWN_ROLES = ("system", "user", "assistant", "tool")
BLOCK_ROWS, N_THREADS = 256, 2

NO_QUESTION = "no question"
NO_ANSWER = "no answer"
NO_PICTURE = "a caption without its picture"
UNREADABLE = "a picture that cannot be read"
MOST_ASPECT = 200
THIN = f"a picture at least {MOST_ASPECT} times as long as it is wide"
"""Which some models refuse."""
IN_ANSWER = "a picture in the answer"
OTHER_NUMBER = "another number of places for pictures than of pictures"
NO_CHAT = "turns that are no chat"


class Unusable(Exception):
    """A row that cannot be trained on; the message is the reason, one of those above."""


@dataclass(frozen=True)
class PictureLayout:
    """Which columns are trained on.

    Attributes:
        images: Columns of pictures, which may be those of the turns.
        text: Of rows that are chats the columns of turns, in order. Of others, those of the prompt
            (none are CAPTION_PROMPT), and last that of the response.
        is_chat: Whether rows are chats.
        classes: Names of the classes of those columns of text that hold class labels.
    """

    images: tuple[str, ...]
    text: tuple[str, ...]
    is_chat: bool = False
    classes: dict[str, list[str]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Say what is trained on, as metrics.json has it."""
        images = {"images": list(self.images)}
        if self.is_chat:
            return images | {"chat": list(self.text)}
        return images | {
            "prompt": list(self.text[:-1]) or CAPTION_PROMPT,
            "response": self.text[-1],
        }


def find_layout(
    dataset: Dataset, text_columns: list[str] | None = None, image_column: str | None = None
) -> PictureLayout:
    """Find out which columns are trained on.

    Text columns are those named, the last of them the response; or those of a known shape (chats,
    instruction and output, prompt and completion), a question and its answer by their names, or the
    only column of text, which holds captions: of a list of texts the first is the response. Of
    answers that are class labels the names are.

    Raises:
        InputError: If there are no pictures, or text columns have to be named.
    """
    images = tuple(image_columns(dataset))
    if image_column is not None:
        images = (find_image_column(dataset, image_column),)
    if not images:
        raise InputError(
            f"found no column of images among {', '.join(dataset.column_names)}: "
            "recipes/alpaca_20pct.py trains on text alone"
        )
    asked = tuple(text_columns) if text_columns else None
    text = find_text(dataset, CompressConfig(dataset="", text_columns=asked))
    columns = text.columns if text else ()
    if any(_holds_chat(dataset.features[column]) for column in columns):
        if asked is None and text is not None and text.shape == "columns" and len(columns) > 1:
            raise InputError(
                f"found chats in {', '.join(columns)}: name the column to train on with "
                "--text_columns"
            )
        return PictureLayout(images, columns, is_chat=True)
    classes = {n: kind.names for n, kind in dataset.features.items() if hasattr(kind, "names")}
    if text is not None and text.shape == "columns" and asked is None:
        named = {column.lower(): column for column in reversed((*columns, *classes))}
        found = [[named[n] for n in names if n in named][:1] for names in (QUESTIONS, ANSWERS)]
        if all(found):
            columns = tuple(found[0] + found[1])
        elif found[0] or len(columns) > 1:
            columns = ()
    if not columns or isinstance(_inner(dataset.features[columns[-1]]), dict):
        raise InputError(
            "found neither chats, nor a question and its answer, nor one column of captions among "
            f"{', '.join(dataset.column_names)}: name them with --text_columns PROMPT RESPONSE"
        )
    return PictureLayout(images, columns, classes={n: classes[n] for n in columns if n in classes})


def _inner(kind: Any) -> Any:
    """Give the type of the values of a column, or of those in its lists."""
    return _inner(kind.feature) if hasattr(kind, "feature") else kind


def _holds_chat(kind: Any) -> bool:
    inner = _inner(kind)
    return holds_turns(inner) or (isinstance(inner, dict) and {*PAIR} <= inner.keys())


def to_vlm_rows(
    dataset: Dataset, text_columns: list[str] | None = None, image_column: str | None = None
) -> tuple[Dataset, dict[str, Any]]:
    """Turn rows into the `images`, `prompt` and `completion` that TRL trains on, as they are read.

    Of a chat the completion is the last answer of an assistant, and the prompt all before it; of
    other rows the prompt is one turn of a user. Pictures are upright 8-bit RGB, at their places in
    the row (marks such as <image> in a text, parts of type image in a turn), or else before the
    text of the first turn of a user. Rows without a picture are trained on as text. Left out are
    rows whose answer could not be learned: without a question or an answer, with a picture that
    cannot be read, or with another number of places than of pictures.

    Args:
        dataset: All pictures are read once here, to know which rows are left out.
        text_columns: See `find_layout`.
        image_column: The only column of pictures that counts.

    Returns:
        The rows, and what metrics.json says of them: the columns, `rows`, `rows_with_images`, and
        `rows_left_out` by the reason.

    Raises:
        InputError: If no layout fits, or no row is left.
    """
    layout = find_layout(dataset, text_columns, image_column)
    weights = {WEIGHT_COLUMN} & {*dataset.column_names}
    files = undecoded(dataset, *dict.fromkeys((*layout.images, *layout.text, *weights)))
    used, n_pictured, left_out = [], 0, Counter[str]()
    bar = tqdm(total=len(files), desc="check pictures", unit="row")
    with bar, ThreadPoolExecutor(N_THREADS) as pool:
        for block in read_blocks(files, BLOCK_ROWS):
            for problem, n_images in pool.map(lambda row: _check(row, layout), _rows_of(block)):
                if problem is None:
                    used.append(bar.n)
                    n_pictured += n_images > 0
                else:
                    left_out[problem] += 1
                bar.update()
    if not used:
        raise InputError(f"no row of {len(files):,} can be trained on: {list_reasons(left_out)}")
    about = layout.describe() | {"rows": len(used), "rows_with_images": n_pictured}
    about["rows_left_out"] = dict(left_out)
    return files.select(used).with_transform(partial(_read, layout=layout)), about


def list_reasons(left_out: dict[str, int]) -> str:
    """Say how many rows are left out, by the reason."""
    return ", ".join(f"{n:,} with {what}" for what, n in left_out.items())


def _rows_of(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    values = zip(*batch.values(), strict=True)
    return [dict(zip(batch, row, strict=True)) for row in values]


def _read(batch: dict[str, list[Any]], layout: PictureLayout) -> dict[str, list[Any]]:
    """Give rows as TRL takes them, their pictures decoded."""
    found = [convert(row, layout) for row in _rows_of(batch)]
    for row in found:
        row["images"] = [decode_image(read_bytes(file))[0] for file in row["images"]]
    return {name: [row[name] for row in found] for name in found[0]}


def _check(row: dict[str, Any], layout: PictureLayout) -> tuple[str | None, int]:
    """Say why a row is left out, and how many pictures it has."""
    try:
        images = convert(row, layout)["images"]
    except Unusable as problem:
        return str(problem), 0
    found = [decode_image(read_bytes(file), is_check=True)[0] for file in images]
    pictures = [picture for picture in found if picture is not None]
    if len(pictures) < len(images):
        return UNREADABLE, 0
    is_thin = any(max(one.size) >= MOST_ASPECT * min(one.size) for one in pictures)
    return THIN if is_thin else None, len(images)


def convert(row: dict[str, Any], layout: PictureLayout) -> dict[str, Any]:
    """Turn a row, whose pictures are files, into `images` (files), `prompt` and `completion`.

    Raises:
        Unusable: If it cannot be trained on.
    """
    (files,) = image_files({c: [row[c]] for c in layout.images}, layout.images)
    images = [file for file in files if file["bytes"] is not None or file["path"]]
    if layout.is_chat:
        turns = [turn for column in layout.text for turn in _read_turns(column, row[column])]
        ends = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not ends:
            raise Unusable(NO_ANSWER)
        prompt, answer = turns[: ends[-1]], turns[ends[-1]]["content"]
        while prompt and prompt[-1]["role"] == "assistant":  # one answer in several turns
            answer = prompt.pop()["content"] + answer
    else:
        row = row | {n: _name(row[n], classes) for n, classes in layout.classes.items()}
        *asked, response = (field_texts(row[column]) for column in layout.text)
        answer = [part for text in response[:1] for part in _split(text)]
        texts = [text for field in asked for text in field]
        if not asked:
            if not images:
                raise Unusable(NO_PICTURE)
            texts = [CAPTION_PROMPT]
        prompt = [{"role": "user", "content": _split("\n".join(texts))}]
    if any(part["type"] == "image" for part in answer):
        raise Unusable(IN_ANSWER)
    if not answer:
        raise Unusable(NO_ANSWER)
    n_places = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    users = [turn for turn in prompt if turn["role"] == "user"]
    if not n_places and users:
        users[0]["content"] = [{"type": "image"} for _ in images] + users[0]["content"]
    elif n_places != len(images):
        raise Unusable(OTHER_NUMBER)
    if not any(turn["content"] for turn in users) or prompt[-1]["role"] == "system":
        raise Unusable(NO_QUESTION)
    completion = [{"role": "assistant", "content": answer}]
    return {"images": images, "prompt": prompt, "completion": completion}


def _name(number: int | None, classes: list[str]) -> str | None:
    return classes[number] if number is not None and number >= 0 else None


def _read_turns(column: str, value: Any) -> list[dict[str, Any]]:
    """Give the turns of one field of a chat, with the roles and parts that chat templates know."""
    if column == "system":
        return [{"role": "system", "content": parts}] if (parts := _split(value or "")) else []
    turns: list[dict[str, Any]] = []
    for turn in value or []:
        if isinstance(turn, dict) and {*PAIR} <= turn.keys():
            turns += [{"role": role, "content": _split(turn[role])} for role in PAIR]
            continue
        role = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
        role = ROLES.get(str(role), role)
        if role not in KNOWN_ROLES:
            raise Unusable(NO_CHAT)
        content = turn.get("content") or turn.get("value")
        parts = content if isinstance(content, list) else [content]
        turns.append({"role": role, "content": [p for part in parts for p in _split(part)]})
    return turns


def _split(part: Any) -> list[dict[str, str]]:
    """Give the texts and the places of pictures in a text or a part of a turn, in their order."""
    if isinstance(part, dict) and part.get("type") in PLACES:
        return [{"type": "image"}]
    text = "\n".join(field_texts(part))
    pieces = IMAGE_MARK.split(text)
    if len(pieces) > 1:
        pieces = [piece.strip("\n") for piece in pieces]
    found: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        found += [{"type": "image"}] if number else []
        found += [{"type": "text", "text": piece}] if piece.strip() else []
    return found
