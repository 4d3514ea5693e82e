"""A condensed set: the folder on disk, and what is drawn from it."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dq_multimodal import __version__, card, folder, hub, report
from dq_multimodal.card import CARD
from dq_multimodal.condensation.card import make_body, make_matter
from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.documents import (
    DATA,
    OURS,
    PICTURES,
    PUSHED_FILES,
    SHOWN,
    STATE,
    WHOLE,
    CondensedConfig,
    CondensedManifest,
    StoredBytes,
)
from dq_multimodal.condensation.loop import History
from dq_multimodal.condensation.page import draw_sheet, make_page
from dq_multimodal.condensation.pictures import Real, read_real
from dq_multimodal.condensation.rows import open_rows, read_pixels, write_rows
from dq_multimodal.condensation.synthetic import Synthetic
from dq_multimodal.config import InputError, format_bytes
from dq_multimodal.data.local import short_name
from dq_multimodal.data.source import is_same_source, reload_source
from dq_multimodal.files import count, expand_home, put_in_place, write_text
from dq_multimodal.manifest import CONDENSED, CONFIG, MANIFEST, has_mark, write_mark
from dq_multimodal.run import MAX_NAME_BYTES, Run, check_links, is_of_hub

if TYPE_CHECKING:
    from datasets import Dataset

MOST_LOSSES = 400
"""Means of losses that manifest.json holds."""
PACKAGES = ("torch", "numpy", "datasets", "pillow")


class Condensed:
    """A condensed set: its path, and config and manifest, see `condensation.documents`."""

    was_complete = False
    """Whether the call that gave it found it finished already."""

    def __init__(self, path: str | Path) -> None:
        """Open the folder of a condensed set, whoever wrote it.

        Raises:
            InputError: If it is none, or has not finished; if config.yaml or manifest.json is not
                that of one.
        """
        self.path = expand_home(path)
        config = CondensedConfig.read(self.path) if is_condensed(self.path) else None
        if config is None:
            raise InputError(f"{path} is not the folder of a condensed set")
        manifest = CondensedManifest.read(self.path)
        if manifest is None or not manifest.complete:
            raise InputError(f"the set in {path} has not finished: run the same command again")
        if manifest.images_per_class != config.request.images_per_class:
            raise InputError(
                f"{self.path / MANIFEST} has {manifest.images_per_class} images a class, and "
                f"{CONFIG} {config.request.images_per_class}"
            )
        self.config, self.manifest = config, manifest
        if is_of_hub(self.path):  # whoever pushed it knows no path of this machine
            config.source = replace(config.source, path=None, image_folder=None)

    @property
    def request(self) -> CondenseConfig:
        """The settings of the set."""
        return self.config.request

    @cached_property
    def dataset(self) -> "Dataset":
        """All rows: picture, label, soft label where learnt, and dq_order, the row number."""
        return open_rows(self.path)

    @property
    def n_bytes(self) -> int:
        """Stored bytes of the pictures and of their soft labels."""
        return self.manifest.n_bytes

    def prefix(self, images_per_class: int) -> "Dataset":
        """Give the set of the first so many pictures of each class.

        Raises:
            InputError: If there are fewer, or it is no whole number of at least 1.
        """
        most = self.manifest.images_per_class
        if type(images_per_class) is not int or not 1 <= images_per_class <= most:
            raise InputError(
                f"images_per_class must be a whole number from 1 to {most}, got "
                f"{images_per_class!r}"
            )
        return self.dataset.select(range(images_per_class * len(self.manifest.classes)))

    def read_pixels(self) -> Float[ndarray, "n c h w"]:
        """Read the pictures as pixels in [0, 1] units."""
        sizes = self.manifest.channels, self.manifest.side
        return read_pixels(self.dataset, self.config.image_column, *sizes)

    def open_real(self) -> Real:
        """Load the real pictures again; InputError if they cannot be had, or have changed."""
        source = reload_source(self.config.source.as_dict())
        return read_real(source, self.request)

    def write_report(self, real: Real | None = None) -> Path:
        """Write report.html, the sheet of pictures and the card again; give the report.

        Args:
            real: The real pictures; None loads the source again, and if that cannot be had, no
                real pictures are shown.
        """
        if real is None:
            with suppress(InputError):
                real = self.open_real()
        with folder.claim_folder(self.path, CONDENSED):
            self.show(real)
        return self.path / report.FILE

    def show(self, real: Real | None = None, *, with_report: bool = True) -> None:
        """Do what `write_report` does, in a folder that is claimed."""
        write_shown(self.path, self.config, self.manifest, real, with_report=with_report)
        seal(self.path, self.manifest)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Push rows, config.yaml, manifest and card as one commit; see `dq_multimodal.hub.push`.

        report.html stays where it is: it shows real pictures.
        """
        self.check_whole()
        config = hub.public_config(self.config)
        paths = [self.path / name for name in (DATA, PICTURES)]
        contents: dict[str, Path | bytes] = {
            path.relative_to(self.path).as_posix(): path for path in paths if path.is_file()
        }
        contents[CONFIG] = config.format().encode()
        notes = [*map(hub.shortener(self.config), self.manifest.notes)]
        manifest = self.manifest.publish(config.format(), contents, notes=notes)
        contents[MANIFEST] = manifest.format().encode()
        body = partial(make_body, self.path, config, manifest)
        text = hub.CardText(self.path, make_matter(config, manifest), body)
        n_classes = count(len(manifest.classes), "class", "classes")
        pictures = count(manifest.rows, "picture")
        message = f"{pictures} of {n_classes} by {config.request.method}"
        kind = hub.CONDENSED_SET
        return hub.push_contents(
            kind, contents, text, PUSHED_FILES, repo_id, message, private=private
        )

    def find_damage(self, *, is_deep: bool = True) -> dict[str, str]:
        """Say which files are not those that were recorded, and how."""
        found = find_damage(self.path, self.manifest, is_deep=is_deep)
        found = {k: v for k, v in found.items() if v != "is missing" or k not in SHOWN}
        if not self.manifest.is_sealed:
            found[MANIFEST] = "has another content"
        return found

    def check_whole(self) -> None:
        """Raise unless the files are those that were written, and none of them is a link."""
        for name, what in sorted(self.find_damage().items()):
            raise InputError(f"the set in {self.path} is damaged: {name} {what}")
        check_links(self.path)

    def summarise(self, as_json: bool, address: str | None) -> str:
        """Say what came out: a few lines for people, or one JSON document."""
        request, manifest = self.request, self.manifest
        if as_json:
            found = manifest.as_dict()
            keys = ("rows", "real_rows", "classes", "bytes", "learning_rate", "seconds", "notes")
            document = {"output_dir": str(self.path), "complete": True, "pushed": address}
            document |= {"was_complete": self.was_complete, "request": request.as_dict()}
            document |= {key: found.get(key) for key in keys}
            document["images_per_class"] = manifest.images_per_class
            document["n_bytes"] = self.n_bytes
            return json.dumps(document, indent=2)
        sizes, seconds = manifest.bytes, [*manifest.seconds.items()]
        shown = [
            f"{name} {value:.1f} s" + (" (since the last stop)" if name in manifest.resumed else "")
            for name, value in seconds
        ]
        how = f"{request.method}{', multisize' if request.multisize else ''}, "
        how += f"{count(request.iterations or 0, 'iteration')}, seed {request.seed}"
        share = 100 * self.n_bytes / max(1, sizes.real_images)
        lines = ["already complete: nothing was done"] if self.was_complete else []
        lines += [f"source   {request.dataset}, {count(manifest.real_rows, 'picture')}"]
        lines += [f"note     {note}" for note in manifest.notes]
        n_classes = count(len(manifest.classes), "class", "classes")
        lines += [
            f"set      {count(manifest.rows, 'picture')}, {manifest.images_per_class} of each of "
            f"{n_classes}, by {how}",
            f"bytes    {sizes.real_images:,} -> {self.n_bytes:,} ({share:.3g} %): pictures "
            f"{sizes.images:,}, soft labels {sizes.soft_labels:,}",
            f"time     {', '.join(shown)}",
            f"folder   {self.path}",
            f'load     load_dataset("parquet", data_files="{self.path / DATA}"); the first m x '
            f"{len(manifest.classes)} rows are a set of m a class",
        ]
        if manifest.learning_rate is not None:
            lines.insert(-2, f"rate     {manifest.learning_rate:.4g} was learnt, to train with")
        if (self.path / report.FILE).is_file():
            lines.append(f"report   {self.path / report.FILE}")
        return "\n".join(lines + ([f"pushed   {address}"] if address else []))

    def __repr__(self) -> str:
        return (
            f"Condensed({str(self.path)!r}: {self.manifest.images_per_class} pictures of each of "
            f"{len(self.manifest.classes)} classes by {self.request.method}, "
            f"{format_bytes(self.n_bytes)})"
        )


