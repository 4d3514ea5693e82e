"""Write the tables of README.md and docs/*.md from the committed results files.

    python eval/readme.py

After a line `<!-- KIND: FILE -->` stands a table of that file, made by the function of `TABLES` or
`CONDENSED`; what is there up to the next blank line is replaced. `bench` is of the results lines of
a suite (or of a demo): all tables of it, up to the line `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import condensed_tables
import numpy as np
from harness.results import read_lines
from harness.table import markdown, summarise
from measure import ROOT, grid
from selection_benchmark import extrapolate

from dq_multimodal.config import format_bytes
from dq_multimodal.report.summary import format_seconds

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARK = re.compile(r"(<!-- (?!bench:)([a-z]+): (\S+\.jsonl?) -->\n)\n?(?:\|.*\n)*\n?")
BENCH_MARK = re.compile(r"(<!-- bench: (\S+\.jsonl) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def main() -> None:
    """Replace the tables."""
    for page in PAGES:
        page.write_text(render(page.read_text()))


def render(text: str) -> str:
    """Give a page with the tables that the results files hold now."""

    def fill(match: re.Match[str]) -> str:
        head, kind, file = match.groups()
        path = ROOT / file
        found = read_lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
        made = (TABLES | CONDENSED)[kind](found)
        return f"{head}\n{made}\n\n"

    def fill_bench(match: re.Match[str]) -> str:
        head, file, end = match.groups()
        return f"{head}\n{markdown(summarise(read_lines(ROOT / file)))}\n\n{end}"

    return BENCH_MARK.sub(fill_bench, MARK.sub(fill, text))


def pivot(corner: tuple[str, ...], cells: Iterable[tuple[tuple[str, ...], str, str]]) -> str:
    """Lay out cells, each with its row and its column, both in the order in which they come."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row, head, cell in cells:
        found.setdefault(row, {})[head] = cell
    heads = list(dict.fromkeys(head for row in found.values() for head in row))
    rows = [(*names, *(row.get(head, "") for head in heads)) for names, row in found.items()]
    return grid([(*corner, *heads), *rows])


