"""Rows with images and text in the shapes that data sets have."""

import io

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

BROKEN = {"bytes": b"no picture", "path": None}


def picture(seed, size=(20, 24)):
    rng = np.random.default_rng(seed)
    image = Pictures.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


def make(columns, **kinds):
    kinds = {name: kinds.get(name, Value("string")) for name in columns}
    return Dataset.from_dict(columns, features=Features(kinds))


PARTS = {
    "role": Value("string"),
    "content": List({"type": Value("string"), "text": Value("string")}),
}
SHARED = {"from": Value("string"), "value": Value("string")}


def turns_of_parts(question):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    return [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]


def turns_of_sharegpt(question):
    return [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": "yes"},
    ]


ONE = [picture(0), picture(1)]
MANY = [[picture(0)], [picture(1), picture(2), picture(3)]]
IN_PARTS = {"type": Value("string"), "text": Value("string"), "image": Image()}
INSIDE = {"role": Value("string"), "content": List(IN_PARTS)}


def turns_with_images(question, *images):
    parts = [{"type": "image", "text": None, "image": image} for image in images]
    parts.append({"type": "text", "text": question, "image": None})
    return [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "yes", "image": None}]},
    ]


SHAPES = {
    "images inside": (
        {"messages": [turns_with_images("a", ONE[0]), turns_with_images("b", *ONE)]},
        {"messages": List(INSIDE)},
        ["messages"],
        ["a yes", "b yes"],
    ),
    "columns": (
        {"image": ONE, "question": ["a", "b"], "answer": ["yes", "yes"], "image_id": ["1", "2"]},
        {"image": Image()},
        ["question", "answer"],
        ["a yes", "b yes"],
    ),
    "instruction": (
        {"picture": ONE, "instruction": ["a", "b"], "output": ["yes", "yes"], "topic": ["p", "q"]},
        {"picture": Image()},
        ["instruction", "output"],
        ["a yes", "b yes"],
    ),
    "messages": (
        {"images": MANY, "messages": [turns_of_parts("a"), turns_of_parts("b")]},
        {"images": List(Image()), "messages": List(PARTS)},
        ["messages"],
        ["a yes", "b yes"],
    ),
    "sharegpt": (
        {"id": ["1", "2"], "image": ONE, "conversations": [*map(turns_of_sharegpt, "ab")]},
        {"image": Image(), "conversations": List(SHARED)},
        ["conversations"],
        ["a yes", "b yes"],
    ),
    "captions": (
        {"image": ONE, "captions": [["a", "a b"], ["b"]], "file_name": ["x", "y"]},
        {"image": Image(), "captions": List(Value("string"))},
        ["captions"],
        ["a a b", "b"],
    ),
    "turns by name": (
        {"images": MANY, "texts": [[{"user": q, "assistant": "yes"}] for q in "ab"]},
        {
            "images": List(Image()),
            "texts": List({"user": Value("string"), "assistant": Value("string")}),
        },
        ["texts"],
        ["a yes", "b yes"],
    ),
    "two columns": (
        {"image_1": ONE, "image_2": [None, picture(5)], "prompt": ["a <image_1>", "<image_2>b"]},
        {"image_1": Image(), "image_2": Image()},
        ["prompt"],
        ["a", "b"],
    ),
}