def is_condensed(path: Path) -> bool:
    """Say whether a folder has the mark of a condensed set."""
    return has_mark(path / MANIFEST, CONDENSED)


def open_result(name: str | Path, revision: str | None = None) -> Run | Condensed:
    """Open a folder, or a repository on the Hub, that holds a run or a condensed set."""
    place = expand_home(name)
    place = place if place.exists() else hub.download(str(name), revision)
    return Condensed(place) if is_condensed(place) else Run(place)


def output_folder(request: CondenseConfig) -> Path:
    """Give the output_dir, or runs/DATASET-METHOD-IMAGES."""
    if request.output_dir is not None:
        return expand_home(request.output_dir)
    name = re.sub(r"[^\w.-]+", "", short_name(request.dataset)).strip(".") or "dataset"
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    return Path("runs") / f"{name}-{request.method}-{request.images_per_class}"


def is_finished(place: Path, config: CondensedConfig) -> bool:
    """Say whether the very set that config asks for is in a folder, finished, with its rows."""
    before, manifest = folder.read_before(place, CondensedConfig, CondensedManifest)
    if before is None or manifest is None or not manifest.complete or _differences(before, config):
        return False
    return not {*find_damage(place, manifest)} - {CONFIG, CARD, *SHOWN}


def check_place(place: Path, config: CondensedConfig, overwrite: bool) -> bool:
    """Say whether a set begins anew in a claimed folder, or goes on with what is there.

    Raises:
        InputError: If another set is there and may not be overwritten, or others put something
            where ours is written.
    """
    before, manifest = folder.read_before(
        place, CondensedConfig, CondensedManifest, is_strict=not overwrite
    )
    differing = _differences(before, config) if before is not None else []
    is_complete = manifest is not None and manifest.complete
    has_work = is_complete or (place / STATE).exists()
    if has_work and not overwrite and (differing or before is None):
        found = "; ".join(differing) or f"its {CONFIG} is missing"
        raise InputError(
            f"{place} holds another condensed set ({found}): use --overwrite or another output "
            "folder"
        )
    folder.check_strangers(place, OURS, WHOLE)
    return before is None or bool(differing) or is_complete


