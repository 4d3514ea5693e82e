"""The rows that a suite's selections keep, for every draw and keep ratio."""

import json
import time
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from dq_multimodal.config import CompressConfig, InputError, Method, count_kept
from harness.encoders import find_encoder, find_place
from harness.results import digest

if TYPE_CHECKING:
    from dq_multimodal import Run

DRAWN = {"method", "draw", "alpha", "importance", "norm"}
"""Options that need no other bins or scores."""
OWN = {"by_class", "row_list", "where"}
"""Keys of a selection beside the options of `compress`."""
PATCHES = {
    *("drop_ratio", "patch_size", "attribution", "attribution_model", "patch_coding"),
    *("patch_quality", "min_psnr", "fill", "mae_model"),
}
"""Options that change the images and not the rows."""
ENCODED = {"embedding_model", "embedding"}
"""Options that ask for other embeddings than those of the task."""
GIVEN = {
    *("dataset", "split", "config_name", "revision", "modality", "text_columns", "image_column"),
    *("keep_ratio", "seed", "embeddings", "streaming", "field", "image_folder"),
}
"""Options of `compress` that the task and the suite set."""
RUN_RATIO = 0.01
"""Kept by the runs that hold bins and scores; it is not used."""


@dataclass
class Chooser:
    """Chooses rows of one task.

    The bins and scores come from runs of `dq_multimodal.compress` in the work folder, one for all
    selections that differ in their draws and weights only; every draw is the order of the rows that
    `compress` would make with that seed. Scores are made once, so that draws of adq differ by
    their seed alone.

    Attributes:
        dataset: What `compress` takes.
        options: What it takes beside, for the columns and the split.
        selections: Name to options, as in the suite.
        work: Folder of the runs.
        encoder: The `encoder` of the task, or None.
        embeddings: File of ready embeddings, or None.
        numbers: For each row of the dataset its number in row lists, (n,); None if they are equal.
        n_rows: Rows of the dataset.
    """

    dataset: str
    options: dict[str, Any]
    selections: dict[str, dict[str, Any]]
    work: Path
    n_rows: int
    encoder: Any = None
    embeddings: str | None = None
    numbers: np.ndarray | None = None
    _runs: dict[str, "Run"] = field(default_factory=dict)
    _embedded: "Run | None" = None  # whose embeddings are those of all

    def __post_init__(self) -> None:
        known = {f.name for f in fields(CompressConfig)} - GIVEN | OWN
        for name, options in self.selections.items():
            strange = set(options) - known
            if strange or ("method" in options) == ("row_list" in options):
                raise InputError(
                    f"selection {name} must have a method or a row_list, and options of compress "
                    f"beside {', '.join(sorted(GIVEN))}; got {', '.join(options)}"
                )
            if "method" in options and options["method"] not in get_args(Method):
                raise InputError(f"selection {name}: no method {options['method']}")

    def choose(self, name: str, keep: float | str, seed: int) -> dict[str, Any]:
        """Choose rows.

        Args:
            name: The selection.
            keep: Share of the rows, or the name of a row list, as many rows as which are kept.
            seed: Of the draw.

        Returns:
            `rows`, sorted numbers in the dataset; `keep_ratio`; `selection_seconds`, of bins and
            order; `proxy_seconds`, of the encoder, for embeddings and scores (None: not known, as
            where embeddings were ready).
        """
        options = self.selections[name]
        n_kept = len(self.listed(keep)) if isinstance(keep, str) else count_kept(self.n_rows, keep)
        seconds: dict[str, float | None]
        if "row_list" in options:
            order, seconds = self.order_list(name, seed), {"selection": None, "proxy": None}
        else:
            order, seconds = self.order_rows(options, seed)
        if len(order) < n_kept:
            raise InputError(f"{name} has {len(order):,} rows, and {n_kept:,} were to be kept")
        return {
            "rows": np.sort(order[:n_kept]),
            "keep_ratio": n_kept / self.n_rows,
            **{f"{key}_seconds": value for key, value in seconds.items()},
        }

    def order_rows(self, options: dict[str, Any], seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Give all rows in the order of a method, and the seconds of what it needed."""
        from dq_multimodal.core import one_bin, order_rows
        from dq_multimodal.selection import order_by_method, read_scores

        if not options.get("by_class", True):
            if options["method"] != "random":
                raise InputError("by_class false is for random; else give label_column none")
            place = order_rows(one_bin(np.zeros(self.n_rows, dtype=np.int64)), seed=seed)
            return np.argsort(place), {"selection": 0.0, "proxy": 0.0}
        run = self.run_of(options)
        started, found = time.perf_counter(), run.manifest["seconds"]
        drawn = {key: value for key, value in options.items() if key in DRAWN}
        request = replace(run.request, **drawn, seed=seed)
        place = order_by_method(run.bins, request, read_scores(run.path), run.unreadable)
        seconds = {"selection": found["selection"] + time.perf_counter() - started, "proxy": 0.0}
        if options["method"] != "random":
            encoded = run if ENCODED & set(options) else self._embedded
            spent = encoded.manifest["seconds"]["embeddings"] if encoded else None
            of_scores = found.get("scores", 0) if options["method"] == "adq" else 0
            seconds["proxy"] = None if spent is None else spent + of_scores
        return np.argsort(place), seconds

    def run_of(self, options: dict[str, Any]) -> "Run":
        """Give the run that holds the bins, and for adq the scores, of a selection.

        The run of adq, if there is one, is made first: it embeds and scores in one pass over the
        encoder, and the others take its embeddings.
        """
        key, is_random = self.key_of(options), options["method"] == "random"
        if key not in self._runs:
            if is_random or ENCODED & set(options):
                self.make_run(options)
            else:
                if self.ready is None:
                    self._embedded = self.make_run(self.widest)
                if key not in self._runs:
                    self.make_run(options)
        return self._runs[key]

    @cached_property
    def widest(self) -> dict[str, Any]:
        """The selection whose run makes the embeddings of all."""
        listed = [o for o in self.selections.values() if "method" in o and not ENCODED & set(o)]
        encoded = [o for o in listed if o["method"] != "random"]
        return next((o for o in encoded if o["method"] == "adq"), encoded[0])

    @property
    def ready(self) -> str | None:
        """File of the embeddings, if there is one by now."""
        if self.embeddings is None and self._embedded is not None:
            return str(self._embedded.path / "embeddings.npy")
        return self.embeddings

    def key_of(self, options: dict[str, Any]) -> str:
        """Tell apart what needs a run of its own."""
        from dq_multimodal.selection import bins_kind

        fixed = {k: v for k, v in options.items() if k not in DRAWN | PATCHES}
        return digest(bins_kind(options["method"]), fixed, self.options, self.encoder)

    def make_run(self, options: dict[str, Any]) -> "Run":
        """Compress the dataset for the bins and scores of all selections of one key."""
        from dq_multimodal import compress

        key = self.key_of(options)
        alike = [o for o in self.selections.values() if "method" in o and self.key_of(o) == key]
        method = "adq" if any(o["method"] == "adq" for o in alike) else options["method"]
        fixed = {k: v for k, v in options.items() if k not in DRAWN | OWN | PATCHES}
        self._runs[key] = compress(
            self.dataset,
            **(self.options | fixed | self.encoding(options)),
            method=method,
            keep_ratio=max(RUN_RATIO, 1 / self.n_rows),
            report=False,
            output_dir=self.work / f"{method}-{key}",
        )
        return self._runs[key]

    def encoding(self, options: dict[str, Any]) -> dict[str, Any]:
        """Give the options that say what embeds the rows of a selection."""
        if options["method"] == "random":
            return {}
        if not ENCODED & set(options):
            return {"embeddings": self.ready, "embedding_model": self.encoder_place}
        if "embedding_model" in options:
            return {"embedding_model": find_encoder(options["embedding_model"], self.work)}
        return {"embedding_model": self.encoder_place}

    def drop_patches(self, name: str, keep_ratio: float, seed: int) -> "Run":
        """Compress the dataset with dropped patches; it keeps the rows that `choose` gives.

        Places of models in the options are found as the encoder is.
        """
        from dq_multimodal import compress

        options = {k: v for k, v in self.selections[name].items() if k not in OWN}
        models = ("attribution_model", "mae_model")
        options |= {key: find_place(options[key]) for key in models if key in options}
        options |= self.encoding(options)
        options |= {"keep_ratio": keep_ratio, "seed": seed, "report": False}
        folder = self.work / f"patches-{digest(self.selections[name], keep_ratio, seed)}"
        return compress(self.dataset, **(self.options | options), output_dir=folder)

    @cached_property
    def encoder_place(self) -> str | None:
        """What embeds the rows."""
        return None if self.encoder is None else find_encoder(self.encoder, self.work)

    def order_list(self, name: str, seed: int) -> np.ndarray:
        """Give the rows of a list in the order of their hashes."""
        from dq_multimodal.core.hashing import hash_numbers

        rows = self.listed(name)
        return rows[np.argsort(hash_numbers(seed, rows.astype(np.uint64)), kind="stable")]

    def listed(self, name: str) -> np.ndarray:
        """Read a row list, and give those of its rows that the dataset has."""
        listed = read_row_list(name, self.selections[name])
        if self.numbers is None:
            if listed.max() >= self.n_rows:
                raise InputError(f"{name} has row {listed.max():,} of {self.n_rows:,} rows")
            return listed
        return np.flatnonzero(np.isin(self.numbers, listed))


def read_row_list(name: str, options: dict[str, Any]) -> np.ndarray:
    """Read the numbers of kept rows that somebody published.

    `row_list` is the place of a .npy file, or of a .json file that holds a list of numbers, or
    records (in a list, or by name) with their list under `indices`, of which `where` names the
    fields of the right one.

    Raises:
        InputError: If there is no such list, or a number is negative or there twice.
    """
    path = Path(find_place(options["row_list"]))
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                found = list(found.values())
            if "where" in options:
                wanted = options["where"].items()
                fitting = [record for record in found if all(record.get(k) == v for k, v in wanted)]
                if len(fitting) != 1:
                    raise InputError(
                        f"{name}: {len(fitting)} records of {path} fit where, wanted 1"
                    )
                found = fitting[0]["indices"]
        rows = np.sort(np.asarray(found).ravel())
        is_good = rows.dtype.kind in "iu" and len(rows) > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: cannot read {path}: {error}") from None
    if not is_good or rows[0] < 0 or (np.diff(rows) == 0).any():
        raise InputError(f"{name}: {path} must hold different row numbers, from 0")
    return rows.astype(np.int64)
