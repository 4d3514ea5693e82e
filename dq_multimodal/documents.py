"""config.yaml and manifest.json of a run: what they hold, read with care whoever wrote them."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import yaml

from dq_multimodal.config import CompressConfig, InputError, check_type
from dq_multimodal.files import read_text

FORMAT = "dq-multimodal run 1"
"""By this a manifest.json is known as one of ours."""
SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Makes plain values only, as yaml.safe_load does, and where it is compiled much faster."""
MAX_CONFIG_BYTES = 1_000_000
MAX_MANIFEST_BYTES = 100_000_000
"""It holds the label of every stratum."""
MAX_VALUE = 10_000
"""Characters of a value. YAML has numbers to base 60, and a long one takes minutes to read."""
MAX_DEPTH = 20
"""Ours have five levels; readers of YAML and JSON go one call deeper for every level."""


class SourceFile(TypedDict):
    """A file of the source."""

    name: str
    bytes: int
    sha256: str


class Origin(TypedDict):
    """Where the rows are from, and what pins them."""

    kind: Literal["file", "folder", "hub", "memory"]
    name: str
    split: str
    rows: int
    path: NotRequired[str | None]
    files: NotRequired[list[SourceFile]]
    config_name: NotRequired[str | None]
    revision: NotRequired[str | None]
    fingerprint: NotRequired[str | None]
    field: NotRequired[str | None]
    separator: NotRequired[str | None]
    names: NotRequired[str | None]
    image_folder: NotRequired[str | None]
    image_files: NotRequired[str | None]


class Columns(TypedDict):
    """Which columns are embedded, and how."""

    modality: Literal["text", "image"]
    shape: str
    columns: list[str]
    template: NotRequired[str]


class Model(TypedDict, total=False):
    """What embeds or scores; for ready embeddings, a file or a column."""

    model: str
    revision: str | None
    file: str
    column: str
    dimension: int
    sha256_of_float32: str
    factors: list[int] | None


class Patches(TypedDict):
    """How patches are dropped."""

    patch_size: int
    fill: str
    attribution_model: Model | None


class Config(TypedDict):
    """config.yaml."""

    request: dict[str, Any]
    source: Origin
    rows: Columns | None
    label_column: str | None
    embedding: Model | None
    bins: Literal["dq", "graphcut", "coverage", "blocks", "none"]
    dynamics: NotRequired[str | None]
    target: NotRequired[dict[str, Any]]
    scoring: NotRequired[Model]
    patches: NotRequired[Patches]
    model_folders: NotRequired[dict[str, str | None]]


class Problem(TypedDict):
    """Rows with something odd."""

    count: int
    rows: list[int]


class Sizes(TypedDict):
    """Bytes of source and subset."""

    source_data: int | None
    source_files: int | None
    subset_data: NotRequired[int]
    subset_files: NotRequired[int]
    source_images: NotRequired[int]
    stored_images: NotRequired[int]


class ScoreFacts(TypedDict):
    """Which rows the scores of the bins come from."""

    rows: int
    rows_a_bin: list[int]
    all_rows: bool


class Decibels(TypedDict):
    """A summary of PSNRs."""

    mean: float | None
    lowest: float | None


class Answers(TypedDict):
    """How often the classifier changed its answer."""

    compared: int
    changed: int


class PatchFacts(TypedDict):
    """What dropping patches did."""

    fill: str
    images: int
    coded: int
    originals: dict[str, int]
    kept_share: float
    psnr_of_holes: Decibels
    psnr_of_kept: Decibels
    answers: Answers


class Written(TypedDict):
    """A file that a run wrote."""

    bytes: int
    sha256: str


class Begun(TypedDict, total=False):
    """manifest.json of a run that has not got its rows yet."""

    format: str
    complete: bool
    state: dict[str, str]
    resumed: list[str]
    files: dict[str, Written]
    digest: str


class Manifest(Begun):
    """manifest.json of a run on its way."""

    rows: int
    labels: list[str]
    notes: list[str]
    problems: dict[str, Problem]
    bytes: Sizes
    seconds: dict[str, float]
    scores: NotRequired[ScoreFacts | None]
    patches: NotRequired[PatchFacts | None]


