"""Make a bundle: the selections of a suite, and the rows that its cells train and test on."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dq_multimodal.config import InputError
from dq_multimodal.core.hashing import row_hash
from dq_multimodal.data.row_files import read_bytes
from dq_multimodal.data.source import Source, load_source, pin_of
from dq_multimodal.files import describe_file
from dq_multimodal.models.locate import hash_weights
from harness.bundle import Bundle, BundleWriter, is_bundle
from harness.condensed import Added
from harness.encoders import embed, find_encoder, find_place
from harness.results import digest
from harness.selections import Chooser
from harness.suite import Suite, read_suite
from harness.texts import add_texts, load_test, split_held_out
from harness.vqa import number_words, split_words

BOTH = {
    *("kind", "dataset", "split", "config_name", "test", "test_split", "encoder", "embeddings"),
    *("label_column", "unlabelled"),
}
TASK = {
    "image": BOTH | {"image_column", "image_size"},
    "text": BOTH | {"text_columns", "held_out", "tests", "models", "max_length", "target"},
    "image-text": BOTH - {"embeddings"}
    | {"image_column", "image_size", "text_columns", "unnest", "shuffle"},
}
"""Keys of a task, by its kind."""
ROWS = {
    *("kind", "dataset", "split", "config_name", "held_out", "encoder", "embeddings"),
    *("unnest", "shuffle"),
}
"""Keys that say which rows a task chooses from; tasks that agree in them share their runs."""
PLACES = {"dataset", "test", "embeddings", "encoder", "models", "tests", "target"}
"""Keys that say where something is, and not what."""
SCHEMA = pa.schema(
    {
        "selection": pa.string(),
        "keep": pa.string(),
        "draw": pa.int32(),
        "rows": pa.list_(pa.int32()),
        "weights": pa.list_(pa.float32()),
        "use_weights": pa.string(),
        "keep_ratio": pa.float64(),
        "options": pa.string(),
        "is_soft": pa.bool_(),
        "condensed": pa.string(),
        "rows_digest": pa.string(),
        "bytes": pa.int64(),
        "selection_seconds": pa.float64(),
        "proxy_seconds": pa.float64(),
    }
)
"""One line a selection, size and draw; `rows` are positions in the packed rows."""


def prepare(name: str, folder: Path, work: Path) -> None:
    """Write the bundle of a suite; an unfinished call goes on from the runs in the work folder.

    Args:
        name: Name or file of the suite.
        folder: The bundle; empty, new, or a bundle before, which is replaced.
        work: Folder of the runs of `compress` that make the selections.

    Raises:
        InputError: If the suite, its data or its models cannot be used.
    """
    suite = read_suite(name)
    used = dict.fromkeys(cell.task for cell in suite.cells)
    tasks: dict[str, Task] = {}
    for task in used:
        spec = suite.tasks[task]
        known = TASK[spec["kind"]]
        strange = ", ".join(sorted(set(spec) - known))
        if strange or "dataset" not in spec:
            said = f"no key {strange}" if strange else "dataset is missing"
            raise InputError(f"task {task}: {said}; keys are {', '.join(sorted(known))}")
        kinds = {"image": ImageTask, "text": TextTask, "image-text": QuestionTask}
        tasks[task] = kinds[spec["kind"]](suite, task, folder_of(suite, task, work))
    cells = [(repr(cell), suite.settings[cell.protocol]["trainer"]) for cell in suite.cells]
    pins = {task: made.pins for task, made in tasks.items()}
    asked = digest(pins, {task: suite.tasks[task] for task in used}, suite.selections, cells)
    if is_bundle(folder) and Bundle(folder).about.get("asked") == asked:
        print(f"{folder} is already complete")
        return
    writer = BundleWriter(folder)
    about = {task: made.prepare(writer) for task, made in tasks.items()}
    writer.finish({"suite": suite.name, "asked": asked, "tasks": about})
    print(f"{folder}: {Bundle(folder).n_bytes:,} bytes for {len(suite.cells):,} cells")


def folder_of(suite: Suite, task: str, work: Path) -> Path:
    """Give the folder of a task in the work folder: that of the first that has the same rows."""
    rows = [{k: v for k, v in spec.items() if k in ROWS} for spec in suite.tasks.values()]
    return work / list(suite.tasks)[rows.index(rows[list(suite.tasks).index(task)])]


class Task:
    """Prepares the rows of one task.

    Attributes:
        suite: The suite.
        name: Name of the task in it.
        work: Folder for runs and files between.
        spec: What the suite says of the task.
        columns: The columns that the suite names, as `compress` takes them.
        encoder: What embeds the rows.
        whole: All rows, those held out among them.
        source: The rows to choose from; they are at `place`, part `which`.
        numbers: Their numbers in row lists; None if these are 0 ... n-1.
        embeddings: File of their embeddings, where the suite names one.
        target: The options of `compress` that name the target rows; empty if there are none.
        added: Images that follow those of the used rows: with filled patches, or synthetic.
    """

    def __init__(self, suite: Suite, name: str, work: Path) -> None:
        self.suite, self.name, self.work, self.spec = suite, name, work, suite.tasks[name]
        self.cells = [cell for cell in suite.cells if cell.task == name]
        self.trainers = {suite.settings[cell.protocol]["trainer"] for cell in self.cells}
        names = ("label_column", "image_column", "text_columns")
        self.columns = {key: self.spec[key] for key in names if key in self.spec}
        split = self.spec.get("split", "train")
        self.which = {"split": split, "config_name": self.spec.get("config_name")}
        self.place = find_place(self.spec["dataset"])
        self.whole = self.source = load_source(self.place, **self.which)
        encoder, ready = self.spec.get("encoder"), self.spec.get("embeddings")
        self.encoder = None if encoder is None else find_encoder(encoder, work)
        self.embeddings = None if ready is None else find_place(ready)
        self.numbers: np.ndarray | None = None
        self.target: dict[str, Any] = {}
        self.added: list[Added] = []

    def prepare(self, writer: BundleWriter) -> dict[str, Any]:
        """Write all parts of the task, and give what bundle.json says of it.

        `digests` says, for each trainer (and for text each model), what the result of a cell
        depends on beside its rows and settings: the data, the tests, the model.
        """
        lines = self.choose_all()
        used = np.unique(np.concatenate([line["rows"] for line in lines]))
        if "probe" in self.trainers:  # which standardises the features over all rows
            used = np.arange(self.n_rows)
        n_packed = len(used)
        for line in tqdm(lines, desc=f"{self.name}, rows"):
            added = line.pop("added", None)
            if added is None:
                line["bytes"] = self.count_bytes(line["rows"])
                line["rows_digest"] = digest(line["rows"].tolist())
                if line["weights"] is not None:
                    parts = [line["use_weights"], line["weights"].tolist()]
                    line["rows_digest"] = digest(line["rows_digest"], *parts)
                if json.loads(line["options"]).get("drop_ratio"):  # other pixels than the source's
                    added, changes = self.restore(line)
                    line |= changes
            positions = np.searchsorted(used, line["rows"])
            if added is not None:
                positions = np.arange(n_packed, n_packed + len(added.classes))
                n_packed += len(positions)
                self.added.append(added)
            line["rows"] = positions.astype(np.int32)
        writer.add_table(f"{self.name}/selections", pa.Table.from_pylist(lines, SCHEMA))
        digests = {}
        if "probe" in self.trainers or self.spec["kind"] != "text":
            self.pack_labels(writer, used)
        if "probe" in self.trainers:
            self.pack_features(writer, used)
            ready = [describe_file(Path(self.embeddings))["sha256"]] if self.embeddings else []
            digests["probe"] = digest(self.pins, *ready)
        if self.trainers - {"probe"}:
            digests |= self.pack(writer, used)
        return {"kind": self.spec["kind"], "rows": self.n_rows, "digests": digests}

    def write(self, name: str, rows: Any) -> str:
        """Write rows into a file of the work folder, and give its place."""
        path = self.work / name
        self.work.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(path.with_suffix(".tmp"))
        return str(path.with_suffix(".tmp").replace(path).absolute())

    @property
    def pins(self) -> list[Any]:
        """What says which rows, columns and encoder these are, wherever they lie."""
        sources = [self.whole, *([self.test_source] if "test" in self.spec else [])]
        spec = {key: value for key, value in self.spec.items() if key not in PLACES}
        models = []
        for encoder in (self.encoder or "").split(","):
            about = Path(encoder) / "config.json"
            config = about.read_text() if encoder and about.is_file() else None
            models.append([hash_weights(encoder) or encoder or None, config])
        model = models if len(models) > 1 else models[0]
        return [[pin_of(source.origin, has_names=False) for source in sources], spec, model]

    @property
    def n_rows(self) -> int:
        """How many there are to choose from."""
        return len(self.source.dataset)

    @cached_property
    def test(self) -> tuple[str, str]:
        """Where the test rows are, and their split: of local files the only one."""
        if "test" not in self.spec:
            raise InputError(f"task {self.name}: test is missing")
        place = find_place(self.spec["test"])
        usual = "train" if Path(place).is_absolute() else "test"
        return place, self.spec.get("test_split", usual)

    @cached_property
    def test_source(self) -> Source:
        """The test rows."""
        place, split = self.test
        return load_source(place, split=split, config_name=self.spec.get("config_name"))

    @cached_property
    def chooser(self) -> Chooser:
        """What chooses the rows."""
        return Chooser(self)

    def choose_all(self) -> list[dict[str, Any]]:
        """Choose the rows of every selection, keep ratio and draw."""
        asked = dict.fromkeys((cell.selection, cell.keep, cell.draw) for cell in self.cells)
        lines = []
        self.chooser.condense_all(asked)
        for selection, keep, draw in tqdm(asked, desc=f"{self.name}, selections"):
            line = {"selection": selection, "keep": str(keep), "draw": draw}
            options = self.suite.selections[selection]
            line["options"] = json.dumps({k: v for k, v in options.items() if k != "use_weights"})
            lines.append(line | self.chooser.choose(selection, keep, draw))
        return lines

    def pack_features(self, writer: BundleWriter, used: np.ndarray) -> None:
        """Write the embeddings of the used and the test rows."""
        (place, split), ready = self.test, self.chooser.ready
        if self.encoder is None:
            raise InputError(f"task {self.name}: the probe needs an encoder")
        columns = {k: v for k, v in self.columns.items() if k != "image_column"}
        asked = (self.encoder, self.work)
        train = np.load(ready) if ready else embed(self.place, *asked, **self.which, **columns)
        test = embed(place, *asked, **(self.which | {"split": split}), **columns)
        writer.add_array(f"{self.name}/train/features", train[used].astype(np.float32))
        writer.add_array(f"{self.name}/test/features", test.astype(np.float32))

    @cached_property
    def classes(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The class of every row, (n,), -1 where it has none, and the names of the classes."""
        from dq_multimodal.data.columns import find_label_column, read_classes

        rows = self.source.dataset
        return read_classes(rows, find_label_column(rows, self.spec.get("label_column")))

    @property
    def n_classes(self) -> int:
        """How many classes have rows."""
        return len(np.unique(self.classes[0][self.classes[0] >= 0]))

    def classes_of(self, rows: Any) -> np.ndarray:
        """Give the classes of other rows, (n,), by the numbers that those of the task have."""
        from dq_multimodal.data.columns import find_label_column, match_classes, read_classes

        column = find_label_column(self.source.dataset, self.spec.get("label_column"))
        return match_classes(*read_classes(rows, column), self.classes[1])

    def pack_labels(self, writer: BundleWriter, used: np.ndarray) -> None:
        """Write the classes of the used and the test rows, and the labels that were learnt."""
        own = np.concatenate([self.classes[0][used], *(added.classes for added in self.added)])
        for part, found in (("train", own), ("test", self.classes_of(self.test_source.dataset))):
            if (found < 0).any():
                raise InputError(f"task {self.name}: {part} rows without a known class")
            writer.add_array(f"{self.name}/{part}/labels", found.astype(np.int64))
        if any(added.soft is not None for added in self.added):
            soft, last = np.eye(own.max() + 1, dtype=np.float32)[own], len(used)
            for added in self.added:
                first, last = last, last + len(added.classes)
                if added.soft is not None:  # a column a class that has rows, which come in turn
                    soft[first:last] = 0
                    soft[first:last, added.classes[: self.n_classes]] = added.soft
            writer.add_array(f"{self.name}/train/soft_labels", soft)

    def count_bytes(self, rows: np.ndarray) -> int | None:
        """Give the bytes of the images of some rows; None where there are none."""
        return None

    def pack(self, writer: BundleWriter, used: np.ndarray) -> dict[str, str]:
        """Write the used rows and those of the tests, and give the digests of their cells."""
        raise NotImplementedError

    def restore(self, line: dict[str, Any]) -> tuple[Added, dict[str, Any]]:
        """Drop patches of kept rows; give the filled images, and what that changes in a line."""
        raise InputError(f"task {self.name}: drop_ratio is for images")


