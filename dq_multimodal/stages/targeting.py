"""A target: some rows that the model shall be good at, and the rows that are picked for them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.choice import choose_adapter
from dq_multimodal.adapters.image_text import ImageTextAdapter, raise_threshold, text_half
from dq_multimodal.adapters.text import TextAdapter
from dq_multimodal.config import CompressConfig, InputError, Modality
from dq_multimodal.core.target import pick_for_targets
from dq_multimodal.data.columns import NO_LABEL
from dq_multimodal.data.repeats import digest_rows
from dq_multimodal.data.row_sizes import BLOCK_BYTES
from dq_multimodal.data.source import Source, load_source
from dq_multimodal.files import name_some, write_text
from dq_multimodal.manifest import Target as TargetFacts
from dq_multimodal.manifest import make
from dq_multimodal.models.language import (
    CUT,
    N_PROJECTED,
    Gradients,
    HiddenStates,
    LanguageModel,
    LanguageRows,
    find_language_model,
    lora_layers,
    make_signs,
    warm_up,
)
from dq_multimodal.stages import embedding

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "target"
"""What a run keeps of its target."""
PICKS = "picks.json"
ROWS, LM_ROWS, LM_SOURCE, WARM_UP = "rows", "model_rows", "model_source", "warm_up"
WARM_UP_FILE = "lora.safetensors"
WHOLE_PATTERN = (
    rf"({PICKS}(\.tmp)?|{WARM_UP}(/{WARM_UP_FILE}(\.partial)?)?|({ROWS}|{LM_ROWS}|{LM_SOURCE})"
    rf"(/({embedding.FILE}(\{embedding.PARTIAL})?|{embedding.PROGRESS}(\.tmp)?))?)"
)
"""Files and folders that may lie in it."""
FEWEST, MOST = 20, 1000
"""Rows that a target should have, and may have."""
NEAR = 0.95
"""Cosine from which a row of the source is near a target row."""
N_NEAREST = 8
"""Picks of a target row that are written down for the report."""
MAX_LISTED = 1000
TEXT_CHARACTERS = 400
HIDDEN_BATCH, GRADIENT_BATCH = 32, 16


@dataclass(frozen=True)
class Target:
    """The rows that the model shall be good at, what reads and embeds them, notes for the user."""

    source: Source
    adapter: Adapter
    notes: list[str]


class Leaks(NamedTuple):
    """Rows of the source that the target holds too, or nearly.

    Attributes:
        row: Row numbers of the source, ascending.
        target: The target row that it equals, else the nearest.
        cosine: Their cosine, NaN where nothing was compared.
        is_equal: Whether text (but for white space) or image file are the same.
    """

    row: Int[ndarray, " k"]
    target: Int[ndarray, " k"]
    cosine: Float[ndarray, " k"]
    is_equal: Bool[ndarray, " k"]


class Picks(NamedTuple):
    """Place of each row in the targeted order, target row that it is for (-1: neither), notes."""

    rank: Int[ndarray, " n"]
    row: Int[ndarray, " n"]
    notes: list[str]


def load_target(request: CompressConfig, adapter: Adapter | None) -> Target:
    """Load the target of a request: a file, a folder or a Hub id.

    Its text columns are those named for it, or those named for the source (which the adapter reads)
    where it has them too, or found as those of a source are.

    Raises:
        InputError: If it cannot be loaded, has no or too many rows, or holds nothing to compare.
    """
    name = str(request.target)
    if request.image_embedding == "gradients":
        raise InputError("target is for plain embeddings, and embedding is gradients")
    if request.target_model is not None and not isinstance(adapter, TextAdapter):
        raise InputError("target_model reads text, and the rows of the source are none")
    source = load_source(name, split=request.target_split, config_name=request.target_config)
    n_rows, columns = len(source.dataset), source.dataset.column_names
    if n_rows > MOST:
        raise InputError(
            f"a target of {FEWEST} to {MOST:,} rows is wanted, and {name} has {n_rows:,} in split "
            f'{request.target_split!r}: name fewer, such as --target-split "train[:{MOST // 2}]"'
        )
    texts, text = request.target_columns, text_half(adapter)
    if texts is None and text is not None and text.layout.shape == "columns":
        texts = text.layout.columns if set(text.layout.columns) <= set(columns) else None
    modality: Modality = "text" if texts else "auto"
    if adapter is not None:
        modality = adapter.describe()["modality"]
    asked = CompressConfig(
        name,
        method="dq",
        modality=modality,
        text_columns=texts,
        image_column=request.image_column if request.image_column in columns else None,
        label_column=NO_LABEL,
        embedding_model=request.embedding_model,
        text_share=request.text_share,
    )
    try:
        own = choose_adapter(source.dataset, asked)
    except InputError as error:
        message = str(error).replace("--text-columns", "--target-columns")
        raise InputError(f"target {name}: {message}") from error
    if own is None or not own.lengths().any():
        raise InputError(f"no row of the target {name} has anything to embed")
    notes = []
    if n_rows < FEWEST:
        noun = "row" if n_rows == 1 else "rows"
        notes.append(f"a target of {n_rows} {noun} says little: {FEWEST} to {MOST:,} are wanted")
    return Target(source, own, notes)


def describe_target(target: Target, request: CompressConfig) -> TargetFacts:
    """Say what the target is and how rows are compared with it, as config.yaml records it.

    Raises:
        InputError: If the language model cannot be found.
    """
    kind, model = "embeddings", None
    if request.target_model is not None:
        kind = "gradients" if request.target_gradients else "hidden states"
        model = find_language_model(request.target_model)
    facts = {"source": target.source.origin, "rows": target.adapter.describe()}
    return make(TargetFacts, {**facts, "by": kind, "model": model})


def pick_targets(
    folder: Path,
    dataset: "Dataset",
    adapter: Adapter | None,
    embeddings: Float[ndarray, "n d"] | None,
    target: Target,
    request: CompressConfig,
) -> Picks:
    """Order rows by the target: every target row in turn takes its next nearest row.

    What is embedded lies in folder/target, where an interrupted run goes on. Embeddings of the
    source may be None where a language model compares the rows.

    Raises:
        InputError: If ready embeddings are not of the size that the encoder gives.
    """
    work = folder / FOLDER
    (work / ROWS).mkdir(parents=True, exist_ok=True)
    is_alike = embeddings is not None and (
        request.ready_embeddings is None or request.target_model is None
    )  # ready embeddings may be of another encoder
    rows = targets = None
    if embeddings is not None and is_alike:
        rows, targets = embeddings, _embed_target(work / ROWS, embeddings, target, request)
    notes = list(target.notes)
    leaks = find_leaks(adapter, target, rows, targets)
    if request.target_model is not None and isinstance(adapter, TextAdapter):
        rows, targets, more = _embed_by_model(work, dataset, adapter, target, request)
        notes += more
    if rows is None or targets is None:
        raise InputError("a target needs the embeddings of the rows, or a target_model")
    n_blank = int((~targets.any(axis=1)).sum())
    if n_blank == len(targets):
        raise InputError(f"no row of the target {target.source.origin['name']} can be compared")
    if n_blank:
        notes.append(f"{n_blank:,} of {len(targets):,} target rows have nothing to compare")
    rank, row = pick_for_targets(rows, targets)
    _write_picks(work / PICKS, target, rows, targets, rank, row, leaks)
    return Picks(rank, row, notes + note_leaks(leaks, len(targets)))


def forget_vectors(folder: Path) -> None:
    """Remove from a finished run what only the picks needed; picks.json stays."""
    for name in (ROWS, LM_ROWS, LM_SOURCE, WARM_UP):
        shutil.rmtree(folder / FOLDER / name, ignore_errors=True)


def _embed_target(
    work: Path, embeddings: Float[ndarray, "n d"], target: Target, request: CompressConfig
) -> Float[ndarray, "t d"]:
    """Embed the target rows with the encoder of the run."""
    size, wanted = target.adapter.dimension, embeddings.shape[1]
    if size != wanted:
        model = target.adapter.describe_model().get("model") or "their pair of models"
        raise InputError(
            f"the embeddings of the rows have {wanted} numbers, and {model}, which embeds the "
            f"target, gives {size}: name their encoder as --embedding-model"
        )
    embedding.embed_rows(target.adapter, work, request.batch_size, name="embed target")
    return np.array(embedding.open_embeddings(work))


def _embed_by_model(
    work: Path, dataset: "Dataset", adapter: TextAdapter, target: Target, request: CompressConfig
) -> tuple[Float[ndarray, "n d"], Float[ndarray, "t d"], list[str]]:
    """Embed rows and target by the hidden states or the gradients of the language model."""
    own = target.adapter
    if request.target_model is None or not isinstance(own, TextAdapter):
        raise InputError("target_model reads text, and the rows of the target are none")
    model = LanguageModel(request.target_model, request.device, request.dtype)
    read: Callable[..., HiddenStates | Gradients] = HiddenStates
    size, name = HIDDEN_BATCH, "hidden states"
    if request.target_gradients:
        (work / WARM_UP).mkdir(exist_ok=True)
        tokens = LanguageRows(dataset, adapter, model, ends_rows=True)
        warm_up(model, tokens, request.seed, work / WARM_UP / WARM_UP_FILE)
        n_weights = sum(layer.weight.numel() for layer in lora_layers(model.net))
        read = partial(Gradients, signs=make_signs(n_weights, N_PROJECTED, request.seed))
        size, name = GRADIENT_BATCH, "gradients"
    found, notes = [], []
    for who, place, part in (
        ("target rows", work / LM_ROWS, read(target.source.dataset, own, model)),
        ("rows", work / LM_SOURCE, read(dataset, adapter, model)),
    ):
        place.mkdir(exist_ok=True)
        embedding.embed_rows(part, place, min(size, request.batch_size), name=f"{name} of {who}")
        found.append(embedding.open_embeddings(place))
        if n_cut := len(part.problems.get(CUT, [])):
            notes.append(f"{n_cut:,} of {len(found[-1]):,} {who} have {CUT}")
    return found[1], np.array(found[0]), notes


def find_leaks(
    adapter: Adapter | None,
    target: Target,
    embeddings: Float[ndarray, "n d"] | None = None,
    targets: Float[ndarray, "t d"] | None = None,
) -> Leaks:
    """Find the rows of the source that the target holds too, and those near it.

    A model trained on them has seen what it is tested on. Equal are texts that differ in white
    space only, and images of the same file, where an adapter reads them; near is a cosine of at
    least `NEAR`, of both halves if rows have two, where there are embeddings of both.
    """
    same: dict[int, int] = {}
    if adapter is not None and type(adapter) is type(target.adapter):
        known: dict[bytes, int] = {}
        for row, digest in digest_rows(target.adapter):
            known.setdefault(digest, row)
        found_in = digest_rows(adapter)
        same = {row: known[digest] for row, digest in found_in if digest in known}
    n_rows = 1 + max(same, default=-1) if embeddings is None else len(embeddings)
    equal, cosine = np.full(n_rows, -1), np.full(n_rows, np.nan)
    equal[[*same]] = [*same.values()]
    near = equal.copy()
    if embeddings is not None and targets is not None:
        near_enough = NEAR
        if isinstance(target.adapter, ImageTextAdapter) and not target.adapter.is_joint:
            near_enough = raise_threshold(NEAR, target.adapter.text_share)
        directions = _unit(np.asarray(targets, dtype=np.float32))
        step = max(1, BLOCK_BYTES // (4 * max(embeddings.shape[1], len(targets))))
        for start in range(0, len(embeddings), step):
            span = slice(start, start + step)
            cosines = _unit(np.asarray(embeddings[span], dtype=np.float32)) @ directions.T
            nearest = np.where(equal[span] < 0, cosines.argmax(axis=1), equal[span])
            found = cosines[np.arange(len(cosines)), nearest]
            is_one = (equal[span] >= 0) | (found >= near_enough)
            near[span], cosine[span] = np.where(is_one, nearest, -1), found
    rows = np.flatnonzero(near >= 0)
    return Leaks(rows, near[rows], cosine[rows], equal[rows] >= 0)


def _unit(rows: Float[ndarray, "k d"]) -> Float[ndarray, "k d"]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def note_leaks(leaks: Leaks, n_targets: int) -> list[str]:
    """Say how many rows of the source the target holds too, and how many are near it."""
    notes = []
    kinds = (
        (leaks.is_equal, "equal to", "equals"),
        (~leaks.is_equal, f"near (cosine of at least {NEAR})", f"is near (cosine >= {NEAR})"),
    )
    for is_one, many, one in kinds:
        rows = leaks.row[is_one].tolist()
        if not rows:
            continue
        what = f"rows of the source are {many}" if len(rows) > 1 else f"row of the source {one}"
        n_hit = len(np.unique(leaks.target[is_one]))
        notes.append(
            f"WARNING: {len(rows):,} {what} {n_hit:,} of the {n_targets:,} target rows, and may "
            "be picked: do not test on these target rows "
            f"(row{'s' * (len(rows) > 1)} {name_some(rows)})"
        )
    return notes


def _write_picks(
    path: Path,
    target: Target,
    rows: Float[ndarray, "n d"],
    targets: Float[ndarray, "t d"],
    rank: Int[ndarray, " n"],
    row: Int[ndarray, " n"],
    leaks: Leaks,
) -> None:
    """Write down what the report shows: texts of the target rows, and their first picks."""
    texts = [""] * len(targets)
    if (half := text_half(target.adapter)) is not None:
        texts = half.texts(np.arange(len(targets)))
    by_target = np.lexsort((rank, row))[int((rank < 0).sum()) :]
    edges = np.searchsorted(row[by_target], np.arange(len(targets) + 1))
    found = []
    for number, text in enumerate(texts):
        first = by_target[edges[number] : edges[number + 1]][:N_NEAREST]
        near = np.asarray(rows[np.sort(first)], dtype=np.float32)[np.argsort(np.argsort(first))]
        cosines = _unit(near) @ _unit(targets[number : number + 1])[0]
        picks = [[int(k), round(float(c), 4)] for k, c in zip(first, cosines, strict=True)]
        found.append({"text": text[:TEXT_CHARACTERS], "picks": picks})
    listed = [
        [int(k), int(t), None if np.isnan(c) else round(float(c), 4), bool(e)]
        for k, t, c, e in list(zip(*leaks, strict=True))[:MAX_LISTED]
    ]
    document = {"targets": found, "n_leaks": len(leaks.row), "leaks": listed}
    write_text(path, json.dumps(document, ensure_ascii=False))