class FinishedSizes(TypedDict):
    """Bytes of source and subset of a finished run."""

    source_data: int
    source_files: int | None
    subset_data: int
    subset_files: int


class Finished(Manifest):
    """manifest.json of a finished run."""

    kept: int
    versions: dict[str, str]


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.yaml.

    Raises:
        InputError: If it cannot be read, is too large, has what ours do not (anchors, tags,
            deep nesting, very long values), lacks something, or holds a value of another type or
            out of range.
    """
    with _reading(path):
        text = read_text(path, MAX_CONFIG_BYTES)
        depth = 0
        for event in yaml.parse(text, Loader=SAFE_LOADER):
            if getattr(event, "anchor", None) is not None:
                raise InputError("it has YAML anchors")
            if getattr(event, "tag", None) is not None:
                raise InputError("it has YAML tags")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise InputError(f"it is nested more than {MAX_DEPTH} deep")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_VALUE:
                raise InputError(f"it has a value of more than {MAX_VALUE:,} characters")
        document = yaml.load(text, Loader=SAFE_LOADER)
        check_type("config", document, Config)
        if (document["rows"] or {}).get("modality") == "image":  # as releases without it did
            document["request"].setdefault("keep_unreadable", True)
        request = CompressConfig.from_dict(document["request"])
        if request.drop_ratio and "patches" not in document:
            raise InputError("it has no patches")
        document["request"] = request.as_dict()  # with settings that older runs do not name
    return document


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.json; an empty one where there is none.

    Raises:
        InputError: If it cannot be read, is too large, lacks something, or holds a value of
            another type or out of range.
    """
    with _reading(path):
        try:
            text = read_text(path, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return {}
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False).encode()  # raises for text that no file can hold
        check_type("manifest", document, Begun)
        if document.get("format", FORMAT) != FORMAT:
            raise InputError(f"its format is not {FORMAT!r}")
        if "rows" in document or "complete" in document:
            check_type("manifest", document, Manifest)
            _check_counts(document)
    return document


def _check_counts(manifest: dict[str, Any]) -> None:
    """Raise unless the numbers of a manifest can be those of a run."""
    rows, kept, n_strata = manifest["rows"], 1, len(manifest["labels"])
    if manifest.get("complete"):
        check_type("manifest", manifest, Finished)
        check_type("manifest.bytes", manifest["bytes"], FinishedSizes)
        kept = manifest["kept"]
    if not 1 <= kept <= rows or not 1 <= n_strata <= rows:
        raise InputError(f"it has {rows} rows, {kept} of them kept, in {n_strata} strata")
    scores, sizes = manifest.get("scores"), manifest["bytes"]
    if scores and len(scores["rows_a_bin"]) != 2:
        raise InputError("manifest.scores.rows_a_bin must hold two numbers")
    if manifest.get("patches") and not {"source_images", "stored_images"} <= sizes.keys():
        raise InputError("manifest.bytes has no bytes of images")


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
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # as of a date
        raise InputError(f"{what}: it is no {'YAML' if path.suffix == '.yaml' else 'JSON'}") from (
            error
        )


def has_mark(path: Path) -> bool:
    """Say whether a file is the manifest.json of a run of this release, whole or not."""
    try:
        document = json.loads(read_text(path, MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT


def describe_file(path: Path) -> dict[str, Any]:
    """Give what a manifest records of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def is_sealed(manifest: dict[str, Any]) -> bool:
    """Say whether a manifest of a finished run holds what was written; older ones cannot tell."""
    return not {"format", "files", "digest"} & manifest.keys() or seal(manifest) == manifest


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Give a manifest with the digest of all else that it holds, but for how the work went."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    lasting = {key: value for key, value in rest.items() if key not in ("seconds", "resumed")}
    text = json.dumps(lasting, sort_keys=True)
    return {**rest, "digest": hashlib.sha256(text.encode()).hexdigest()}
