"""The rows that a suite's selections keep, for every draw and keep ratio."""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from dq_multimodal.adapters.image_text import join_halves
from dq_multimodal.config import (
    TEXT_SHARE,
    CompressConfig,
    InputError,
    Method,
    check_choice,
    count_kept,
)
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.files import put_in_place
from dq_multimodal.training.weights import UseWeights
from harness.condensed import check_condensed, make_sets, read_set, request_of
from harness.encoders import find_encoder, find_place
from harness.results import digest
from harness.suite import images_of

if TYPE_CHECKING:
    from dq_multimodal import Run

DRAWN = {"method", "draw", "alpha", "importance", "norm", "target_share"}
"""Options that need no other bins, scores or marks of rows."""
KINDS = ("method", "row_list", "by_length", "condense")
"""Keys of which a selection has one: how it chooses."""
OWN = {"by_class", "where", "use_weights", "text_share", "same_bytes_as", *KINDS[1:3]}
"""Keys of a selection beside the options of `compress`."""
PLACES = ("dynamics", "target", "target_model")
"""Options that are places, found as the encoder is."""
TASK_TARGET = "task"
"""As `target`: the target rows of the task."""
PATCHES = {
    *("drop_ratio", "patch_size", "attribution", "attribution_model", "patch_coding"),
    *("patch_quality", "min_psnr", "fill", "mae_model"),
}
"""Options that change the images and not the rows."""
ENCODED = {"embedding_model", "image_embedding"}
"""Options that ask for other embeddings than those of the task."""
BOTH = "image-text"
"""The kind of tasks whose selections may have a modality, and a text_share, of their own."""
GIVEN = {
    *("dataset", "split", "config_name", "revision", "modality", "text_columns", "image_column"),
    *("keep_ratio", "keep_rows", "seed", "ready_embeddings", "streaming", "field", "image_folder"),
}
"""Options of `compress` that the task and the suite set."""
RUN_RATIO = 0.01
"""Kept by the runs that hold bins and scores; it is not used."""


def check_selections(
    selections: dict[str, dict[str, Any]], has_target: bool = False, kind: str = "image"
) -> None:
    """Raise unless every selection has one way to choose, and options that there are."""
    known = set(CompressConfig.recorded()) - GIVEN | OWN
    known = known | {"modality"} if kind == BOTH else known - {"text_share"}
    for name, options in selections.items():
        if "condense" in options:
            check_condensed(name, options)
            continue
        if set(options) - known or sum(key in options for key in KINDS) != 1:
            raise InputError(
                f"selection {name} must have a method or a row_list or by_length (or condense), "
                f"and options of compress beside {', '.join(sorted(GIVEN))}; got "
                f"{', '.join(options)}"
            )
        check_choice("use_weights", options.get("use_weights", "loss"), UseWeights)
        if options.get("target") == TASK_TARGET and not has_target:
            raise InputError(f"selection {name}: the task has no target")
        if "method" in options and options["method"] not in get_args(Method):
            raise InputError(f"selection {name}: no method {options['method']}")
        if (other := options.get("same_bytes_as")) is not None and other not in selections:
            raise InputError(f"selection {name}: no selection {other} to take no more bytes than")