class ImageTask(Task):
    """Prepares images and their classes."""

    def pack(self, writer: BundleWriter, used: np.ndarray) -> dict[str, str]:
        """Write square images, uint8; cells depend on rows, columns, size and test images."""
        of_train = [added.images for added in self.added]
        if len(used):
            of_train = [self.decode(self.source.dataset, used, "decode train"), *of_train]
        writer.add_array(f"{self.name}/train/images", np.concatenate(of_train))
        of_test = self.decode(self.test_source.dataset, None, "decode test")
        writer.add_array(f"{self.name}/test/images", of_test)
        tested = [writer.digest_of(f"{self.name}/test/{part}") for part in ("images", "labels")]
        return {"image": digest(self.pins[:2], tested)}

    def decode(self, rows: Any, used: np.ndarray | None, name: str, **fill: Any) -> np.ndarray:
        """Decode the images of some rows, square ones of the size of the source's."""
        from dq_multimodal.training.pictures import ImageDataArguments

        names = ("image_column", "label_column", "image_size")
        data = ImageDataArguments(self.place, **{key: self.spec.get(key) for key in names})
        size = data.find_size(self.source.dataset)
        pictures, _ = data.pictures(rows, size, used, name=name, **fill)
        if pictures.unused:
            n, first = len(pictures.unused), pictures.unused[0]
            raise InputError(
                f"task {self.name}, {name}: {n} rows have no class or no image that can be "
                f"read, the first is row {first if used is None else used[first]}"
            )
        return pictures.__getitems__(list(range(len(pictures))))[0]

    def restore(self, line: dict[str, Any]) -> tuple[Added, dict[str, Any]]:
        """Drop patches of the kept rows as `compress` does, and read the images back filled."""
        seed = self.suite.draw_seed(line["selection"], line["draw"])
        run = self.chooser.drop_patches(line["selection"], line["keep_ratio"], seed)
        fill = {"fill": run.request.fill, "mae_model": run.request.mae_model}
        images = self.decode(run.subset, None, "restore", **fill)
        return Added(images, self.classes[0][run.kept]), {
            "bytes": run.manifest.bytes.stored_images,
            "rows_digest": digest(line["rows_digest"], hashlib.sha256(images).hexdigest()),
            "proxy_seconds": None,  # not known: classifier and autoencoder were there
        }

    @cached_property
    def sizes(self) -> np.ndarray | None:
        """Bytes of each image file, (n,); None where the rows only name files."""
        return self.file_sizes(self.source.dataset)

    def file_sizes(self, rows: Any) -> np.ndarray | None:
        """Give the bytes of the image files of some rows, (n,); None where they only name files."""
        import pyarrow.compute as pc

        from dq_multimodal.data.columns import find_image_column
        from dq_multimodal.data.pixels import undecoded

        column = find_image_column(rows, self.spec.get("image_column"))
        rows = undecoded(rows, column).select_columns([column])
        blocks = (b[column].combine_chunks() for b in rows.with_format("arrow").iter(1000))
        found = pa.chunked_array([pc.binary_length(pc.struct_field(b, "bytes")) for b in blocks])
        return None if found.null_count else found.to_numpy().astype(np.int64)

    def count_bytes(self, rows: np.ndarray) -> int | None:
        """Give the bytes of the image files of some rows."""
        return None if self.sizes is None else int(self.sizes[rows].sum())


