"""The report of a run: one page, the points of its map as a file, and figures for the card.

Read in this order: rows.py (what a reader sees of a row), compare.py (pairs of rows compared),
layout.py (the map), decisions.py (why a row was kept), patched.py (what dropping patches did),
collect.py (all of it, collected), page.py and templates/ (the page), map_file.py and figures.py
(the other files).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from numpy import ndarray

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from dq_multimodal.manifest import Config, Manifest

FILE = "report.html"
FILES = (FILE, "map.parquet", "figures")
"""Everything that a report may leave in a run folder (besides NAME.tmp of each)."""


def write_report(
    folder: Path,
    config: "Config",
    manifest: "Manifest",
    *,
    embeddings: ndarray | None,
    dataset: "Dataset | None",
    sample: "pa.Table | None" = None,
) -> None:
    """Write report.html, map.parquet and figures/*.png into a run folder.

    The folder must hold bins.parquet, and selection.parquet if no sample is given. All is seeded:
    the same run gives the same bytes on the same machine. Figures need matplotlib and are left out
    without it.

    Args:
        folder: The run folder.
        config: Its config.yaml.
        manifest: Its manifest.json, of a run that may not have finished.
        embeddings: (n, d) floats; None leaves out map, coverage and near-duplicates.
        dataset: The source in row order; None shows row numbers only.
        sample: Of a run too large to read whole, some rows of selection.parquet, ascending, drawn
            by a hash that is not that of the selection; embeddings and dataset are then of these.
            Numbers of rows and of kept rows are those of the run, from bins.parquet.
    """
    from dq_multimodal.files import write_text
    from dq_multimodal.report.collect import collect
    from dq_multimodal.report.figures import can_draw, write_figures
    from dq_multimodal.report.map_file import write_map
    from dq_multimodal.report.page import make_page

    facts = collect(folder, config, manifest, embeddings, dataset, sample)
    has_figures = can_draw()
    if has_figures:
        write_figures(facts, folder)
    write_map(facts, folder)
    write_text(folder / FILE, make_page(facts, has_figures))
