"""Write the tables of README.md from the committed results files.

    python eval/readme.py

A line `<!-- results: FILE -->` is followed by the table of a comparison, `<!-- facts: FILE -->` by
that of eval/alpaca_compression.py. What stands there up to the next blank line is replaced.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"(<!-- (results|facts): (\S+) -->\n)\n?(?:\|.*\n)*\n?")


def main() -> None:
    """Replace the tables."""
    page = ROOT / "README.md"
    page.write_text(render(page.read_text()))


def render(text: str) -> str:
    """Give the page with the tables that the results files hold now."""

    def fill(match: re.Match[str]) -> str:
        head, kind, file = match.groups()
        document = json.loads((ROOT / file).read_text())
        made = comparison_table(document["lines"]) if kind == "results" else facts(document)
        return f"{head}\n{made}\n\n"

    return MARK.sub(fill, text)


def comparison_table(lines: list[dict[str, Any]]) -> str:
    """Lay out a comparison as eval/comparison.py prints it."""
    path = ROOT / "eval" / "comparison.py"
    spec = importlib.util.spec_from_file_location("comparison", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.table(lines)


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
    return "\n".join(f"| {name} | {value} |" for name, value in [("", ""), ("---", "---"), *rows])


if __name__ == "__main__":
    main()