def begin(place: Path, config: CondensedConfig, *, is_new: bool) -> None:
    """Start a set in a claimed folder, or go on with the one that is there."""
    if is_new:
        write_mark(place, CONDENSED)  # before and after all else
        card.clear_card(place)
        folder.clear_folder(place, OURS, WHOLE)
    config.write(place)


def _differences(before: CondensedConfig, config: CondensedConfig) -> list[str]:
    """Say what another set in the folder was asked or made from."""
    found = folder.differing_settings(before.request, config.request)
    if not is_same_source(before.source.as_dict(), config.source.as_dict()):
        found.append("its source had another content")
    found += [f"{k} had another content" for k, v in config.pins.items() if before.pins.get(k) != v]
    return found


def write_result(
    place: Path,
    config: CondensedConfig,
    real: Real,
    label_type: object,
    real_bytes: int,
    learnt: tuple[Synthetic, History],
    notes: list[str],
) -> CondensedManifest:
    """Write the rows of a set, and give its manifest, which is not written."""
    synthetic, history = learnt
    image = (config.image_column, config.request.stored_as == "png")
    sizes = write_rows(place / DATA, synthetic, real, image, (config.label_column, label_type))
    every = max(1, -(-len(history.losses) // MOST_LOSSES))
    blocks = [history.losses[k : k + every] for k in range(0, len(history.losses), every)]
    return CondensedManifest(
        rows=len(synthetic.images),
        real_rows=len(real.images),
        classes=list(real.names),
        channels=real.channels,
        side=real.side,
        mean=real.mean.flatten().tolist(),
        spread=real.spread.flatten().tolist(),
        learning_rate=None if synthetic.rate is None else float(synthetic.rate),
        bytes=StoredBytes(
            images=sizes[0],
            soft_labels=sizes[1],
            file=(place / DATA).stat().st_size,
            real_images=real_bytes,
        ),
        losses=[float(f"{np.mean(block):.6g}") for block in blocks],
        loss_every=every,
        choices=[[*choice] for choice in history.choices],
        notes=notes,
        versions={"dq-multimodal": __version__, **{name: version(name) for name in PACKAGES}},
    )


def write_shown(
    place: Path,
    config: CondensedConfig,
    manifest: CondensedManifest,
    real: Real | None,
    *,
    with_report: bool = True,
) -> None:
    """Write the report, the sheet of pictures and the card."""
    rows = open_rows(place)
    pixels = read_pixels(rows, config.image_column, manifest.channels, manifest.side)
    if with_report:
        write_text(place / report.FILE, make_page(config, manifest, rows, pixels, real))
    path = place / PICTURES
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(draw_sheet(pixels, len(manifest.classes)))
    put_in_place(temporary, path)
    card.write_section(place, make_matter(config, manifest), make_body(place, config, manifest))


def seal(place: Path, manifest: CondensedManifest) -> None:
    """Write the manifest of a finished set, with a record of its files; drop the state."""
    manifest.complete = True
    names = [name for name in (CONFIG, DATA, *SHOWN) if (place / name).is_file()]
    manifest.record_files(place, names)
    manifest.write(place)
    drop_state(place)


def drop_state(place: Path) -> None:
    """Remove the state of a set that is finished."""
    for name in (STATE, STATE + ".tmp"):
        (place / name).unlink(missing_ok=True)


def find_damage(
    place: Path, manifest: CondensedManifest, *, is_deep: bool = False
) -> dict[str, str]:
    """Say which files of a finished set are gone or not what was written, and how."""
    parts = {path.relative_to(place).as_posix() for path in place.glob("data/*")}
    needed = {CONFIG, DATA, *parts}
    return folder.compare_files(place, manifest.files, needed, {*SHOWN}, is_deep=is_deep)
