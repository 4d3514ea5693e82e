"""config.yaml and manifest.json of a run: what they hold, one reader and one writer of each."""

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import yaml

from dq_multimodal.config import SPLIT_NAME, CompressConfig, Fill, InputError
from dq_multimodal.files import describe_file, parse_yaml, read_text, write_text
from dq_multimodal.options import Request

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
FORMAT = "dq-multimodal run 1"
"""By this a manifest.json is known as one of ours."""
CONDENSED = "dq-multimodal condensed 1"
"""By this it is known as that of a condensed set."""
CONDENSED_FILES = "data/train-*.parquet"
"""Where the rows of one are."""
CONFIG_HEAD = "# What was asked of dq-multimodal, and what exactly it was asked of.\n"
MAX_CONFIG_BYTES = 1_000_000
MAX_MANIFEST_BYTES = 100_000_000
"""It holds the label of every stratum."""
AUTO_NOTE = "method auto is "
"""How the note begins that says which method auto is."""

Stage = Literal["embeddings", "selection", "subset", "report"]
BinsKind = Literal["dq", "graphcut", "coverage", "blocks", "none"]
T = TypeVar("T")


class Record:
    """A part of a document, also read by the names in its file, as in version 0.1.

    What has its default and is no collection is not written down.
    """

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, as YAML and JSON hold them."""
        found = {}
        for part in fields(self):  # type: ignore[arg-type]
            value = getattr(self, part.name)
            if part.init and (part.default is MISSING or value != part.default):
                found[part.name] = _as_plain(value)
        return found

    def __getitem__(self, key: str) -> Any:
        if not hasattr(self, key):
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: str) -> bool:
        return getattr(self, key, None) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """Give a part by its name in the file."""
        found = getattr(self, key, None)
        return default if found is None else found


def _as_plain(value: Any) -> Any:
    if is_dataclass(value):
        return value.as_dict()  # type: ignore[union-attr]
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    return [*map(_as_plain, value)] if isinstance(value, list | tuple) else value


def make(kind: type[T], values: dict[str, Any]) -> T:
    """Make a part of a document of plain values, if none is missing or of another type."""
    return check_type(kind.__name__, values, kind)


def check_type(name: str, value: Any, kind: Any) -> Any:
    """Raise unless a value that was read from a file has a type, all that it holds included.

    The value is plain, as YAML and JSON give it, the name what the message calls it. The type is
    str, bool, int (of 64 bits), float (finite), Any, a Literal, a list, tuple (a list in the file)
    or dict of one of them, one of them or None, or a dataclass or TypedDict (a dict in the file,
    which may hold more keys).

    Returns:
        The value, with dataclasses and tuples made.

    Raises:
        InputError: If it is another, naming the part that is.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Union or origin is type(int | str):
        (kind,) = (part for part in parts if part is not type(None))
        return None if value is None else check_type(name, value, kind)
    if is_dataclass(kind) or is_typeddict(kind):
        check_type(name, value, dict[str, Any])
        if hasattr(kind, "from_dict"):
            return kind.from_dict(value)
        kinds = get_type_hints(kind)
        if is_typeddict(kind):
            known, needed = [*kinds], kind.__required_keys__
        else:
            own = [part for part in fields(kind) if part.init]
            known = [part.name for part in own]
            needed = {part.name for part in own if part.default is part.default_factory is MISSING}
        for key in sorted(needed - value.keys()):
            raise InputError(f"{name} has no {key}")
        made = {k: check_type(f"{name}.{k}", value[k], kinds[k]) for k in known if k in value}
        return kind(**made)
    if origin in (list, tuple) and isinstance(value, list):
        items = (check_type(f"{name}[{k}]", item, parts[0]) for k, item in enumerate(value))
        return tuple(items) if origin is tuple else [*items]
    if origin is dict and isinstance(value, dict):
        keys = [check_type(f"a key of {name}", key, parts[0]) for key in value]
        items = (check_type(f"{name}.{key}", item, parts[1]) for key, item in value.items())
        return dict(zip(keys, items, strict=True))
    if not _is_plain(value, kind):
        wanted = getattr(kind, "__name__", str(kind).replace("typing.", ""))
        is_short = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**64)
        shown = repr(value) if is_short else type(value).__name__  # no text of a linked file
        raise InputError(f"{name} must be {wanted}, got {shown}")
    return value


