"""condense(): read, learn, write, report."""

import time
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dq_multimodal import folder, report
from dq_multimodal.adapters.base import note_problem
from dq_multimodal.card import CARD, clean
from dq_multimodal.condensation.config import NOISE, RANDOM, CondenseConfig
from dq_multimodal.condensation.documents import SHOWN, STATE, CondensedConfig
from dq_multimodal.condensation.experts import FILE as EXPERTS
from dq_multimodal.condensation.experts import open_experts
from dq_multimodal.condensation.loop import run_loop
from dq_multimodal.condensation.nets import build_net
from dq_multimodal.condensation.pictures import Real, check_sizes, find_columns, read_real
from dq_multimodal.condensation.result import (
    Condensed,
    begin,
    check_place,
    drop_state,
    find_damage,
    is_finished,
    output_folder,
    seal,
    write_result,
    write_shown,
)
from dq_multimodal.condensation.rows import check_columns, count_real_bytes
from dq_multimodal.config import InputError
from dq_multimodal.data.source import MEMORY, Source, from_memory, is_same_source, load_source
from dq_multimodal.files import count, describe_file, name_some
from dq_multimodal.manifest import CONDENSED, Origin, make
from dq_multimodal.models.locate import accelerator
from dq_multimodal.options import takes
from dq_multimodal.run import Run, open_run
from dq_multimodal.stages.selection import SELECTION_FILE

if TYPE_CHECKING:
    from dq_multimodal.data.source import AnyDataset


@takes(CondenseConfig)
def condense(dataset: "AnyDataset", **options: Any) -> Condensed:
    """Condense a dataset of pictures with classes to a small synthetic one, into a folder.

    Interrupted at any moment, the same call goes on where it stopped and ends with the same
    files. In a folder that holds the finished set already, it returns that set.

    Args:
        dataset: Hub id, local path, or a `datasets.Dataset` or `DatasetDict`.

    Raises:
        InputError: For every wrong setting and bad input, in one clear line.
    """
    request, source = open_pictures(dataset, options)
    place = output_folder(request)
    with folder.claim_folder(place, CONDENSED):
        run = open_first(request)
        names = [request.dataset, request.image_folder, request.experts]
        folder.spare(place, [*names, None if run is None else str(run.path)], source)
        config = make_config(request, source, run)
        if not request.overwrite and is_finished(place, config):
            return found_complete(place, source, with_report=request.report)
        is_new = check_place(place, config, request.overwrite)
        started = time.perf_counter()
        real = read_real(source, request)
        check_sizes(real, request.images_per_class)
        build_net(request.net, real.n_classes, real.channels, real.side, request.net_width)
        first = None if run is None else find_first(run, source, real, request.images_per_class)
        on_device = real.to(torch.device(accelerator(request.device) or "cpu"))
        seconds = {"pictures": time.perf_counter() - started}
        begin(place, config, is_new=is_new)
        is_resumed = (place / STATE).exists()
        started = time.perf_counter()
        learnt = run_loop(on_device, request, place / STATE, first)
        seconds["loop"] = time.perf_counter() - started
        source.check()
        started = time.perf_counter()
        real_bytes = count_real_bytes(source.dataset, config.image_column, real.rows)
        kind = source.dataset.features[config.label_column]
        notes = note_rows(real, source)
        manifest = write_result(place, config, on_device, kind, real_bytes, learnt, notes)
        write_shown(place, config, manifest, real, with_report=request.report)
        seconds["report"] = time.perf_counter() - started
        manifest.seconds = {name: round(value, 3) for name, value in seconds.items()}
        manifest.resumed = ["loop"] if is_resumed else []
        seal(place, manifest)
        return Condensed(place)


def open_pictures(dataset: "AnyDataset", options: dict[str, Any]) -> tuple[CondenseConfig, Source]:
    """Make the request and open its dataset, which has to hold pictures."""
    if isinstance(dataset, str | PathLike):
        request = CondenseConfig.from_options({"dataset": dataset, **options})
        source = load_source(
            request.dataset,
            split=request.split,
            config_name=request.config_name,
            revision=request.revision,
            image_folder=request.image_folder,
        )
    else:
        request = CondenseConfig.from_options({"dataset": MEMORY, **options})
        source = from_memory(dataset, request.split, request.image_folder)
    return request, source


def make_config(request: CondenseConfig, source: Source, run: Run | None) -> CondensedConfig:
    """Put together config.yaml.

    Raises:
        InputError: If the dataset has no pictures or no classes.
    """
    image, label = find_columns(source, request)
    check_columns(image, label)
    pins = {}
    if run is not None:
        pins["init"] = describe_file(run.path / SELECTION_FILE)["sha256"]
    if request.experts is not None:
        pins["experts"] = describe_file(open_experts(request.experts).path / EXPERTS)["sha256"]
    return CondensedConfig(
        request=request,
        source=make(Origin, source.origin),
        image_column=image,
        label_column=label,
        pins=pins,
    )


def open_first(request: CondenseConfig) -> Run | None:
    """Open the run whose first rows are what the pictures begin as, if one is named."""
    if request.init in (RANDOM, NOISE):
        return None
    try:
        return open_run(request.init)
    except InputError as error:
        raise InputError(f"init must be random, noise or a run: {error}") from error


def find_first(run: Run, source: Source, real: Real, per_class: int) -> list[int]:
    """Give the places in `real` of the first rows of each class in the order of a run.

    Raises:
        InputError: If the run is of other rows.
    """
    if not is_same_source(run.config.source.as_dict(), source.origin):
        raise InputError(f"the run {run.path} is of other rows than {source.origin['name']}")
    order = run.order
    found = []
    for k in range(real.n_classes):
        members = real.of_class(k).numpy()
        found.append(members[np.argsort(order[real.rows[members]])][:per_class])
    return np.stack(found, axis=1).flatten().tolist()


def note_rows(real: Real, source: Source) -> list[str]:
    """Say what is not used, of rows, classes and files."""
    notes = [] if source.note is None else [source.note]
    if real.unused:
        n = count(len(real.unused), "row has", "rows have")
        notes.append(
            f"{n} no class or no picture that can be read, and taught nothing: "
            f"{name_some(real.unused)}"
        )
    if real.empty:
        n = count(len(real.empty), "class has", "classes have")
        notes.append(f"{n} no pictures, and none are made: {name_some(map(clean, real.empty))}")
    fate = "read as in training"
    return notes + [note_problem(what, rows, fate=fate) for what, rows in real.reduced.items()]


def found_complete(place: Path, source: Source, *, with_report: bool) -> Condensed:
    """Open a set that was there already, and write again what of its pages is lost."""
    found = Condensed(place)
    drop_state(place)
    lost = {*find_damage(place, found.manifest)} & {*SHOWN, CARD}
    if lost or (with_report and not (place / report.FILE).is_file()):
        real = read_real(source, found.request) if with_report else None
        found.show(real, with_report=with_report)
    found.was_complete = True
    return found
