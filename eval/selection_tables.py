"""Tables of the docs about bins, their speed and what a run takes; see readme.py."""

from typing import Any

from common import grid


def partition_loss(document: dict[str, Any]) -> str:
    """Lay out what eval/partition_loss.py measured."""
    head = ("parts", "rows a part", "k-means s", "bins s", "same bin")
    head += ("same rows, rank draw", "same rows, hash draw", "distance to the nearest kept row")
    rows: list[tuple[str, ...]] = [head]
    for line in document["lines"]:
        if line["asked"] is None:
            cells: tuple[str, ...] = ("random rows, no bins", "", "", "", "", "")
        else:
            low, high = line["rows_a_part"]
            seconds = (f"{line['seconds'][name]:.1f}" for name in ("partition", "bins"))
            shares = (
                f"{100 * share:.0f} %" for share in (line["same_bin"], line["rank"]["jaccard"])
            )
            cells = (f"{line['parts']:,}", f"{low:,} to {high:,}", *seconds, *shares)
        found = line["dq"]["coverage"]
        cells += (f"{100 * line['dq']['jaccard']:.0f} %",)
        cells += (f"{found['mean']:.4f} (95 %: {found['p95']:.4f})",)
        rows.append(cells)
    return grid(rows)


def selections(document: dict[str, Any]) -> str:
    """Lay out what eval/selection_benchmark.py measured, and what is extrapolated from it."""
    rows: list[tuple[str, ...]] = [
        ("rows", "method", "seconds", "of CPU", "peak above the embeddings", "picks as ours")
    ]
    beyond = [{**line, "is_beyond": True} for line in document["extrapolated"]]
    measured = [line for line in document["lines"] if "seconds" in line]
    kinds = list(dict.fromkeys(line["data"] for line in measured))
    for line in sorted([*measured, *beyond], key=lambda x: (kinds.index(x["data"]), x["rows"])):
        method = line["method"]
        method += f", {line['similarity']}" if method in ("ours", "ours before") else ""
        memory = f"{line['memory_bytes'] / 1e6:,.0f} MB"
        if "is_beyond" in line:
            cells = (f"{line['seconds']:,.0f} (extrapolated)", "", f"{memory} (extrapolated)", "")
        else:
            spread = line["seconds"]
            shown = f"{spread['median']:,.2f}"
            if line["repeats"] > 1:
                shown += f" ({spread['min']:,.2f} to {spread['max']:,.2f})"
            share = (line["agreement"] or {}).get("same_bin_and_rank")
            agreed = "" if share is None else "all" if share == 1 else f"{100 * share:.2f} %"
            used = f"{line['cpu_seconds']:,.2f}" if "cpu_seconds" in line else ""
            cells = (shown, used, memory, agreed)
        rows.append((f"{line['rows']:,}, {line['data']}", method, *cells))
    return grid(rows)


def coverage(document: dict[str, Any]) -> str:
    """Lay out what eval/coverage_benchmark.py measured."""
    head = ("rows", "method", "seconds", "seconds of CPU", "peak above the embeddings")
    rows: list[tuple[str, ...]] = [(*head, "first 10 % as ours")]
    for line in document["lines"]:
        found = line.get("agreement at 10 %")
        rows.append(
            (
                f"{line['rows']:,}, {line['data']}",
                line["method"],
                f"{line['seconds']['median']:,.1f}",
                f"{line['cpu_seconds']:,.1f}",
                f"{line['memory_bytes'] / 1e6:,.0f} MB",
                "" if found is None else f"{100 * found['same rank']:.4g} %",
            )
        )
    return grid(rows)


def label_noise(document: dict[str, Any]) -> str:
    """Lay out what eval/label_noise.py measured: wrong labels among the kept rows."""
    shares = list(dict.fromkeys(line["noise_ratio"] for line in document["lines"]))
    head = ("kept", "selection", *(f"{100 * share:g} % put last" for share in shares))
    cells: dict[tuple[str, str], list[str]] = {}
    for line in document["lines"]:
        key = f"{100 * line['keep_ratio']:g} %", line["selection"]
        shown = f"{100 * line['wrong']:.1f} %"
        if "accuracy" in line:
            shown += f" (accuracy {line['accuracy']:.1f})"
        cells.setdefault(key, []).append(shown)
    order = list(dict.fromkeys(kept for kept, _ in cells))
    rows = [(*key, *found) for key, found in cells.items()]
    return grid([head, *sorted(rows, key=lambda row: order.index(row[0]))])


def goals(document: dict[str, Any]) -> str:
    """Lay out the goals beside what was measured."""
    words = {True: "yes", False: "**no**", None: ""}
    found = [
        (goal["work"], goal["goal"], goal["measured"], words[goal["is_met"]])
        for goal in document["goals"]
    ]
    return grid([("work", "goal", "measured", "met"), *found])


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


def large(document: dict[str, Any]) -> str:
    """Lay out what eval/large_source.py measured."""
    stages = list(dict.fromkeys(name for run in document["runs"] for name in run["seconds"]))
    rows: list[tuple[str, ...]] = [("run", "seconds", *(f"{name} s" for name in stages), "memory")]
    for run in document["runs"]:
        took = (f"{run['seconds'].get(name, 0):.0f}" for name in stages)
        memory = f"{run['peak_bytes'] / 1e9:.1f} GB"
        rows.append((run["name"], f"{run['wall_seconds']:.0f}", *took, memory))
    return grid(rows)
