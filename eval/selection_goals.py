"""Growth, extrapolations and goals from the lines that eval/selection_benchmark.py measured.

    python eval/selection_goals.py [eval/results/selection_benchmark.json]

Written into the same file. A growth exponent is the slope of a least-squares line through log
seconds against log rows. What is extrapolated from it stands apart and is never a measurement.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
COMPARED, REAL, LARGE = 11_495, 52_002, 1_000_000
REFERENCES = ("n-by-n", "n-by-n, float32")
METHODS = ("ours", *REFERENCES, "closed form", "apricot", "submodlib")
EXTRAPOLATED = (26_000, REAL)
Line = dict[str, Any]


def main() -> None:
    """Read, add, write, and print the goals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "eval" / "results" / "selection_benchmark.json"
    parser.add_argument("results", type=Path, nargs="?", default=default)
    path = parser.parse_args().results
    document = json.loads(path.read_text())
    document |= summarise(document["lines"])
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)
    words = {True: "met", False: "NOT met", None: ""}
    for goal in document["goals"]:
        print(f"{goal['work']}: goal {goal['goal']}: {goal['measured']} {words[goal['is_met']]}")


def summarise(lines: list[Line]) -> Line:
    """Fit the growth, go beyond what was measured, and hold the figures against the goals."""
    growth = [found for found in fit_all(lines) if found is not None]
    return {"growth": growth, "extrapolated": go_beyond(growth), "goals": hold(lines, growth)}


def find(lines: list[Line], **asked: Any) -> list[Line]:
    """Give the measured lines that have these values, by rows."""
    found = [x for x in lines if "seconds" in x and all(x[k] == v for k, v in asked.items())]
    return sorted(found, key=lambda line: line["rows"])


def fit_all(lines: list[Line]) -> list[Line | None]:
    """Fit the growth of each method over the rows it was measured on."""
    real = {"data": "Alpaca", "similarity": "cosine"}
    found = [fit(find(lines, method=method, **real)) for method in METHODS]
    found.append(fit(find(lines, **{**real, "method": "ours", "similarity": "euclidean"})))
    mixed = find(lines, method="ours", data="mixed Alpaca", similarity="cosine")
    mixed = [line for line in mixed if line["rows"] <= LARGE]
    found.append(fit(mixed))
    found.append(fit(find(lines, method="ours in parts", similarity="cosine")))
    end = find(lines, method="ours", rows=REAL, **real)
    return [*found, fit([*end, *(line for line in mixed if line["rows"] > REAL)])]


def fit(lines: list[Line]) -> Line | None:
    """Fit seconds and memory as powers of the rows; None for fewer than two sizes."""
    rows = np.array([line["rows"] for line in lines], dtype=float)
    if len(set(rows)) < 2:
        return None
    found: Line = {
        "method": lines[0]["method"],
        "data": " and ".join(dict.fromkeys(line["data"] for line in lines)),
        "similarity": lines[0]["similarity"],
        "rows": [line["rows"] for line in lines],
    }
    memory = [max(line["memory_bytes"], 1) for line in lines]
    seconds = [line["seconds"]["median"] for line in lines]
    for name, values in (("seconds", seconds), ("memory_bytes", memory)):
        slope, start = np.polyfit(np.log(rows), np.log(values), 1)
        found[name] = {"exponent": round(float(slope), 3), "log_of_factor": float(start)}
    return found


def go_beyond(growth: list[Line]) -> list[Line]:
    """Extrapolate the n-by-n greedy; these figures were never measured."""
    return [
        {
            "method": one["method"],
            "data": one["data"],
            "rows": rows,
            "similarity": one["similarity"],
            **{
                name: float(np.exp(one[name]["log_of_factor"]) * rows ** one[name]["exponent"])
                for name in ("seconds", "memory_bytes")
            },
        }
        for one in growth
        if one["method"] in REFERENCES and one["data"] == "Alpaca"
        for rows in EXTRAPOLATED
        if rows > max(one["rows"])
    ]


