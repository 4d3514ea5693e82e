"""compress() on a Ray cluster: the driver has tasks done, and keeps only counts of the rows.

Every task leaves its result in the store, and what is known of it last of all. So a task that a
dead worker or machine had is done again elsewhere, and a run whose driver died goes on where it
stopped.
"""

import hashlib
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from numpy import ndarray
from tqdm import tqdm

from dq_multimodal import __version__, folder
from dq_multimodal.adapters.choice import choose_adapter, label_column_of
from dq_multimodal.config import (
    CompressConfig,
    InputError,
    count_parts,
)
from dq_multimodal.core import Scores
from dq_multimodal.core.diversity import sample_bins
from dq_multimodal.core.hashing import hash_numbers
from dq_multimodal.core.partition import fit_parts, sample_numbers
from dq_multimodal.data.columns import sort_labels
from dq_multimodal.data.local import read_parquet
from dq_multimodal.data.pixels import UNDECODED
from dq_multimodal.data.shards import Rows, open_rows, survey_file
from dq_multimodal.data.source import MEMORY, AnyDataset, Source
from dq_multimodal.data.store import Store, find_storage
from dq_multimodal.distributed.cluster import Cluster, Facts, Task
from dq_multimodal.files import expand_home, put_in_place, write_table
from dq_multimodal.manifest import Config, ScoreFacts, check_type, make
from dq_multimodal.report import write_report
from dq_multimodal.run import Run, found_complete, output_folder
from dq_multimodal.stages import embedding, on_shards, subset
from dq_multimodal.stages.on_shards import Work, count_task_bytes, join_tables, make_groups
from dq_multimodal.stages.ordering import bins_kind, count_asked, weigh_groups
from dq_multimodal.stages.preparation import (
    MAX_LISTED,
    UNLABELLED,
    check_strata,
    leaves_out,
    make_config,
    note_problems,
    settle_method,
    start_manifest,
)
from dq_multimodal.stages.selection import (
    BINS_FILE,
    SELECTION_FILE,
    name_unlabelled,
    note_counts,
    tabulate_groups,
)

SALT = 0x73686F77
"""Sets the hash of the rows that the report shows apart from that of the draw."""


def compress_on_ray(dataset: AnyDataset, options: dict[str, Any]) -> Run:
    """Do what `compress` does, on the machines of a Ray cluster.

    Raises:
        InputError: As `compress`, and if Ray is not installed or the cluster is out of reach.
    """
    named = os.fspath(dataset) if isinstance(dataset, str | os.PathLike) else None
    request = CompressConfig.from_options({"dataset": named or MEMORY, **options})
    with Cluster(request.ray_address) as cluster:

        def survey(files: list[str], is_hashed: bool) -> list[Facts]:
            task, numbers = partial(survey_file, files, is_hashed), [*range(len(files))]
            return [facts for _, facts in sorted(cluster.do("files", task, numbers))]

        rows, source = open_rows(named or dataset, request, survey)
        subset.check_columns(source.dataset)
        request, why = settle_method(request, source.dataset, rows.n_rows)
        place = output_folder(request)
        with folder.claim_folder(place):
            folder.spare_inputs(place, request, source)
            driver = Driver(cluster, rows, source, request.of_rows(rows.n_rows), place)
            return driver.run(why)