def _is_plain(value: Any, kind: Any) -> bool:
    """Say whether a value has a type that is not made of others."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e300  # not NaN, not infinite
    # a list, tuple or dict of something is never another value
    return get_origin(kind) is None and (kind is Any or isinstance(value, kind))


@dataclass(kw_only=True)
class Written(Record):
    """A file that a run wrote."""

    bytes: int
    sha256: str


@dataclass(kw_only=True)
class SourceFile(Written):
    """A file of the source."""

    name: str


@dataclass(kw_only=True)
class Origin(Record):
    """Where rows are from, and what pins them; see `data.source.Source`."""

    kind: Literal["file", "folder", "hub", "memory"]
    name: str
    path: str | None = None
    split: str
    names: str | None = None
    config_name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    field: str | None = None
    separator: str | None = None
    license: Any = None
    license_name: Any = None
    license_link: Any = None
    files: list[SourceFile] | None = None
    image_files: str | None = None
    image_folder: str | None = None
    rows: int | None = None
    splits: dict[str, int] | None = None  # rows of each, in order, where all were read


def check_splits(splits: dict[str, int] | None, n_rows: int) -> None:
    """Raise unless these can be the splits, by name, of so many rows."""
    if splits is None:
        return
    is_named = all(re.fullmatch(SPLIT_NAME, name) for name in splits)
    if not is_named or min(splits.values(), default=0) < 1 or sum(splits.values()) != n_rows:
        raise InputError(f"config.source.splits are not those of {n_rows:,} rows")


@dataclass(kw_only=True)
class Columns(Record):
    """Which columns are embedded, and how; of image-text rows `columns` are those of the text."""

    modality: Literal["text", "image", "image-text"]
    shape: str
    columns: list[str]
    image_columns: list[str] | None = None
    template: str | None = None


@dataclass(kw_only=True)
class Model(Record):
    """What embeds or scores: a model, or the file or column of ready embeddings.

    Image-text rows may have a model for each half: vectors begin with the numbers of the image.
    """

    model: str | None = None
    revision: str | None = None
    weights: str | None = None
    file: str | None = None
    column: str | None = None
    image_size: int | None = None
    crop: float | None = None
    n_classes: int | None = None
    dimension: int | None = None
    max_tokens: int | None = None
    dtype: str | None = None
    kind: str | None = None
    factors: list[int] | None = None
    sha256_of_float32: str | None = None
    text_share: float | None = None
    image: "Model | None" = None
    text: "Model | None" = None


@dataclass(kw_only=True)
class Target(Record):
    """The rows that the model shall be good at, and how others are compared with them."""

    source: Origin
    rows: Columns
    by: str
    model: Model | None


@dataclass(kw_only=True)
class Patches(Record):
    """How patches are dropped."""

    patch_size: int
    fill: Fill
    attribution_model: Model | None


class ConfigFile(Record):
    """What a config.yaml is: what was asked, of which source."""

    request: Request
    source: Origin

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the config.yaml of a folder, whoever wrote it; None where there is none."""
        path = folder / CONFIG
        if not path.is_file():
            return None
        with _reading(path):
            found = check_type("config", parse_yaml(read_text(path, MAX_CONFIG_BYTES)), cls)
            found.check()
            return found

    def check(self) -> None:
        """Raise if parts that fit their types do not fit each other."""

    def format(self) -> str:
        """Give the text of config.yaml."""
        dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
        return CONFIG_HEAD + yaml.dump(
            self.as_dict(), Dumper=dumper, sort_keys=False, allow_unicode=True, width=100
        )

    def write(self, folder: Path) -> None:
        """Write config.yaml."""
        write_text(folder / CONFIG, self.format())