def hold(lines: list[Line], growth: list[Line]) -> list[Line]:
    """Put the goals beside what was measured; is_met is None where nothing was."""
    goals = [hold_speedup(lines, name) for name in REFERENCES]

    def add(work: str, goal: str, measured: str | None, is_met: bool) -> None:
        held = is_met if measured is not None else None
        shown = measured if measured is not None else "not measured"
        goals.append({"work": work, "goal": goal, "measured": shown, "is_met": held})

    own = find(lines, method="ours", similarity="cosine")
    real = [line for line in own if line["data"] == "Alpaca" and line["rows"] == REAL]
    pairs = beside_before(lines)
    half = [ratio for line, ratio, _ in pairs if line in real]
    shown = f"{max(half):.2f} of them" if half else None
    work = "Alpaca, 52,002 rows: seconds of the release before"
    add(work, "half of them", shown, max(half, default=0) <= 0.5)
    for k, what in ((1, "seconds"), (2, "seconds of CPU")):
        worst = max(pairs, key=lambda pair: pair[k], default=None)
        shown = None
        if worst is not None:
            name = "{rows:,} rows, {data}, {similarity}".format(**worst[0])
            shown = f"{worst[k]:.2f} of them ({name})"
        work = f"every line: {what} of the release before"
        add(work, "at most all of them", shown, worst is None or worst[k] <= 1)
    memory = [line["memory_bytes"] for line in real]
    shown = f"{max(memory) / 1e6:,.0f} MB" if memory else None
    work = "Alpaca, 52,002 rows: peak above the embeddings"
    add(work, "under 200 MB", shown, max(memory, default=0) < 200e6)
    slopes = [
        one["seconds"]["exponent"]
        for one in growth
        if one["method"] == "ours" and max(one["rows"]) >= LARGE and len(one["rows"]) > 2
    ]
    shown = f"{max(slopes):.2f}" if slopes else None
    work = "growth from 52,002 to 1,000,000 rows"
    add(work, "exponent at most 1.3", shown, max(slopes, default=0) <= 1.3)
    parted = [one for one in growth if one["method"] == "ours in parts"]
    slopes = [one["seconds"]["exponent"] for one in parted]
    low, high = parted[0]["rows"][:: len(parted[0]["rows"]) - 1] if parted else (REAL, LARGE)
    work = f"growth from {low:,} to {high:,} rows, in parts by k-means"
    shown = f"{max(slopes):.2f}" if slopes else None
    add(work, "exponent at most 1.3", shown, max(slopes, default=0) <= 1.3)
    large = [line["seconds"]["median"] for line in own if line["rows"] == LARGE]
    add("1,000,000 x 384", "under 300 s", say(large), max(large, default=0) < 300)
    parted = find(lines, method="ours in parts", rows=LARGE)
    large = [line["seconds"]["median"] for line in parted]
    work = "1,000,000 x 384, in parts by k-means"
    add(work, "under 300 s", say(large), max(large, default=0) < 300)
    classes = [line for line in own if line["data"].endswith("10 classes")]
    seconds = [line["seconds"]["median"] for line in classes]
    work = "50,000 x 512, 10 classes"
    if classes:
        work = "{rows:,} x {dimension}, {data}".format(**classes[0])
    add(work, "at most 3 s", say(seconds), max(seconds, default=0) <= 3)
    over = [
        line["memory_bytes"] - 2 * line["rows"] * line["dimension"]  # half of float32
        for line in [*find(lines, method="ours"), *find(lines, method="ours in parts")]
    ]
    shown = f"half {max(over) / 1e6:+,.0f} MB" if over else None
    work = "working memory of ours, every line"
    add(work, "half of the float32 embeddings + 300 MB", shown, max(over, default=0) <= 300e6)
    return goals


def beside_before(lines: list[Line]) -> list[tuple[Line, float, float]]:
    """Put every line of ours beside the release before: ratios of seconds, wall and CPU."""
    found = []
    for line in find(lines, method="ours"):
        same = {key: line[key] for key in ("data", "rows", "similarity")}
        for old in find(lines, method="ours before", **same):
            ratio = line["seconds"]["median"] / old["seconds"]["median"]
            found.append((line, ratio, line["cpu_seconds"] / old["cpu_seconds"]))
    return found


def say(seconds: list[float]) -> str | None:
    """Give the slowest of some seconds in words."""
    return f"{max(seconds):.2f} s" if seconds else None


def hold_speedup(lines: list[Line], reference: str) -> Line:
    """Put ours beside the n-by-n greedy where both were measured, at 11,495 rows."""
    at = {"data": "Alpaca", "rows": COMPARED, "similarity": "cosine"}
    own, other = (find(lines, method=method, **at) for method in ("ours", reference))
    goal = {"work": f"11,495 rows against the {reference} greedy", "goal": "150 x, same picks"}
    if not own or not other:
        return {**goal, "measured": "not measured", "is_met": None}
    ratio = other[0]["seconds"]["median"] / own[0]["seconds"]["median"]
    share = (other[0]["agreement"] or {}).get("same_bin_and_rank", 0.0)
    picks = "same picks" if share == 1 else f"{100 * share:.2f} % of the picks the same"
    measured = f"{ratio:,.0f} x, {picks}"
    return {**goal, "measured": measured, "is_met": ratio >= 150 and share == 1}


if __name__ == "__main__":
    main()