def stored(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the lines of eval/patch_bytes.py with the name of their data."""
    for name in ("cifar10", "photographs"):
        yield from ((name, line) for line in document[name]["stores"])


def stores(document: dict[str, Any]) -> str:
    """Lay out the lossless lines of eval/patch_bytes.py, a column for each data and patch size."""
    cells = (
        ((x["coding"],), f"{name}, {x['patch_size']} px, {x['masks']}", f"{x['ratio']:.3f}")
        for name, x in stored(document)
        if x["is_lossless"]
    )
    return pivot(("coding",), cells)


def frontier(document: dict[str, Any]) -> str:
    """Lay out the lossy lines of eval/patch_bytes.py: bytes as a share, at the PSNR they give."""
    cells = []
    for name, line in stored(document):
        of_size = (name, line["patch_size"]) in (("cifar10", 8), ("photographs", 16))
        if not line["is_lossless"] and line["masks"] == "random" and of_size:
            coding, quality = line["coding"].split(", quality ")
            shown = f"{line['ratio']:.3f} at {line['psnr']:.1f} dB"
            cells.append(((coding,), f"{name}, quality {quality}", shown))
    return pivot(("coding",), cells)


def speeds(document: dict[str, Any]) -> str:
    """Lay out what eval/image_speed.py measured."""
    rows: list[tuple[str, ...]] = [
        ("data", "model", "model alone", "embedding stage", "share", "GradCAM++ maps")
    ]
    for line in document["lines"]:
        rate = line["images_per_second"]
        shown = (f"{rate[key]:,.0f}/s" for key in ("model", "stage"))
        share = f"{100 * line['share_of_model_rate']:.0f} %"
        rows.append((line["data"], line["model"], *shown, share, f"{rate['maps']:,.0f}/s"))
    return grid(rows)


def score_noise(document: dict[str, Any]) -> str:
    """Lay out what eval/adq_scores.py measured."""
    names = ("representativeness", "diversity", "importance")
    head = ("data", "rows", "rows a bin", "pairs of seeds", *names, "extra time")
    rows: list[tuple[str, ...]] = [head]
    for name, found in document["sets"].items():
        of_score = found["rank_correlation"]
        cells = [f"{np.mean(of_score[key]):.2f} (least {min(of_score[key]):.2f})" for key in names]
        low, high = found["rows_a_bin"]
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        costs = [f"{100 * c['extra_share']:.0f} % ({c['model']})" for c in found["costs"]]
        pairs = str(len(of_score["diversity"]))
        rows.append((name, f"{found['rows']:,}", each, pairs, *cells, ", ".join(costs)))
    return grid(rows)


def coder_speeds(document: dict[str, Any]) -> str:
    """Lay out the speed of the lossless patch coding."""
    rows: list[tuple[str, ...]] = [("data", "coding", "encode", "decode")]
    for name, line in stored(document):
        if line["masks"] == "random" and (rate := line.get("images_per_second")):
            shown = (f"{rate[key]:,.0f}/s" for key in ("encode", "decode"))
            rows.append((f"{name}, {line['patch_size']} px", line["coding"], *shown))
    return grid(rows)


def facts(found: dict[str, Any]) -> str:
    """Lay out what eval/alpaca_compression.py measured."""
    kept, size = found["kept"], found["bytes"]
    rows = [
        ("rows", f"{found['rows']:,} -> {kept['0.2']:,}"),
        (
            "resampled at 0.1 and 0.05, inside each other",
            f"{kept['0.1']:,} and {kept['0.05']:,}, {'yes' if found['is_nested'] else 'no'}",
        ),
        ("files", f"{size['source_files']:,} -> {size['subset_files']:,} bytes"),
        ("exact selection of 52,002 x 384", f"{found['stage_seconds']['selection']:.1f} s"),
        ("the whole command", f"{found['seconds']:.1f} s"),
        ("peak memory of the process", f"{found['peak_memory_bytes'] / 1e6:,.0f} MB"),
        ("verify", ", ".join(f"{name} {result}" for name, result in found["verify"].items())),
        ("odd rows", f"{len(found['notes'])} note: {found['notes'][0].split(':')[0]}"),
    ]
    return grid([("", ""), *rows])


def selections(document: dict[str, Any]) -> str:
    """Lay out what eval/selection_benchmark.py measured, and what is extrapolated from it."""
    lines = [line for line in document["lines"] if "seconds" in line]
    rows: list[tuple[str, ...]] = [
        ("rows", "method", "seconds", "of CPU", "peak above the embeddings", "picks as ours")
    ]
    kinds = list(dict.fromkeys(line["data"] for line in lines))
    both = [*lines, *extrapolate(lines)]
    for line in sorted(both, key=lambda x: (kinds.index(x["data"]), x["rows"])):
        method, spread, memory = line["method"], line["seconds"], line["memory_bytes"] / 1e6
        if method in ("ours", "ours before") and document["kind"] == "bins":
            method += f", {line['similarity']}"
        cells = [f"{line['rows']:,}, {line['data']}", method]
        if isinstance(spread, float):
            cells += [f"{spread:,.0f} (extrapolated)", "", f"{memory:,.0f} MB (extrapolated)", ""]
        else:
            shown = f"{spread['median']:,.2f}"
            if line["repeats"] > 1:
                shown += f" ({spread['min']:,.2f} to {spread['max']:,.2f})"
            share = line.get("as_ours")
            agreed = "" if share is None else "all" if share == 1 else f"{100 * share:.2f} %"
            cells += [shown, f"{line['cpu_seconds']:,.2f}", f"{memory:,.0f} MB", agreed]
        rows.append(tuple(cells))
    return grid(rows)


def partition_loss(document: dict[str, Any]) -> str:
    """Lay out what eval/partition_loss.py measured."""
    head = ("parts", "rows a part", "k-means s", "bins s", "same bin")
    head += ("same rows, rank draw", "same rows, hash draw", "distance to the nearest kept row")
    rows: list[tuple[str, ...]] = [head]
    for line in document["lines"]:
        cells: tuple[str, ...] = ("random rows, no bins", "", "", "", "", "")
        if line["asked"] is not None:
            low, high = line["rows_a_part"]
            seconds = (f"{line['seconds'][name]:.1f}" for name in ("partition", "bins"))
            shares = (f"{100 * x:.0f} %" for x in (line["same_bin"], line["rank"]["jaccard"]))
            cells = (f"{line['parts']:,}", f"{low:,} to {high:,}", *seconds, *shares)
        found = line["dq"]["coverage"]
        distance = f"{found['mean']:.4f} (95 %: {found['p95']:.4f})"
        rows.append((*cells, f"{100 * line['dq']['jaccard']:.0f} %", distance))
    return grid(rows)


def label_noise(document: dict[str, Any]) -> str:
    """Lay out what eval/label_noise.py measured: wrong labels among the kept rows."""
    cells = []
    for line in sorted(document["lines"], key=lambda line: line["keep_ratio"]):
        accuracy = line.get("accuracy")
        known = "" if accuracy is None else f" (accuracy {accuracy:.1f})"
        row = (f"{100 * line['keep_ratio']:g} %", line["selection"])
        head = f"{100 * line['noise_ratio']:g} % put last"
        cells.append((row, head, f"{100 * line['wrong']:.1f} %{known}"))
    return pivot(("kept", "selection"), cells)


def large(document: dict[str, Any]) -> str:
    """Lay out what eval/large_source.py measured."""
    stages = list(dict.fromkeys(name for run in document["runs"] for name in run["seconds"]))
    rows: list[tuple[str, ...]] = [("run", "seconds", *(f"{name} s" for name in stages), "memory")]
    for run in document["runs"]:
        took = (f"{run['seconds'].get(name, 0):.0f}" for name in stages)
        memory = f"{run['peak_bytes'] / 1e9:.1f} GB"
        rows.append((run["name"], f"{run['wall_seconds']:.0f}", *took, memory))
    return grid(rows)


def faults(document: dict[str, Any]) -> str:
    """Lay out what eval/ray_faults.py measured: deaths in every stage, and what came of them."""
    head = ("rows", "nodes", "killed", "in", "tasks", "begun again", "done again", "seconds")
    rows: list[tuple[str, ...]] = [(*head, "as undisturbed, verified, nothing left")]
    for name, case in document["sources"].items():
        for run in case["runs"]:
            killed = ", ".join(dict.fromkeys(what for what, _ in run["deaths"]))
            where = ", ".join(stage for _, stage in run["deaths"])
            moved = " (goes on on another cluster)" if run["run"] == "elsewhere" else ""
            counts = (str(run[key]) for key in ("tasks", "begun_again", "made_again"))
            same = ("same_selection", "same_bins", "same_subset", "verified", "is_answer_whole")
            is_same = all(run[key] for key in same) and not run["left"]
            cells = (f"{case['rows']:,} {name}", str(run["nodes"]), killed, where + moved)
            rows.append((*cells, *counts, f"{run['seconds']:.0f}", "yes" if is_same else "no"))
    return grid(rows)


def plans(document: dict[str, Any]) -> str:
    """Lay out what eval/plan_accuracy.py measured: what happened over what was said."""
    names = {
        "total_seconds": "seconds in all",
        "embeddings_seconds": "embeddings",
        "scores_seconds": "scores",
        "selection_seconds": "selection",
        "subset_seconds": "subset",
        "report_seconds": "report",
        "peak_memory": "peak memory",
        "disk": "disk",
        "subset_files": "files of the subset",
    }
    rows: list[tuple[str, ...]] = [
        ("data", "rows", "seconds said", "seconds taken", *names.values())
    ]
    for name, found in document["sets"].items():
        said, was = found["predicted"]["total_seconds"], found["actual"]["total_seconds"]
        ratios = (found["ratio"].get(key) for key in names)
        shown = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        rows.append((name, f"{found['actual']['rows']:,}", f"{said:.0f}", f"{was:.0f}", *shown))
    return grid(rows)


def cluster(document: dict[str, Any]) -> str:
    """Lay out what eval/cluster_plan.py foresaw: the stages, then the sums, for each plan."""
    head = ("parts", "stage", "on", "time", "work", "read", "written", "a task")
    rows: list[tuple[str, ...]] = [head]
    for plan in document["lines"]:
        name, stages = f"{plan['strata']:,}", plan["stages"]
        for stage in stages:
            unit = stage["unit"]
            on = unit if unit == "driver" else f"{stage['n_units']:,} {unit}s"
            times = (format_seconds(stage[key]) for key in ("seconds", "work_seconds"))
            keys = ("read_bytes", "written_bytes", "task_bytes")
            rows.append((name, stage["name"], on, *times, *(format_bytes(stage[k]) for k in keys)))
        moved = (sum(x[key] for x in stages) for key in ("read_bytes", "written_bytes"))
        took = format_seconds(plan["total_seconds"]), f"{plan['node_hours']:,.0f} node hours"
        most = f"driver {format_bytes(plan['memory']['driver'])}"
        rows.append((name, "**all**", "", *took, *map(format_bytes, moved), most))
    return grid(rows)


def orders(document: dict[str, Any]) -> str:
    """Lay out what eval/order_simulation.py counted."""
    head = ("share kept", "rows kept", "farthest from its share", "order as by whole numbers")
    head += ("equal priorities beside each other", "nearest two that differ", "holds the smaller")
    rows: list[tuple[str, ...]] = [head]
    for line in document["lines"]:
        cells = [f"{100 * line['ratio']:g} %", f"{line['kept']:,}"]
        cells[1] += "" if line["is_exact_number"] else " (not kept)"
        cells.append(f"{line['greatest_deviation']:.3f} rows")
        is_same = line["is_exact_order"] and line["places_agree"]
        cells += [f"{'yes' if is_same else 'no'}, of {line['compared']:,}"]
        cells += [f"{line['equal_neighbours']:,}", f"{line['nearest']:.1e}"]
        rows.append((*cells, "yes" if line["holds_the_smaller"] else "no"))
    return grid(rows)


def kept(document: dict[str, Any]) -> str:
    """Lay out what eval/joint_coverage.py measured, random and coverage of equal shares."""
    names = {
        "easy_vqa_unlabelled": "easy-VQA",
        "easy_vqa_shuffled": "easy-VQA, shuffled",
        "flickr8k": "Flickr8k, five captions a row",
        "flickr8k_captions": "Flickr8k, one caption a row",
    }
    head = ("data", "kept", "selection", "to the nearest picture", "to the nearest text")
    head += ("pictures kept", "texts kept", "text and answer kept", "entropy of answers, bits")
    rows: list[tuple[str, ...]] = [head]
    for task, name in names.items():
        for line in document["tasks"].get(task, {"lines": []})["lines"]:
            if line["selection"] != "random" and not line["selection"].startswith("coverage"):
                continue
            if "% text" in line["selection"]:
                continue
            near = (f"{abs(line[f'distance of {key}']):.3f}" for key in ("pictures", "texts"))
            shares = (
                f"{100 * line[key]:.1f} %" if (key := f"kept of {what}") in line else ""
                for what in ("pictures", "texts", "pairs")
            )
            entropy = line.get("entropy of answers")
            cells = (name, f"{100 * line['keep_ratio']:g} %", line["selection"], *near, *shares)
            rows.append((*cells, "" if entropy is None else f"{entropy:.2f}"))
    return grid(rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "facts": facts,
    "bytes": stores,
    "frontier": frontier,
    "speed": speeds,
    "coder": coder_speeds,
    "scores": score_noise,
    "partition": partition_loss,
    "selection": selections,
    "coverage": selections,
    "noise": label_noise,
    "plan": plans,
    "large": large,
    "faults": faults,
    "cluster": cluster,
    "order": orders,
    "kept": kept,
}
CONDENSED: dict[str, Callable[[Any], str]] = {
    "condensed": condensed_tables.accuracies,
    "prefixes": condensed_tables.prefixes,
    "stored": condensed_tables.stored,
    "ranking": condensed_tables.scores,
    "ddranking": condensed_tables.package_scores,
}


if __name__ == "__main__":
    main()