@dataclass(kw_only=True)
class Config(ConfigFile):
    """config.yaml of a run."""

    request: CompressConfig
    source: Origin
    rows: Columns | None  # what of them is embedded; None where there is neither text nor an image
    label_column: str | None  # makes strata
    embedding: Model | None  # None if nothing is embedded
    bins: BinsKind
    dynamics: str | None = None  # SHA-256 of the file of training dynamics
    target: Target | None = None
    scoring: Model | None = None  # scores bins, beside ready embeddings
    patches: Patches | None = None
    model_folders: dict[str, str | None] = field(default_factory=dict)  # hashes of the weights

    def check(self) -> None:
        """Raise if parts that fit their types do not fit each other."""
        if self.request.drop_ratio and self.patches is None:
            raise InputError("it has no patches")
        if self.source.rows is None:
            raise InputError("config.source has no rows")
        check_splits(self.source.splits, self.source.rows)


@dataclass(kw_only=True)
class Problem(Record):
    """Rows with something odd."""

    count: int
    rows: list[int]


@dataclass(kw_only=True)
class Sizes(Record):
    """Bytes of source and subset: of their columns in memory, of their files, of their images."""

    source_data: int | None
    source_files: int | None
    subset_data: int = 0
    subset_files: int = 0
    source_images: int | None = None
    stored_images: int | None = None


@dataclass(kw_only=True)
class ScoreFacts(Record):
    """Which rows the scores of the bins come from."""

    rows: int
    rows_a_bin: list[int]
    all_rows: bool


@dataclass(kw_only=True)
class Decibels(Record):
    """A summary of PSNRs."""

    mean: float | None
    lowest: float | None


@dataclass(kw_only=True)
class Answers(Record):
    """How often the classifier changed its answer."""

    compared: int
    changed: int


@dataclass(kw_only=True)
class PatchFacts(Record):
    """What dropping patches did."""

    fill: Fill
    images: int
    coded: int
    originals: dict[str, int]
    kept_share: float
    psnr_of_holes: Decibels
    psnr_of_kept: Decibels
    answers: Answers
    lost: dict[str, int] = field(default_factory=dict)


