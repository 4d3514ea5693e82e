"""Make a bundle: the selections of a suite, and the rows that its cells train and test on."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dq_multimodal.config import InputError
from harness.bundle import Bundle, BundleWriter, is_bundle
from harness.encoders import embed, find_place, hash_file
from harness.results import digest
from harness.selections import Chooser
from harness.suite import Cell, Suite, read_suite
from harness.texts import add_texts, load_test, split_held_out

if TYPE_CHECKING:
    from dq_multimodal.data.source import Source
    from dq_multimodal.training.image_data import ImageDataArguments

BOTH = {
    *("kind", "dataset", "split", "config_name", "test", "test_split", "encoder", "embeddings"),
    *("label_column", "unlabelled"),
}
TASK = {
    "image": BOTH | {"image_column", "image_size"},
    "text": BOTH | {"text_columns", "held_out", "tests", "models", "max_length", "target"},
}
"""Keys of a task, by its kind."""
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
        "rows_digest": pa.string(),
        "bytes": pa.int64(),
        "selection_seconds": pa.float64(),
        "proxy_seconds": pa.float64(),
    }
)
"""One line a selection, keep ratio and draw; `rows` are positions in the packed rows."""


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
    kinds = {"image": ImageTask, "text": TextTask}
    tasks = {}
    for task in used:
        spec = suite.tasks[task]
        strange = set(spec) - TASK[spec["kind"]]
        if strange or "dataset" not in spec:
            said = f"no key {', '.join(sorted(strange))}" if strange else "dataset is missing"
            raise InputError(
                f"task {task}: {said}; keys are {', '.join(sorted(TASK[spec['kind']]))}"
            )
        alike = (name for name in suite.tasks if rows_of(suite.tasks[name]) == rows_of(spec))
        tasks[task] = kinds[spec["kind"]](suite, task, work / next(alike))
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


def rows_of(spec: dict[str, Any]) -> dict[str, Any]:
    """Give what says which rows a task chooses from; tasks of equal ones share their runs."""
    names = {"kind", "dataset", "split", "config_name", "held_out", "encoder", "embeddings"}
    return {key: value for key, value in spec.items() if key in names}


@dataclass
class Task:
    """Prepares the rows of one task.

    Attributes:
        suite: The suite.
        name: Name of the task in it.
        work: Folder for runs and files between.
        restored: Rows, and their images with filled patches, which follow the used rows.
    """

    suite: Suite
    name: str
    work: Path
    restored: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

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
            line["bytes"] = self.count_bytes(line["rows"])
            line["rows_digest"] = digest(line["rows"].tolist())
            if line["weights"] is not None:
                parts = [line["use_weights"], line["weights"].tolist()]
                line["rows_digest"] = digest(line["rows_digest"], *parts)
            positions = np.searchsorted(used, line["rows"])
            if json.loads(line["options"]).get("drop_ratio"):  # other pixels than the source's
                positions = np.arange(n_packed, n_packed + len(positions))
                n_packed += len(positions)
                line |= self.restore(line)
            line["rows"] = positions.astype(np.int32)
        writer.add_table(f"{self.name}/selections", pa.Table.from_pylist(lines, SCHEMA))
        digests = {}
        if "probe" in self.trainers or self.spec["kind"] == "image":
            self.pack_labels(writer, used)
        if "probe" in self.trainers:
            self.pack_features(writer, used)
            ready = [hash_file(self.embeddings)] if self.embeddings else []
            digests["probe"] = digest(self.pins, *ready)
        if self.trainers - {"probe"}:
            self.pack(writer, used)
            digests |= self.digest_packed(writer)
        return {"kind": self.spec["kind"], "rows": self.n_rows, "digests": digests}

    @property
    def pins(self) -> list[Any]:
        """What says which rows, columns and encoder these are, wherever they lie."""
        from dq_multimodal.data.source import pin_of
        from dq_multimodal.models.locate import hash_weights

        sources = [self.whole, *([self.test_source] if "test" in self.spec else [])]
        places = {"dataset", "test", "embeddings", "encoder", "models", "tests", "target"}
        spec = {key: value for key, value in self.spec.items() if key not in places}
        encoder = self.chooser.encoder_place
        about = Path(encoder or "") / "config.json"
        model = [hash_weights(encoder) or encoder, about.read_text() if about.is_file() else None]
        return [[pin_of(source.origin, has_names=False) for source in sources], spec, model]

    @cached_property
    def trainers(self) -> set[str]:
        """What trains the cells of the task."""
        return {self.suite.settings[cell.protocol]["trainer"] for cell in self.cells}

    def digest_packed(self, writer: BundleWriter) -> dict[str, str]:
        """Give what cells depend on that are not of the probe; see `prepare`."""
        raise NotImplementedError

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells of the task."""
        return [cell for cell in self.suite.cells if cell.task == self.name]

    @property
    def spec(self) -> dict[str, Any]:
        """What the suite says of the task."""
        return self.suite.tasks[self.name]

    @cached_property
    def place(self) -> str:
        """Where the rows to choose from are."""
        return find_place(self.spec["dataset"])

    @property
    def embeddings(self) -> str | None:
        """File of their embeddings, where the suite names one."""
        return find_place(self.spec["embeddings"]) if "embeddings" in self.spec else None

    @property
    def numbers(self) -> np.ndarray | None:
        """Their numbers in row lists; None if these are 0 ... n-1."""
        return None

    @property
    def target(self) -> dict[str, Any]:
        """The options of `compress` that name the target rows; empty if there are none."""
        return {}

    @cached_property
    def source(self) -> "Source":
        """The rows to choose from."""
        from dq_multimodal.data.source import load_source

        return load_source(self.place, **self.which)

    @property
    def whole(self) -> "Source":
        """All rows, those held out among them."""
        return self.source

    @property
    def n_rows(self) -> int:
        """How many they are."""
        return len(self.source.dataset)

    @property
    def which(self) -> dict[str, Any]:
        """Which part of the dataset they are."""
        return {
            "split": self.spec.get("split", "train"),
            "config_name": self.spec.get("config_name"),
        }

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that the suite names, as `compress` takes them."""
        names = ("label_column", "image_column", "text_columns")
        return {name: self.spec[name] for name in names if name in self.spec}

    @cached_property
    def test(self) -> tuple[str, str]:
        """Where the test rows are, and their split: of local files the only one."""
        if "test" not in self.spec:
            raise InputError(f"task {self.name}: test is missing")
        place = find_place(self.spec["test"])
        usual = "train" if Path(place).is_absolute() else "test"
        return place, self.spec.get("test_split", usual)

    @cached_property
    def test_source(self) -> "Source":
        """The test rows."""
        from dq_multimodal.data.source import load_source

        place, split = self.test
        return load_source(place, split=split, config_name=self.spec.get("config_name"))

    @cached_property
    def chooser(self) -> Chooser:
        """What chooses the rows."""
        used = dict.fromkeys(cell.selection for cell in self.cells)
        lists = {str(cell.keep) for cell in self.cells if isinstance(cell.keep, str)}
        names = {**used, **dict.fromkeys(lists)}
        hidden = {"label_column": "none"} if self.spec.get("unlabelled") else {}
        return Chooser(
            self.place,
            {**self.which, **self.columns, "modality": self.spec["kind"]},
            {
                name: (hidden if "method" in options else {}) | options
                for name, options in self.suite.selections.items()
                if name in names
            },
            self.work,
            self.n_rows,
            self.spec.get("encoder"),
            self.embeddings,
            self.numbers,
            self.target,
        )

    def choose_all(self) -> list[dict[str, Any]]:
        """Choose the rows of every selection, keep ratio and draw."""
        asked = dict.fromkeys((cell.selection, cell.keep, cell.draw) for cell in self.cells)
        lines = []
        for selection, keep, draw in tqdm(asked, desc=f"{self.name}, selections"):
            seed = self.suite.draw_seed(selection, draw)
            line = self.chooser.choose(selection, keep, seed)
            options = self.suite.selections[selection]
            options = json.dumps({k: v for k, v in options.items() if k != "use_weights"})
            lines.append(
                {
                    "selection": selection,
                    "keep": str(keep),
                    "draw": draw,
                    "options": options,
                    **line,
                }
            )
        return lines

    def pack_features(self, writer: BundleWriter, used: np.ndarray) -> None:
        """Write the embeddings of the used and the test rows, and their classes."""
        place, split = self.test
        encoder = self.chooser.encoder_place
        if encoder is None:
            raise InputError(f"task {self.name}: the probe needs an encoder")
        columns = {k: v for k, v in self.columns.items() if k != "image_column"}
        ready, of_test = self.chooser.ready, {**self.which, "split": split}
        train = (
            np.load(ready)
            if ready
            else embed(self.place, encoder, self.work, **self.which, **columns)
        )
        test = embed(place, encoder, self.work, **of_test, **columns)
        writer.add_array(f"{self.name}/train/features", train[used].astype(np.float32))
        writer.add_array(f"{self.name}/test/features", test.astype(np.float32))

    def pack_labels(self, writer: BundleWriter, used: np.ndarray) -> None:
        """Write the classes of the used and the test rows."""
        from dq_multimodal.data.columns import find_label_column, match_classes, read_classes

        rows = self.source.dataset
        column = find_label_column(rows, self.spec.get("label_column"))
        classes, labels = read_classes(rows, column)
        of_test = match_classes(*read_classes(self.test_source.dataset, column), labels)
        own = np.concatenate([used, *(rows for rows, _ in self.restored)])
        for part, found in (("train", classes[own]), ("test", of_test)):
            if (found < 0).any():
                raise InputError(f"task {self.name}: {part} rows without a known class")
            writer.add_array(f"{self.name}/{part}/labels", found.astype(np.int64))

    def count_bytes(self, rows: np.ndarray) -> int | None:
        """Give the bytes of the images of some rows; None where there are none."""
        return None

    def pack(self, writer: BundleWriter, used: np.ndarray) -> None:
        """Write the used rows and those of the tests."""
        raise NotImplementedError

    def restore(self, line: dict[str, Any]) -> dict[str, Any]:
        """Keep rows whose patches were dropped and filled, and give what that changes in a line."""
        raise InputError(f"task {self.name}: drop_ratio is for images")


class ImageTask(Task):
    """Prepares images and their classes."""

    def pack(self, writer: BundleWriter, used: np.ndarray) -> None:
        """Write square images, uint8."""
        rows = self.source.dataset
        size = self.data.find_size(rows)
        for part, dataset, own in (("train", rows, used), ("test", self.test_source.dataset, None)):
            pictures, _ = self.data.pictures(dataset, size, own, name=f"decode {part}")
            if pictures.unused:
                n, first = len(pictures.unused), pictures.unused[0]
                raise InputError(
                    f"task {self.name}: {n} {part} rows have no class or no image that can be "
                    f"read, the first is row {first if own is None else own[first]}"
                )
            images, _ = pictures.__getitems__(list(range(len(pictures))))
            if part == "train":
                images = np.concatenate([images, *(filled for _, filled in self.restored)])
            writer.add_array(f"{self.name}/{part}/images", images)

    def restore(self, line: dict[str, Any]) -> dict[str, Any]:
        """Drop patches of the kept rows as `compress` does, and read the images back filled."""
        seed = self.suite.draw_seed(line["selection"], line["draw"])
        run = self.chooser.drop_patches(line["selection"], line["keep_ratio"], seed)
        size = self.data.find_size(self.source.dataset)
        fill = {"fill": run.request.fill, "mae_model": run.request.mae_model}
        pictures, _ = self.data.pictures(run.subset, size, name="restore", **fill)
        images, _ = pictures.__getitems__(list(range(len(pictures))))
        self.restored.append((run.kept, images))
        pixels = hashlib.sha256(images).hexdigest()
        return {
            "bytes": run.manifest.bytes.stored_images,
            "rows_digest": digest(line["rows_digest"], pixels),
            "proxy_seconds": None,  # not known: classifier and autoencoder were there
        }

    def digest_packed(self, writer: BundleWriter) -> dict[str, str]:
        """Give what image cells depend on: rows, columns, size and test images; no encoder."""
        tested = [writer.digest_of(f"{self.name}/test/{part}") for part in ("images", "labels")]
        return {"image": digest(self.pins[:2], tested)}

    @cached_property
    def data(self) -> "ImageDataArguments":
        """What reads the images."""
        from dq_multimodal.training.image_data import ImageDataArguments

        names = ("image_column", "label_column", "image_size")
        return ImageDataArguments(self.place, **{name: self.spec.get(name) for name in names})

    @cached_property
    def sizes(self) -> np.ndarray | None:
        """Bytes of each image file, (n,); None where the rows only name files."""
        import pyarrow.compute as pc

        from dq_multimodal.data.columns import find_image_column
        from dq_multimodal.data.pixels import undecoded

        column = find_image_column(self.source.dataset, self.spec.get("image_column"))
        rows = undecoded(self.source.dataset, column).select_columns([column])
        blocks = rows.with_format("arrow").iter(1000)
        lengths = [
            pc.binary_length(pc.struct_field(b[column].combine_chunks(), "bytes")) for b in blocks
        ]
        found = pa.chunked_array(lengths)
        return None if found.null_count else found.to_numpy().astype(np.int64)

    def count_bytes(self, rows: np.ndarray) -> int | None:
        """Give the bytes of the image files of some rows."""
        return None if self.sizes is None else int(self.sizes[rows].sum())


class TextTask(Task):
    """Prepares instruction rows as tokens of every model, or texts with classes for the probe."""

    @cached_property
    def split_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows to choose from and those held out."""
        return split_held_out(len(self.whole.dataset), self.spec.get("held_out", 0))

    @cached_property
    def whole(self) -> "Source":
        """All rows, the held-out ones among them."""
        from dq_multimodal.data.source import load_source

        return load_source(find_place(self.spec["dataset"]), **super().which)

    @property
    def which(self) -> dict[str, Any]:
        """Which part of the dataset the rows to choose from are."""
        return {} if self.spec.get("held_out") else super().which

    @cached_property
    def place(self) -> str:
        """Where they are: without held-out rows the dataset, else a file in the work folder."""
        if self.numbers is None:
            return find_place(self.spec["dataset"])
        path = self.work / "rows.parquet"
        self.work.mkdir(parents=True, exist_ok=True)
        self.whole.dataset.select(self.numbers).to_parquet(path.with_suffix(".tmp"))
        return str(path.with_suffix(".tmp").replace(path).absolute())

    @property
    def numbers(self) -> np.ndarray | None:
        """Their numbers in row lists; None if no row is held out."""
        return self.split_rows[0] if self.spec.get("held_out") else None

    @cached_property
    def embeddings(self) -> str | None:
        """File of their embeddings, where the suite names one."""
        if "embeddings" not in self.spec or self.numbers is None:
            return super().embeddings
        path = self.work / "rows.npy"
        np.save(path, np.load(find_place(self.spec["embeddings"]))[self.numbers])
        return str(path.absolute())

    @cached_property
    def target(self) -> dict[str, Any]:
        """The target rows, as a file in the work folder, and their columns."""
        if "target" not in self.spec:
            return {}
        spec = self.spec["target"]
        rows, columns = load_test("target", spec)
        path = self.work / f"target-{digest(spec)}.parquet"
        self.work.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        return {"target": str(path.absolute()), "target_columns": columns}

    def pack(self, writer: BundleWriter, used: np.ndarray) -> None:
        """Write the tokens of the used rows and of the tests, and the models."""
        trained = [
            cell.net
            for cell in self.cells
            if self.suite.settings[cell.protocol]["trainer"] == "text"
        ]
        rows, held_out = self.source.dataset.select(used), self.whole.dataset
        held_out = held_out.select(self.split_rows[1])
        models = list(dict.fromkeys(trained))
        add_texts(writer, self.name, self.spec, rows, held_out, models)

    def digest_packed(self, writer: BundleWriter) -> dict[str, str]:
        """Give what cells of each model depend on: rows, columns, tests and the model itself."""
        found = {}
        for net in dict.fromkeys(cell.net for cell in self.cells):
            parts = [
                writer.digest_of(f"{self.name}/test/{net}/"),
                writer.digest_of(f"models/{net}/"),
            ]
            found[f"text/{net}"] = digest(self.pins[:2], parts)
        return found