class Driver:
    """One run: what is asked, the tasks that make it, and what is known of their results."""

    def __init__(
        self, cluster: Cluster, rows: Rows, source: Source, request: CompressConfig, place: Path
    ) -> None:
        self.cluster, self.rows, self.source, self.place = cluster, rows, source, place
        self.request, self.n_rows = request, rows.n_rows
        self.adapter = choose_adapter(source.dataset, request)
        self.label_column = label_column_of(self.adapter, request)
        count_asked(self.n_rows, self.n_rows, request)  # raises if there are too few
        check_strata(request, self.n_rows, self.label_column)
        self.n_parts, kind, sample = 0, bins_kind(request.method), np.zeros(0, dtype=np.int64)
        if request.partition is not None and request.needs_embeddings:
            self.n_parts = count_parts(request.partition, self.n_rows)
            sample = sample_numbers(self.n_rows, self.n_parts)
        given, vectors, npy = request.ready_embeddings, None, None
        if given is not None and request.needs_embeddings:
            vectors = embedding.describe_given(given, source.dataset, request.split, self.n_rows)
            npy = expand_home(given).absolute() if "file" in vectors else None
        self.config = make_config(request, source, self.adapter, self.label_column, vectors)
        self.settings = (kind, self.label_column, sample, npy)
        self.unreadable: Int[ndarray, " k"] | None = None
        self.weight: float | None = None  # mean of the weights of kept rows

    def run(self, why: str | None) -> Run:
        """Do what is not done yet; why is said of method auto."""
        request, config, place = self.request, self.config, self.place
        notes: list[str] = []
        if not request.overwrite and folder.is_finished(place, config, with_report=request.report):
            return found_complete(place)
        is_embedded = request.needs_embeddings and request.ready_embeddings is None
        if is_embedded or request.method == "adq":  # a worker has the room for the model
            task = partial(on_shards.describe, config, self.source.dataset, request)
            [(_, found)] = self.cluster.do("model", task, [0], has_model=True)
            config = self.config = check_type("config", found["config"], Config)
            notes = found["notes"]
        whole = (__version__, self.rows.starts, config.format())  # what all parts depend on
        key = hashlib.sha256(repr((place.absolute(), *whole)).encode()).hexdigest()[:16]
        where = find_storage(request.ray_storage, config.source.path)
        self.store = Store(f"{where or place / folder.PARTS}/{key}")
        measured = replace(request, representativeness=config.request.representativeness)
        self.work = Work(self.store, self.rows, measured, *self.settings)
        manifest = folder.begin(place, config, request.overwrite)
        self.manifest = manifest or start_manifest(self.source, [""], None)
        (place / folder.PARTS / key).mkdir(parents=True, exist_ok=True)  # tells that there is work
        with folder.stage(place, self.manifest, "embeddings"):
            task = partial(on_shards.embed, self.work)
            embedded = self.do("embeddings", task, has_model=is_embedded)
            notes += [note for facts in embedded for note in facts["notes"]]
            notes += [*self.note(embedded), self.source.note or "", why or ""]
            self.manifest.notes = [*filter(None, dict.fromkeys(notes))]
        with folder.stage(place, self.manifest, "selection"):
            self.select(embedded)
        with folder.stage(place, self.manifest, "subset"):
            written = self.write()
        if request.report:
            with folder.stage(place, self.manifest, "report"):
                self.show(written)
        folder.finish(place, config, self.manifest, self.n_kept)
        self.store.clear()
        return Run(place)

    def do(self, stage: str, task: Task, n_tasks: int | None = None, **how: Any) -> list[Facts]:
        """Have those tasks of a stage done that are not, one for each shard or so many."""
        if n_tasks is None:
            n_tasks = len(self.rows.shards)
            how["memory"] = min(3 * self.rows.largest_bytes, self.cluster.room)
        found = self.store.read_facts(stage)
        left = [number for number in range(n_tasks) if number not in found]
        task = partial(on_shards.do_once, __version__, self.store, stage, task)
        found |= dict(self.cluster.do(stage, task, left, **how))
        return [found[number] for number in range(n_tasks)]

    def note(self, embedded: list[Facts]) -> list[str]:
        """Say what is odd about the rows, and find those that no subset takes."""
        problems: dict[str, tuple[int, list[int]]] = {}
        for facts in embedded:
            for what, (n_odd, rows) in facts["problems"].items():
                before, known = problems.get(what, (0, []))
                most = None if what in UNDECODED else MAX_LISTED - len(known)
                problems[what] = before + n_odd, known + rows[:most]
        if problems.get(UNLABELLED, (0,))[0] == self.n_rows:
            del problems[UNLABELLED]
        names = dict(pair for facts in embedded for pair in facts["names"])
        asked = (problems, self.n_rows, self.adapter, self.request)
        listed, found = note_problems(*asked, lambda rows: [*map(names.get, rows)])
        self.manifest.problems = listed
        self.manifest.bytes.source_data = sum(facts["bytes"] for facts in embedded)
        if leaves_out(self.adapter, self.request):
            lost = [row for what in UNDECODED if what in listed for row in listed[what].rows]
            self.unreadable = np.unique(np.array(lost, dtype=np.int64))
        return found

    def select(self, embedded: list[Facts]) -> None:
        """Bin the rows, score the bins, put the rows in their order."""
        work, request, n_rows = self.work, self.request, self.n_rows
        codes, labels = self.number_labels(embedded)
        counts, record = self.assign(embedded, codes)
        groups = make_groups(counts, self.n_parts)
        n_strata = groups[-1].stratum + groups[-1].last - groups[-1].first
        labels = [f"part {k}" for k in range(n_strata)] if self.n_parts else labels
        out = np.zeros(0, dtype=np.int64) if self.unreadable is None else self.unreadable
        need = count_task_bytes(groups, counts, record)
        task = partial(on_shards.make_bins, work, record, groups, counts, out)
        binned = self.do("bins", task, len(groups), memory=need)
        strata, numbers = np.array([pair for facts in binned for pair in facts["pairs"]]).T
        held, n_out = (
            np.array([n for facts in binned for n in facts[name]]) for name in ("sizes", "out")
        )
        readable = held - n_out
        sizes = np.bincount(strata, readable, minlength=n_strata).astype(np.int64)
        self.n_kept = count_asked(int(sizes.sum()), n_rows, request)
        scores, weights, table = None, readable.astype(np.float64), None
        if request.method == "adq":
            scores, self.manifest.scores = self.score(binned)
            weights, is_in = np.zeros(len(held)), readable > 0
            weights[is_in] = weigh_groups(numbers[is_in], readable[is_in], request, scores)
            table = np.zeros((n_strata, int(numbers.max()) + 1))
            table[strata, numbers] = weights
        task = partial(on_shards.order, work, out, sizes, table, self.n_kept)
        ordered = self.do("order", task, len(groups))
        kept = np.array([n for facts in ordered for n in facts["kept"]])
        if request.method in ("adq", "coverage"):
            self.weight = sum(facts["weight"] for facts in ordered) / self.n_kept
        units = np.array([facts["units"] for facts in binned])
        self.do("selection", partial(on_shards.gather, work, units, self.unreadable, self.n_kept))
        join_tables(work, self.place / SELECTION_FILE)
        found = (strata, numbers, held, kept, weights, work.kind, labels, scores, request)
        write_table(tabulate_groups(*found), self.place / BINS_FILE)
        self.manifest.labels = labels
        if self.label_column is not None:
            of_strata = np.bincount(strata, kept, minlength=n_strata).astype(np.int64)
            self.manifest.note_selection(note_counts(labels, sizes, of_strata, request))

    def number_labels(self, embedded: list[Facts]) -> tuple[list[Int[ndarray, " k"]], list[str]]:
        """Give the stratum of each label code of each shard, and the labels of the strata."""
        if self.label_column is None:
            return [], [""]
        known = getattr(self.rows.features[self.label_column], "names", None)
        present = {label for facts in embedded for label in facts["labels"]}
        found = sort_labels(present) if known is None else [n for n in known if n in present]
        place = {label: number for number, label in enumerate(found)}
        codes = [np.array([*map(place.get, facts["labels"]), len(found)]) for facts in embedded]
        labels = [str(label) for label in found]
        if any(UNLABELLED in facts["problems"] for facts in embedded):
            labels.append(name_unlabelled(labels))
        return codes, labels

    def assign(
        self, embedded: list[Facts], codes: list[Int[ndarray, " k"]]
    ) -> tuple[Int[ndarray, "u p"], np.dtype]:
        """Have the rows sorted by part; give the rows of a part in each shard, and their type."""
        work, request, parts, whole = self.work, self.request, None, None
        record: list[Any] = [("row", "i8")]
        if request.needs_embeddings:
            width, kind = embedded[0]["width"], np.dtype(embedded[0]["kind"])
            if any((facts["width"], facts["kind"]) != (width, kind.str) for facts in embedded):
                raise InputError(
                    f"{request.ready_embeddings} must hold vectors of one size and type"
                )
            record.append(("vector", kind.str, (width,)))
            if not request.ray_storage:
                whole = Path(self.store.path(embedding.FILE))
                is_done = len(self.store.read_facts("parts")) == len(embedded)
                if not whole.exists() and not (is_done and (self.place / embedding.FILE).exists()):
                    self.store.clear("parts")
                    new = whole.with_name(whole.name + ".tmp")
                    embedding.RowsFile(new, (self.n_rows, width), np.float32, is_new=True)
                    put_in_place(new, whole)
        if self.n_parts:
            vector = np.dtype((kind, (width,)))
            names = (f"centres/{number:05d}.bin" for number in range(len(embedded)))
            sample = np.concatenate([self.store.read(name, vector) for name in names])
            largest = max(facts["largest"] for facts in embedded)
            some = sample.astype(np.float32), self.n_parts, request.similarity
            parts = fit_parts(*some, largest=largest)
        kind_of_row = np.dtype(record)
        task = partial(on_shards.assign, work, kind_of_row, parts, codes, whole)
        found = self.do("parts", task)
        if whole is not None and whole.exists():  # else it has its name already
            put_in_place(whole, self.place / embedding.FILE)
        counts = np.zeros((len(found), 1 + max(max(f["parts"]) for f in found)), dtype=np.int64)
        for number, facts in enumerate(found):
            counts[number, facts["parts"]] = facts["counts"]
        return counts[:, counts.any(axis=0)], kind_of_row

    def score(self, binned: list[Facts]) -> tuple[Scores, ScoreFacts]:
        """Have the bins scored by some rows of each."""
        rows, bins = (np.array([x for f in binned for x in f["picks"][k]], int) for k in (0, 1))
        filled = np.sum([facts["filled"] for facts in binned], axis=0)
        at = np.argsort(rows)
        rows, bins = rows[at], bins[at]
        keys = hash_numbers(~self.request.seed, rows.astype(np.uint64))
        picks = sample_bins(bins, keys, self.request.score_rows, filled)
        copied = self.do("scores", partial(on_shards.take, self.work, rows[picks]))
        files = on_shards.name_files("scores", copied)
        task = partial(on_shards.score, self.work, files, bins[picks])
        [found] = self.do("score", task, 1, has_model=True)
        scores = Scores(*(np.array(found[n]) for n in ("representativeness", "diversity")))
        return scores, make(ScoreFacts, found["facts"])

    def write(self) -> list[Facts]:
        """Have the kept rows written, give their files their names, and read those to be shown."""
        shown = sample_numbers(self.n_rows, 1, SALT)
        task = partial(on_shards.write, self.work, self.weight, shown)
        written = self.do("subset", task)
        partial_folder = self.place / subset.PARTIAL
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        files = on_shards.name_files("subset", written)
        for number, name in enumerate(tqdm(files, desc="write", unit="file")):
            self.store.fetch(name, partial_folder / f"part-{number:05d}.parquet")
        if any(facts["named"] for facts in written):
            with (partial_folder / subset.FILE_NAMES).open("wb") as out:
                for number, facts in enumerate(written):
                    if not facts["named"]:  # a line for each row all the same
                        out.write(b"\n" * facts["rows"])
                        continue
                    with self.store.open(f"subset/{number:05d}.txt") as lines:
                        shutil.copyfileobj(lines, out)
        shutil.rmtree(self.place / subset.FOLDER, ignore_errors=True)
        partial_folder.replace(self.place / subset.FOLDER)
        self.source.check()
        self.manifest.bytes.subset_data = sum(facts["bytes"] for facts in written)
        names = (f"shown/{number:05d}.parquet" for number in range(len(written)))
        table = pa.concat_tables([on_shards.read_table(self.work, name) for name in names])
        if self.request.needs_embeddings:
            flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors = flat.reshape(len(table), -1).astype(np.float32)
            given, similarity = self.request.ready_embeddings, self.request.similarity
            by_cosine = given is None or similarity == "cosine"
            self.manifest.add_notes(embedding.note_alike(vectors, by_cosine=by_cosine))
            self.sample = table.drop_columns(["vector"]), vectors
        else:
            self.sample = table, None
        return written

    def show(self, written: list[Facts]) -> None:
        """Write the report, of a sample where there are many rows."""
        with TemporaryDirectory() as work:
            names = on_shards.name_files("shown", [facts["shown"] for facts in written])
            places = [Path(work, name.replace("/", "-")) for name in names]
            files = [*map(self.store.fetch, names, places)]
            dataset = read_parquet(files).remove_columns(["dq_row"])
            table, vectors = self.sample
            sample = None if len(table) == self.n_rows else table
            how = {"embeddings": vectors, "dataset": dataset, "sample": sample}
            write_report(self.place, self.config, self.manifest, **how)
