"""Reports for the tests of the page, one of nasty rows."""

import io

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from report_runs import PAIR_ROWS, TEXT_ROWS, clusters, write_run

from dq_multimodal.report import write_report
from dq_multimodal.report.collect import Map, collect
from dq_multimodal.report.page import make_page

EVIL_NAME = "</title><script>window.pwned=1</script>\u202eevil"
EVIL_LABELS = (
    "<img src=x onerror=window.pwned=1>",
    '" onmouseover="window.pwned=1',
    "long " * 10_000,
)
EVIL_COLUMNS = ["<b onclick=window.pwned=1>in", "</script><script>window.pwned=1</script>"]
EVIL_TEXTS = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "<!-- <script>",
    "--><img src=x onerror=window.pwned=1>",
    "]]><svg onload=window.pwned=1>",
    "javascript:window.pwned=1",
    "' onfocus='window.pwned=1' autofocus='",
    "${window.pwned=1} $title $data {{7*7}}",
    "&lt;b&gt; &amp;amp; &#60;",
    "\u202eright to left override\u202d and \u2066isolate",
    "مرحبا بالعالم שלום עולם",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 \U0001f600",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f",
    "lines\u2028and\u2029paragraphs\r\nof all\rkinds\x85",
    "",
    "   ",
    None,
    "x" * 1_000_000,
    "<" * 2000,
    "\ufeff\ufffe\uffff\ud7ff",
]


def write_text_report(folder):
    """Write a report of 240 rows of text with scores and two labels."""
    values = clusters(240)
    values[50:53] = values[10]
    config, manifest = write_run(
        folder,
        values,
        rows=TEXT_ROWS,
        strata=[k % 2 for k in range(240)],
        labels=("even", "odd"),
        has_scores=True,
        method="adq",
    )
    columns = {
        "instruction": [f"Question number {k}: why?" for k in range(240)],
        "output": [f"Answer {k}, " + "because it is so " * (k % 60) for k in range(240)],
    }
    dataset = Dataset.from_dict(columns)
    write_report(folder, config, manifest, embeddings=values, dataset=dataset)
    return folder


@pytest.fixture(scope="session")
def text_report(tmp_path_factory):
    """The folder of a report of text."""
    return write_text_report(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def evil_report(tmp_path_factory):
    """The folder of a report in which every text and name is hostile."""
    folder = tmp_path_factory.mktemp("evil")
    values = clusters(120)
    values[7] = 0
    values[60:70] = values[20]
    config, manifest = write_run(
        folder,
        values,
        rows=TEXT_ROWS | {"columns": EVIL_COLUMNS, "template": EVIL_TEXTS[0]},
        strata=[k % 3 for k in range(120)],
        labels=EVIL_LABELS,
        name=EVIL_NAME,
        notes=[EVIL_TEXTS[0], EVIL_TEXTS[9]],
    )
    config.label_column = EVIL_LABELS[0]
    texts = [EVIL_TEXTS[k % len(EVIL_TEXTS)] for k in range(120)]
    dataset = Dataset.from_dict({EVIL_COLUMNS[0]: texts, EVIL_COLUMNS[1]: texts[::-1]})
    write_report(folder, config, manifest, embeddings=values, dataset=dataset)
    return folder


def draw(seed, side=32):
    """A file of a picture of 4 x 4 colours."""
    file = io.BytesIO()
    colours = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Pillow.fromarray(colours).resize((side, side), 0).save(file, "PNG")
    return file.getvalue()


def make_pairs(n_rows):
    """Three questions about each picture; of 12 rows, three have other numbers of pictures.

    Row 4 of 12 has no picture, row 5 three of which the first is broken, row 6 only a broken one,
    row 7 no words.
    """
    pictures = [draw(k // 3, 32 if k % 2 else 150) for k in range(n_rows)]
    more = [[] for _ in range(n_rows)]
    questions = [f"Which colour has square {k % 3} of picture {k // 3}?" for k in range(n_rows)]
    for k in range(n_rows):
        if k % 12 == 4:
            pictures[k] = None
        elif k % 12 == 5:
            more[k] = [pictures[k], draw(k)]
        if k % 12 in (5, 6):
            pictures[k] = pictures[k][:60]
        elif k % 12 == 7:
            questions[k] = ""
    columns = {
        "image": [file and {"bytes": file, "path": None} for file in pictures],
        "more": [[{"bytes": file, "path": None} for file in files] for files in more],
        "question": questions,
        "answer": [question and f"Colour {k}" for k, question in enumerate(questions)],
    }
    features = {"image": Image(), "more": List(Image())}
    features |= {name: Value("string") for name in ("question", "answer")}
    return Dataset.from_dict(columns, Features(features))


def pair_values(n_rows, n_image=10, n_text=6):
    """Image vectors of `make_pairs`, equal but for their last bits, beside text vectors."""
    rng = np.random.default_rng(5)
    images = clusters(n_rows, n_image, seed=1)[np.arange(n_rows) // 3]
    images += 1e-4 * rng.standard_normal(images.shape, dtype=np.float32)
    texts = clusters(n_rows, n_text, seed=2)
    images[[k for k in range(n_rows) if k % 12 in (4, 6)]] = 0
    texts[[k for k in range(n_rows) if k % 12 == 7]] = 0
    return np.concatenate([images, texts], axis=1)


@pytest.fixture(scope="session")
def pair_report(tmp_path_factory):
    """The folder of a report of 96 rows of pictures and words."""
    folder = tmp_path_factory.mktemp("pairs")
    values = pair_values(96)
    config, manifest = write_run(folder, values, rows=PAIR_ROWS, halves=(10, 0.5))
    write_report(folder, config, manifest, embeddings=values, dataset=make_pairs(96))
    return folder


@pytest.fixture(scope="session")
def image_report(tmp_path_factory):
    """The folder of a report of 90 pictures, some of which cannot be read."""
    folder = tmp_path_factory.mktemp("image")
    values = clusters(90)
    files = []
    for k in range(90):
        file = draw(k, 32 if k % 2 else 150)
        files.append(None if k % 30 == 5 else file[: 60 if k % 30 == 6 else None])
    values[[k for k in range(90) if k % 30 in (5, 6)]] = 0
    dataset = Dataset.from_dict({"img": [f and {"bytes": f, "path": None} for f in files]})
    dataset = dataset.cast_column("img", Image())
    rows = {"modality": "image", "shape": "images", "columns": ["img"]}
    config, manifest = write_run(folder, values, rows=rows)
    write_report(folder, config, manifest, embeddings=values, dataset=dataset)
    return folder


@pytest.fixture(scope="session")
def large_report(tmp_path_factory):
    """The folder of a page alone: 6,000 rows, of which 4,000 are on the map, of very long texts."""
    folder, n_rows = tmp_path_factory.mktemp("large"), 6000
    config, manifest = write_run(folder, clusters(n_rows), method="random", rows=TEXT_ROWS)
    long = "<\U0001f469\u200d\U0001f469\u200d\U0001f467&" * 300
    columns = {"instruction": list(map(str, range(n_rows))), "output": [long] * n_rows}
    dataset = Dataset.from_dict(columns)
    facts = collect(folder, config, manifest, None, dataset)
    rows = np.arange(4000)
    places = np.random.default_rng(0).random((4000, 2))
    nobody = np.zeros((4000, 0), dtype=np.int64)
    facts.map = Map(rows, places, nobody, nobody * 0.5, 5999 - rows, places[:, 0], rows)
    facts.texts = facts.reader.texts(range(n_rows))
    (folder / "report.html").write_text(make_page(facts, False), encoding="utf-8")
    return folder
