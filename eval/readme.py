"""Write the tables of README.md and docs/*.md from the committed results files.

    python eval/readme.py

After a line `<!-- KIND: FILE -->` stands a table of that file; what is there up to the next blank
line is replaced. `facts` is what eval/alpaca_compression.py measured, `bytes` what
eval/patch_bytes.py did without loss and `frontier` with it, `speed` and `coder` what
eval/image_speed.py did, `scores` what eval/adq_scores.py did, `partition` what
eval/partition_loss.py did, `selection` what eval/selection_benchmark.py did, `coverage` what
eval/coverage_benchmark.py did, `noise` what eval/label_noise.py did; `goals` is of the file of
selection, or of that of
eval/text_speed.py; `plan` is what eval/plan_accuracy.py measured, and `large` what
eval/large_source.py did.

`bench` is of the results lines of a suite (or of a demo): all tables of it, up to the line
`<!-- end -->`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import grid
from harness.results import read_lines
from harness.table import markdown, summarise
from selection_tables import (
    coverage,
    goals,
    label_noise,
    large,
    partition_loss,
    plans,
    selections,
)

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARK = re.compile(r"(<!-- ([a-z]+): (\S+\.json) -->\n)\n?(?:\|.*\n)*\n?")
BENCH_MARK = re.compile(r"(<!-- bench: (\S+\.jsonl) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def main() -> None:
    """Replace the tables."""
    for page in PAGES:
        page.write_text(render(page.read_text()))


def render(text: str) -> str:
    """Give a page with the tables that the results files hold now."""

    def fill(match: re.Match[str]) -> str:
        head, kind, file = match.groups()
        made = TABLES[kind](json.loads((ROOT / file).read_text()))
        return f"{head}\n{made}\n\n"

    def fill_bench(match: re.Match[str]) -> str:
        head, file, end = match.groups()
        return f"{head}\n{markdown(summarise(read_lines(ROOT / file)))}\n\n{end}"

    return BENCH_MARK.sub(fill_bench, MARK.sub(fill, text))


def stores(document: dict[str, Any]) -> str:
    """Lay out the lossless lines of eval/patch_bytes.py, a column for each data and patch size."""
    ratios: dict[str, dict[str, float]] = {}
    heads: list[str] = []
    for name in ("cifar10", "photographs"):
        for line in document[name]["stores"]:
            if line["is_lossless"]:
                head = f"{name}, {line['patch_size']} px, {line['masks']}"
                heads += [head] if head not in heads else []
                ratios.setdefault(line["coding"], {})[head] = line["ratio"]
    rows = [("coding", *heads)]
    for coding, found in ratios.items():
        cells = (f"{found[head]:.3f}" if head in found else "" for head in heads)
        rows.append((coding, *cells))
    return grid(rows)


def frontier(document: dict[str, Any]) -> str:
    """Lay out the lossy lines of eval/patch_bytes.py: bytes as a share, at the PSNR they give."""
    cells: dict[str, dict[str, str]] = {}
    heads: list[str] = []
    for name, patch_size in (("cifar10", 8), ("photographs", 16)):
        for line in document[name]["stores"]:
            if line["is_lossless"] or line["masks"] != "random" or line["patch_size"] != patch_size:
                continue
            coding, quality = line["coding"].split(", quality ")
            head = f"{name}, quality {quality}"
            if quality in ("95", "80", "40"):
                heads += [head] if head not in heads else []
                shown = f"{line['ratio']:.3f} at {line['psnr']:.1f} dB"
                cells.setdefault(coding, {})[head] = shown
    rows = [("coding", *heads)]
    rows += [(coding, *(found.get(head, "") for head in heads)) for coding, found in cells.items()]
    return grid(rows)


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
    """Lay out the speed of the lossless patch coder."""
    rows: list[tuple[str, ...]] = [("data", "pixels an image", "images a call", "encode", "decode")]
    for line in document["coder"]:
        rate = line["images_per_second"]
        shown = (f"{rate[key]:,.3g}/s" for key in ("encode", "decode"))
        rows.append(
            (line["data"], f"{line['pixels_an_image']:,}", str(line["images_a_call"]), *shown)
        )
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


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "facts": facts,
    "bytes": stores,
    "frontier": frontier,
    "speed": speeds,
    "coder": coder_speeds,
    "scores": score_noise,
    "partition": partition_loss,
    "selection": selections,
    "coverage": coverage,
    "noise": label_noise,
    "goals": goals,
    "plan": plans,
    "large": large,
}


if __name__ == "__main__":
    main()