class Chooser:
    """Chooses rows of one task (see `harness.prepare.Task`).

    The bins and scores come from runs of `dq_multimodal.compress` in the work folder, one for all
    selections that differ in their draws and weights only; every draw is the order of the rows that
    `compress` would make with that seed. Scores are made once, so that draws of adq differ by
    their seed alone.
    """

    def __init__(self, task: Any) -> None:
        self.task = task
        spec, self.work, self.dataset, self.n_rows = task.spec, task.work, task.place, task.n_rows
        self.encoder, self.encoder_place = spec.get("encoder"), task.encoder
        self.embeddings, self.numbers, self.target = task.embeddings, task.numbers, task.target
        self.options = {**task.which, **task.columns, "modality": spec["kind"]}
        every = task.suite.selections
        used = {name for cell in task.cells for name in (cell.selection, cell.keep)}
        used |= {every[name].get("same_bytes_as") for name in used if name in every}
        hidden = {"label_column": "none"} if spec.get("unlabelled") else {}
        self.selections = {
            name: (hidden if "method" in options else {}) | options
            for name, options in every.items()
            if name in used
        }
        self._runs: dict[str, Run] = {}
        self._embedded: Run | None = None  # whose embeddings are those of all
        check_selections(self.selections, bool(self.target), spec["kind"])

    def choose(self, name: str, keep: float | str, draw: int) -> dict[str, Any]:
        """Choose rows.

        Args:
            name: The selection.
            keep: Share of the rows, or the name of a row list, as many rows as which are kept, or
                a number of images a class.
            draw: Number of the draw.

        Returns:
            `rows`, sorted numbers in the dataset; `weights` of them, mean 1, or None, and
            `use_weights`; `keep_ratio`, that of the size that was asked for; `selection_seconds`,
            of bins and order; `proxy_seconds`, of the encoder, for embeddings and scores (None: not
            known, as where embeddings were ready, or beside training dynamics or target models,
            which were made elsewhere). Of a condensed set there are no rows, but `added`, the
            images, `bytes`, `is_soft` and `condensed`, the settings that made it.
        """
        options, n_kept = self.selections[name], self.count_rows(keep)
        found = {"weights": None, "use_weights": "none", "keep_ratio": n_kept / self.n_rows}
        if "condense" in options:
            return found | self.read_condensed(options, keep, draw)
        seed = self.task.suite.draw_seed(name, draw)
        order, weights, seconds = self.order(name, seed, n_kept)
        if other := options.get("same_bytes_as"):
            room, n_kept = self.count_bytes(other, keep, draw), 0
            while (n_fit := self.count_fitting(order, room)) != n_kept:
                n_kept = min(n_fit, n_kept or n_fit)  # the order may go by the number
                order, weights, seconds = self.order(name, seed, n_kept)
        if len(order) < n_kept:
            raise InputError(f"{name} has {len(order):,} rows, and {n_kept:,} were to be kept")
        rows, use = np.sort(order[:n_kept]), options.get("use_weights", "loss")
        if weights is not None and use != "none":
            found |= {"weights": weights[rows], "use_weights": use}
        return found | {
            "rows": rows,
            "selection_seconds": seconds[0],
            "proxy_seconds": seconds[1],
        }

    def count_rows(self, keep: float | str) -> int:
        """Give the number of rows that a size stands for."""
        if (n_images := images_of(keep)) is not None:
            if not self.task.n_classes:
                raise InputError(f"task {self.task.name}: {keep}, and there are no classes")
            return n_images * self.task.n_classes
        return len(self.listed(keep)) if isinstance(keep, str) else count_kept(self.n_rows, keep)

    def count_bytes(self, name: str, keep: float | str, draw: int) -> int:
        """Give the bytes of the images of a selection."""
        found = self.choose(name, keep, draw)
        size = found["bytes"] if "bytes" in found else self.task.count_bytes(found["rows"])
        if size is None:
            raise InputError(f"task {self.task.name}: the bytes of its images are not known")
        return size

    def count_fitting(self, order: np.ndarray, room: int) -> int:
        """Give how many of the first rows have together no more than so many bytes."""
        n_fit = int(np.searchsorted(np.cumsum(self.task.sizes[order]), room, side="right"))
        if not n_fit:
            raise InputError(f"task {self.task.name}: no image has only {room:,} bytes")
        return n_fit

    def order(self, name: str, seed: int, n_kept: int) -> tuple[Any, ...]:
        """Give the rows in the order of a selection, their weights, and the seconds it needed."""
        options = self.selections[name]
        if "row_list" in options:
            listed = self.listed(name)
            order = listed[np.argsort(hash_numbers(seed, listed.astype(np.uint64)), kind="stable")]
            return order, None, (None, None)
        if options.get("by_length"):
            return self.order_by_length(), None, (None, None)
        return self.order_rows(options, seed, n_kept)

    def condense_all(self, asked: Iterable[tuple[str, float | str, int]]) -> None:
        """Make the condensed sets of some (selection, size, draw) that are not there yet."""
        requests = [
            self.request_condensed(self.selections[name], keep, draw)
            for name, keep, draw in asked
            if "condense" in self.selections[name]
        ]
        make_sets(self.work, list({digest(request): request for request in requests}.values()))

    def request_condensed(
        self, options: dict[str, Any], keep: float | str, draw: int
    ) -> dict[str, Any]:
        """Give what is asked of `condense`."""
        spec, names = self.task.spec, ("image_column", "label_column", "image_size")
        source = {"dataset": self.dataset} | self.task.which
        source |= {key: spec[key] for key in names if key in spec}
        return request_of(options, images_of(keep) or 0, draw, source)

    def read_condensed(
        self, options: dict[str, Any], keep: float | str, draw: int
    ) -> dict[str, Any]:
        """Give the first images of each class of a condensed set: see `choose`."""
        request = self.request_condensed(options, keep, draw)
        return read_set(self.task, self.work, request, images_of(keep), options.get("use_soft"))

    def order_rows(
        self, options: dict[str, Any], seed: int, n_kept: int
    ) -> tuple[np.ndarray, np.ndarray | None, tuple[float | None, float | None]]:
        """Give all rows in the order of a method, their weights, and the seconds it needed."""
        from dq_multimodal.core import one_bin, order_rows
        from dq_multimodal.stages.ordering import order_by_method, weigh_rows
        from dq_multimodal.stages.selection import read_scores

        if not options.get("by_class", True):
            if options["method"] != "random":
                raise InputError("by_class false is for random; else give label_column none")
            place = order_rows(one_bin(np.zeros(self.n_rows, dtype=np.int64)), seed=seed)
            return np.argsort(place), None, (0.0, 0.0)
        run = self.run_of(options)
        started, found = time.perf_counter(), run.manifest.seconds
        drawn = {key: value for key, value in options.items() if key in DRAWN}
        request = replace(run.request, **drawn, seed=seed, keep_ratio=n_kept / self.n_rows)
        place = order_by_method(run.bins, request, read_scores(run.path), run.marks)
        weights = weigh_rows(run.bins, request, run.marks, place < n_kept)
        selection, proxy = found["selection"] + time.perf_counter() - started, 0.0
        if set(PLACES) & set(options):
            proxy = None
        elif self.is_embedded(options):
            encoded = run if ENCODED & set(options) else self._embedded
            of_scores = found.get("scores", 0) if options["method"] == "adq" else 0
            proxy = encoded.manifest.seconds["embeddings"] + of_scores if encoded else None
        return np.argsort(place), weights, (selection, proxy)

    def run_of(self, options: dict[str, Any]) -> "Run":
        """Give the run that holds the bins, and for adq the scores, of a selection.

        The run that embeds is made first, and the others take its embeddings: that of adq, which
        scores in the same pass over the encoder, else of dq.
        """
        key = self.key_of(options)
        needs_encoder = self.is_embedded(options) and not ENCODED & set(options)
        if key not in self._runs and needs_encoder and self.ready is None:
            listed = [o for o in self.selections.values() if not ENCODED & set(o)]
            of = {o["method"]: o for o in reversed(listed) if "method" in o}
            self._embedded = self.make_run(of.get("adq", of.get("dq", {"method": "dq"})))
        if key not in self._runs:
            self.make_run(options)
        return self._runs[key]

    def is_embedded(self, options: dict[str, Any]) -> bool:
        """Say whether a selection needs embeddings."""
        return CompressConfig(self.dataset, **self.asked(options)).needs_embeddings

    @property
    def ready(self) -> str | None:
        """File of the embeddings, if there is one by now; of image-text rows there is."""
        if self.options["modality"] == BOTH:
            return self.join({})
        if self.embeddings is None and self._embedded is not None:
            return str(self._embedded.path / "embeddings.npy")
        return self.embeddings

    def join(self, options: dict[str, Any]) -> str:
        """Give the file of the embeddings of image-text rows that a selection looks at."""
        modality, share = options.get("modality", BOTH), options.get("text_share", TEXT_SHARE)
        image, text = self.task.halves
        joint = join_halves(image, text, share) if modality == BOTH else None
        whole = {"image": image, "text": text, BOTH: joint}[modality]
        hashed = hashlib.sha256(np.ascontiguousarray(whole)).hexdigest()
        path = self.work / f"{modality}-{hashed[:12]}.npy"
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, whole)
            put_in_place(temporary, path)
        return str(path.absolute())

    def key_of(self, options: dict[str, Any]) -> str:
        """Tell apart what needs a run of its own."""
        from dq_multimodal.stages.ordering import bins_kind

        fixed = {k: v for k, v in options.items() if k not in DRAWN | PATCHES | {"use_weights"}}
        if options.get("target") == TASK_TARGET:
            fixed |= self.target
        return digest(bins_kind(options["method"]), fixed, self.options, self.encoder)

    def asked(self, options: dict[str, Any]) -> dict[str, Any]:
        """Give the options of `compress` of a selection, its places found, without its patches."""
        found = {k: v for k, v in options.items() if k not in OWN | PATCHES}
        found |= {key: find_place(found[key]) for key in PLACES if key in found}
        return found | (self.target if options.get("target") == TASK_TARGET else {})

    def make_run(self, options: dict[str, Any]) -> "Run":
        """Compress the dataset for the bins, scores and marks of all selections of one key."""
        from dq_multimodal import compress

        key, method = self.key_of(options), options["method"]
        alike = [o for o in self.selections.values() if "method" in o and self.key_of(o) == key]
        scored = self.work / f"adq-{key}"  # maybe of a suite before
        if any(o["method"] == "adq" for o in alike) or (method == "dq" and scored.is_dir()):
            method = "adq"
        fixed = {k: v for k, v in self.asked(options).items() if k not in DRAWN}
        encoding = self.encoding(options)
        of_another = encoding.get("ready_embeddings") if self._embedded else None  # of adq or of dq
        folder = f"{method}-{digest(key, Path(of_another).parent.name) if of_another else key}"
        self._runs[key] = compress(
            self.dataset,
            **(self.base(options) | fixed | encoding),
            method=method,
            keep_ratio=max(RUN_RATIO, 1 / self.n_rows),
            report=False,
            output_dir=self.work / folder,
        )
        return self._runs[key]

    def base(self, options: dict[str, Any]) -> dict[str, Any]:
        """Give the options that say what is read of the rows for a selection."""
        modality = options.get("modality", self.options["modality"])
        unread = {"image": "text_columns", "text": "image_column"}.get(modality)
        return {k: v for k, v in self.options.items() if k != unread} | {"modality": modality}

    def encoding(self, options: dict[str, Any]) -> dict[str, Any]:
        """Give the options that say what embeds the rows of a selection."""
        if not self.is_embedded(options):
            return {}
        if self.options["modality"] == BOTH:
            return {"ready_embeddings": self.join(options)}
        if not ENCODED & set(options):
            return {"ready_embeddings": self.ready, "embedding_model": self.encoder_place}
        model = options.get("embedding_model")
        return {"embedding_model": find_encoder(model, self.work) if model else self.encoder_place}

    def drop_patches(self, name: str, keep_ratio: float, seed: int) -> "Run":
        """Compress the dataset with dropped patches; it keeps the rows that `choose` gives.

        Places of models in the options are found as the encoder is.
        """
        from dq_multimodal import compress

        own = self.selections[name]
        options = self.asked(own) | {k: v for k, v in own.items() if k in PATCHES}
        models = ("attribution_model", "mae_model")
        options |= {key: find_place(options[key]) for key in models if key in options}
        options |= self.encoding(own)
        options |= {"keep_ratio": keep_ratio, "seed": seed, "report": False}
        folder = self.work / f"patches-{digest(own, keep_ratio, seed)}"
        return compress(self.dataset, **(self.options | options), output_dir=folder)

    def order_by_length(self) -> np.ndarray:
        """Give the rows by falling length of their responses in characters, ties by number."""
        from dq_multimodal.data.source import load_source
        from dq_multimodal.training.sft import has_chats, to_training_rows

        which = {key: self.options[key] for key in ("split", "config_name") if key in self.options}
        rows, columns = load_source(self.dataset, **which).dataset, self.options.get("text_columns")
        if has_chats(rows, columns):
            raise InputError("by_length is for texts, and the rows are chats")
        texts = (row.get("completion", row.get("text")) for row in to_training_rows(rows, columns))
        return np.argsort([-len(text) for text in texts], kind="stable")

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