class ManifestFile(Record):
    """What a manifest.json is: a format mark, what came out, and a record of its files."""

    FORMAT: ClassVar[str]
    complete: bool
    files: dict[str, Written]
    digest: str | None
    is_sealed: bool

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the manifest.json of a folder, whoever wrote it; None if it is a mark or none."""
        path = folder / MANIFEST
        with _reading(path):
            try:
                document = json.loads(read_text(path, MAX_MANIFEST_BYTES))
            except FileNotFoundError:
                return None
            check_type("manifest", document, dict[str, Any])
            json.dumps(document, ensure_ascii=False).encode()  # raises if no file can hold a text
            if document.get("format") != cls.FORMAT:
                raise InputError(f"its format is not {cls.FORMAT!r}: this release cannot read it")
            if not {"rows", "complete"} & document.keys():
                return None
            found = check_type("manifest", document, cls)
            found.is_sealed = not found.complete or _digest(document) == found.digest
            return found

    def format(self) -> str:
        """Give the text of manifest.json, its mark first."""
        return _format({"format": self.FORMAT, **self.as_dict()})

    def write(self, folder: Path) -> None:
        """Write manifest.json."""
        write_text(folder / MANIFEST, self.format())

    def record_files(self, folder: Path, names: Iterable[str]) -> None:
        """Note bytes and SHA-256 of the files of a finished run, and the digest of all of this."""
        self.files = {name: Written(**describe_file(folder / name)) for name in names}
        self.seal()

    def seal(self) -> None:
        """Note the digest of all of this."""
        self.digest = _digest({"format": self.FORMAT, **self.as_dict()})

    def publish(self, config: str, pushed: Container[str], **changes: Any) -> Self:
        """Give the manifest of the files that are pushed; config.yaml has another text, config."""
        content = config.encode()
        written = Written(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        files = {name: file for name, file in self.files.items() if name in pushed}
        files[CONFIG] = written
        public = replace(self, files=files, **changes)  # type: ignore[type-var]
        public.seal()
        return public


@dataclass(kw_only=True)
class Manifest(ManifestFile):
    """manifest.json of a run."""

    FORMAT = FORMAT
    complete: bool = False  # the run has finished
    state: dict[str, str] = field(default_factory=dict)  # "done" for every stage that is
    rows: int
    labels: list[str]  # of every stratum
    notes: list[str] = field(default_factory=list)  # what a user has to be told, one line each
    problems: dict[str, Problem] = field(default_factory=dict)
    bytes: Sizes
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: list[str] = field(default_factory=list)  # stages that were stopped and went on
    scores: ScoreFacts | None = None
    patches: PatchFacts | None = None
    selection_notes: list[str] = field(default_factory=list)  # those notes that the selection made
    kept: int = 0  # of a finished run
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, Written] = field(default_factory=dict)  # what a finished run wrote
    digest: str | None = None  # SHA-256 of all of this but for how the work went
    is_sealed: bool = field(default=True, init=False, compare=False, repr=False)
    """Whether the digest in the file was right when it was read."""

    def __post_init__(self) -> None:
        kept, n_strata = self.kept if self.complete else 1, len(self.labels)
        if not 1 <= kept <= self.rows or not 1 <= n_strata <= self.rows:
            raise InputError(f"it has {self.rows} rows, {kept} of them kept, in {n_strata} strata")
        if self.complete and self.bytes.source_data is None:
            raise InputError("manifest.bytes has no source_data")
        if self.scores and len(self.scores.rows_a_bin) != 2:
            raise InputError("manifest.scores.rows_a_bin must hold two numbers")
        if self.patches and None in (self.bytes.source_images, self.bytes.stored_images):
            raise InputError("manifest.bytes has no bytes of images")

    def has(self, stage: Stage) -> bool:
        """Say whether a stage is done."""
        return self.state.get(stage) == "done"

    def end_stage(self, stage: Stage, seconds: float, *, is_resumed: bool = False) -> None:
        """Note that a stage is done, and what it took."""
        self.seconds[stage] = round(seconds, 3)
        if is_resumed:
            self.resumed = sorted({*self.resumed, stage})
        self.state[stage] = "done"

    def reopen(self, stages: Iterable[str]) -> None:
        """Make a finished run one that has these stages to do again."""
        for stage in stages:
            self.state.pop(stage, None)
        self.complete, self.files, self.digest = False, {}, None

    def add_notes(self, notes: Iterable[str]) -> None:
        """Add notes that are not there yet."""
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]

    def note_selection(self, notes: list[str]) -> None:
        """Put the notes of a selection in the place of those of the one before."""
        self.notes = [note for note in self.notes if note not in self.selection_notes] + notes
        self.selection_notes = notes

    def draw_again(self, seconds: float, subset_data: int) -> "Manifest":
        """Give the manifest of another draw from the same rows."""
        before = self.bytes
        sizes = Sizes(source_data=before.source_data, source_files=before.source_files)
        sizes.subset_data = subset_data
        return Manifest(
            rows=self.rows,
            labels=self.labels,
            notes=[note for note in self.notes if not note.startswith(AUTO_NOTE)],
            selection_notes=self.selection_notes,
            problems=self.problems,
            scores=self.scores,
            bytes=sizes,
            seconds={"resample": round(seconds, 3)},
        )

    def make_public(
        self, shorten: Callable[[str], str], config: str, pushed: Container[str]
    ) -> "Manifest":
        """Give a manifest of the files that are pushed, without folders; config.yaml is another."""
        notes = [shorten(note) for note in self.notes]
        problems = {shorten(what): found for what, found in self.problems.items()}
        return self.publish(config, pushed, notes=notes, problems=problems)


def write_mark(folder: Path, mark: str = FORMAT) -> None:
    """Write a manifest.json that says no more than that a run works in the folder."""
    write_text(folder / MANIFEST, _format({"format": mark, "state": {}}))


def begin_mark(mark: str) -> bytes:
    """Give how a manifest.json of a format begins, of any release; it is the first file written."""
    return b'{\n  "format": "' + mark.rstrip("0123456789").encode()


def has_mark(path: Path, mark: str = FORMAT) -> bool:
    """Say whether a file is JSON of a format of ours, such as any manifest.json of a run."""
    try:
        document = json.loads(read_text(path, MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):  # an InputError is a ValueError
        return False
    return isinstance(document, dict) and document.get("format") == mark


def _format(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _digest(document: dict[str, Any]) -> str:
    """Hash a manifest, but for how the work went."""
    lasting = {k: v for k, v in document.items() if k not in ("digest", "seconds", "resumed")}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with a document into one line that names the file."""
    what = f"{path} is not the {path.name} of a run"
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: it is no JSON") from error