class QuestionTask(ImageTask):
    """Prepares rows of a picture and a text, such as a question, whose answers are classes.

    `unnest` names a column of lists, of which each element becomes a row; `shuffle` is a seed by
    which the rows change places.
    """

    def __init__(self, suite: Suite, name: str, work: Path) -> None:
        super().__init__(suite, name, work)
        self.text_column = self.spec["text_columns"][0]
        rows = self.whole.dataset
        if column := self.spec.get("unnest"):
            rows = unnest(rows, column)
        if (seed := self.spec.get("shuffle")) is not None:
            rows = rows.select(np.argsort(row_hash(seed, len(rows)), kind="stable"))
        if rows is not self.whole.dataset:
            self.place, self.which = self.write("rows.parquet", rows), {}
            self.source = load_source(self.place)

    @cached_property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the pictures and of the texts of all rows, (n, d) each."""
        rows = self.source.dataset
        return self.embed_half("image", rows), self.embed_half("text", rows)

    def embed_half(self, half: str, rows: Any, part: str = "train") -> np.ndarray:
        """Embed the pictures or the texts of some rows, each once however often it is there."""
        encoder = (self.encoder or "").split(",")[half == "text"]
        if half == "image":
            column, key = self.image_column, hash_files(rows, self.image_column)
            named: dict[str, Any] = {"image_column": column}
        else:
            column, key = self.text_column, np.array([*map(str, rows[self.text_column])])
            named = {"text_columns": [column]}
        _, first, codes = np.unique(key, return_index=True, return_inverse=True)
        place = self.write(f"{part}-{half}.parquet", rows.select(first).select_columns([column]))
        return embed(place, encoder, self.work, modality=half, **named)[codes]

    @cached_property
    def image_column(self) -> str:
        """The column of the pictures."""
        from dq_multimodal.data.columns import find_image_column

        return find_image_column(self.source.dataset, self.spec.get("image_column"))

    def pack(self, writer: BundleWriter, used: np.ndarray) -> dict[str, str]:
        """Write every picture once, pixels and features, and the picture and words of each row.

        Words have numbers in the order of the alphabet, those of all rows to choose from; of the
        pictures of all of them are the mean and deviation of the features.
        """
        known = {
            word
            for text in set(self.source.dataset[self.text_column])
            for word in split_words(text)
        }
        numbers = {word: number for number, word in enumerate(sorted(known), 1)}
        writer.add_array(f"{self.name}/n_words", np.array([len(numbers) + 1]))
        tests = self.test_source.dataset
        for part, rows, own, features in (
            ("train", self.source.dataset, used, self.halves[0]),
            ("test", tests, np.arange(len(tests)), self.embed_half("image", tests, "test")),
        ):
            files = hash_files(rows, self.image_column)
            if part == "train":
                every = features[np.unique(files, return_index=True)[1]]
                scale = np.stack([every.mean(axis=0), every.std(axis=0)])
                writer.add_array(f"{self.name}/train/scale", scale)
            _, first, places = np.unique(files[own], return_index=True, return_inverse=True)
            words = number_words(rows.select(own)[self.text_column], numbers)
            images = self.decode(rows, own[first], f"decode {part}")
            writer.add_array(f"{self.name}/{part}/images", images)
            writer.add_array(f"{self.name}/{part}/features", features[own[first]])
            writer.add_array(f"{self.name}/{part}/places", places.astype(np.int32))
            writer.add_array(f"{self.name}/{part}/words", words)
        return {"vqa": digest(self.pins, [writer.digest_of(f"{self.name}/test/")])}

    def count_bytes(self, rows: np.ndarray) -> int | None:
        """Give nothing: rows share pictures."""
        return None

    def restore(self, line: dict[str, Any]) -> tuple[Added, dict[str, Any]]:
        """Refuse it."""
        raise InputError(f"task {self.name}: drop_ratio is for tasks of kind image")


def hash_files(rows: Any, column: str) -> np.ndarray:
    """Give a hash of the image file of each row, (n,): rows with the same one share a picture."""
    from dq_multimodal.data.pixels import undecoded

    files = (read_bytes(row[column]) or b"" for row in undecoded(rows, column))
    return np.array([hashlib.sha256(file).hexdigest() for file in files])


def unnest(rows: Any, column: str) -> Any:
    """Give a row for each element of a column of lists, with the other columns beside it."""
    lists = rows[column]
    numbers = np.repeat(np.arange(len(rows)), [len(values) for values in lists])
    flat = [value for values in lists for value in values]
    return rows.select(numbers).remove_columns(column).add_column(column, flat)


class TextTask(Task):
    """Prepares instruction rows as tokens of every model, or texts with classes for the probe."""

    def __init__(self, suite: Suite, name: str, work: Path) -> None:
        super().__init__(suite, name, work)
        whole = self.whole.dataset
        kept, held = split_held_out(len(whole), self.spec.get("held_out", 0))
        self.held_out = whole.select(held)
        if len(held):  # the others are then a file in the work folder
            self.numbers, self.which = kept, {}
            self.place = self.write("rows.parquet", whole.select(kept))
            self.source = load_source(self.place)
            if self.embeddings is not None:
                np.save(work / "rows.npy", np.load(self.embeddings)[kept])
                self.embeddings = str((work / "rows.npy").absolute())
        if "target" in self.spec:
            rows, columns = load_test("target", self.spec["target"])
            place = self.write(f"target-{digest(self.spec['target'])}.parquet", rows)
            self.target = {"target": place, "target_columns": columns}

    def pack(self, writer: BundleWriter, used: np.ndarray) -> dict[str, str]:
        """Write the tokens of the used rows and of the tests, and the models.

        The cells of a model depend on rows, columns, tests and the model itself.
        """
        trainer_of = {cell.net: self.suite.settings[cell.protocol] for cell in self.cells}
        nets = [net for net, settings in trainer_of.items() if settings["trainer"] == "text"]
        rows = self.source.dataset.select(used)
        add_texts(writer, self.name, self.spec, rows, self.held_out, nets)
        found = {}
        for net in dict.fromkeys(cell.net for cell in self.cells):
            starts = (f"{self.name}/test/{net}/", f"models/{net}/")
            found[f"text/{net}"] = digest(self.pins[:2], [writer.digest_of(s) for s in starts])
        return found
