"""What a finished run says of itself in a few lines."""

import json
from typing import TYPE_CHECKING, Any

from dq_multimodal.config import format_bytes
from dq_multimodal.files import count, show_name
from dq_multimodal.report import FILE

if TYPE_CHECKING:
    from dq_multimodal.manifest import Manifest
    from dq_multimodal.run import Run


def summarise(run: "Run", as_json: bool, address: str | None) -> str:
    """Say what came out: a few lines for people, or one JSON document."""
    request, manifest = run.request, run.manifest
    if as_json:
        keys = ("rows", "kept", "bytes", "seconds", "notes")
        document = {"output_dir": str(run.path), "complete": True, "pushed": address}
        document["was_complete"] = run.was_complete
        found = manifest.as_dict()
        document |= {"request": request.as_dict()} | {key: found[key] for key in keys}
        document |= {key: found.get(key) for key in ("patches", "scores")}
        return json.dumps(document, indent=2)
    columns = run.config.rows
    read = [*(columns.image_columns or []), *columns.columns] if columns else []
    read_as = f" ({columns.shape}: {', '.join(read)})" if columns else ""
    rows, kept, sizes = manifest.rows, manifest.kept, manifest.bytes
    how: str = request.method
    if request.method in ("adq", "dq"):
        how += f", {count(request.n_bins, 'bin')}, {request.similarity}, {request.draw} draw"
    if request.method == "adq":
        how += f", alpha {request.alpha:g}"
    seconds = ", ".join(
        f"{name} {value:.1f} s" + (" (since the last stop)" if name in manifest.resumed else "")
        for name, value in manifest.seconds.items()
    )
    lines = ["already complete: nothing was done"] if run.was_complete else []
    lines += [f"source   {request.dataset}, {count(rows, 'row')}{read_as}"]
    lines += _strata_line(run)
    lines += [f"note     {note}" for note in manifest.notes]
    lines += [
        f"kept     {count(kept, 'row')} ({100 * kept / rows:.4g} %) by {how}, seed {request.seed}",
        f"bytes    {sizes.source_data:,} -> {sizes.subset_data:,} as data, "
        f"{sizes.subset_files:,} on disk",
        *_score_lines(run),
        *_patch_lines(manifest),
        f"time     {seconds}",
        f"folder   {run.path}",
    ]
    if (run.path / FILE).is_file():
        lines.append(f"report   {run.path / FILE}")
    if address:
        lines.append(f"pushed   {address}")
    return "\n".join(lines)


def _score_lines(run: "Run") -> list[str]:
    """Say which rows the scores of the bins come from, and what they cost."""
    found, seconds = run.manifest.scores, run.manifest.seconds
    if not found:
        return []
    low, high = found.rows_a_bin
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    lines = [f"scores   diversity of {each} rows a bin, {run.request.representativeness} of "]
    lines[0] += "all rows" if found.all_rows else "the same rows"
    took = seconds.get("embeddings", 0.0)
    is_whole = not {"embeddings", "selection"} & {*run.manifest.resumed}
    if took and is_whole and run.request.ready_embeddings is None and "scores" in seconds:
        lines[0] += f"; they took {100 * seconds['scores'] / took:.0f} % of the embedding time"
    return lines


def _patch_lines(manifest: "Manifest") -> list[str]:
    """Say what dropping patches did to the images."""
    found = manifest.patches
    before, after = manifest.bytes.source_images, manifest.bytes.stored_images
    if found is None or before is None or after is None:
        return []
    share = manifest.kept / manifest.rows * found.kept_share
    lines = [
        f"patches  {100 * (1 - found.kept_share):.4g} % dropped, from {found.coded:,} of "
        f"{count(found.images, 'image')}: data keep ratio {100 * share:.4g} %",
        f"images   {before:,} -> {after:,} bytes ({after / max(1, before):.3f}), masks included",
    ]
    holes, kept, answers = found.psnr_of_holes, found.psnr_of_kept, found.answers
    said = [f"holes filled by {found.fill}"]
    if holes.mean is not None:
        said.append(f"PSNR {holes.mean:.1f} dB on average, {holes.lowest:.1f} at least")
    if kept.mean is not None:
        said.append(f"kept pixels {kept.mean:.1f} dB on average, {kept.lowest:.1f} at least")
    if answers.compared:
        said.append(
            f"the classifier's answer changed in {answers.changed:,} of {answers.compared:,}"
        )
    return [*lines, "         " + "; ".join(said)]


def _strata_line(run: "Run") -> list[str]:
    """Say which column made the strata, or how many parts there are."""
    column, n_strata = run.config.label_column, len(run.manifest.labels)
    if run.request.partition is not None and run.config.bins != "none":
        return [f"parts    {n_strata:,}, by {run.request.partition}"]
    if column is None:
        return []
    return [f"strata   {column}, {describe_strata(run.stratum_rows, run.manifest.labels)}"]


def describe_strata(sizes: list[int], labels: list[str]) -> str:
    """Say how many strata there are, and name the smallest and the largest with their rows.

    Args:
        sizes: Rows of each.
        labels: Label of each.
    """
    if len(sizes) == 1:
        return "1 stratum"
    low, high = (sizes.index(pick(sizes)) for pick in (min, max))
    if sizes[low] == sizes[high]:
        return f"{len(sizes):,} strata of {count(sizes[low], 'row')} each"
    return (
        f"{len(sizes):,} strata, {sizes[low]:,} ({show_name(labels[low])}) to {sizes[high]:,} "
        f"({show_name(labels[high])}) rows"
    )


def describe_plan(plan: dict[str, Any]) -> str:
    """Say in a few lines what a run will take and leave."""
    request, memory, disk = plan["request"], plan["memory"], plan["disk"]
    rows, kept, sizes = plan["rows"], plan["kept"], plan["bytes"]
    lines = [f"source   {request['dataset']}, {count(rows, 'row')}"]
    if plan["modality"]:
        lines[0] += f", {plan['modality']}"
    if request["method"] != "random" or plan["strata"] > 1:
        lines += [f"strata   {plan['strata_rows']}"]
    found = plan["embedding"]
    if found is not None:
        name = found.get("model") or found.get("file") or f"column {found.get('column')}"
        lines += [f"vectors  {found['dimension']:,} numbers a row, {name}"]
    if plan["scoring"] is not None:
        lines += [f"scoring  by {plan['scoring']['model']}"]
    lines += [f"note     {note}" for note in plan["notes"]]
    if plan["probe"] is not None:
        tried = plan["probe"]
        lines += [
            f"probe    {count(tried['rows'], 'row')} embedded in {tried['seconds']:.1f} s; "
            f"{tried['rows_per_second']:,.1f} rows a second in all"
        ]
    if plan["cluster"] is not None:
        return "\n".join([*lines, *describe_cluster(plan["cluster"])])
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in plan["seconds"].items())
    most = max(memory["stages"], key=lambda name: memory["stages"][name])
    source = sizes["source_data"]  # of a stream it is not known
    before = "" if source is None else f"{source:,} -> "
    lines += [
        f"time     {format_seconds(plan['total_seconds'])}: {seconds}",
        f"memory   {format_bytes(memory['need'])}: {format_bytes(memory['base'])} for the process "
        f"and its model, {format_bytes(memory['stages'][most])} for the stage {most}; up to "
        f"{format_bytes(memory['mapped'])} of mapped files beside it, which the system can reclaim",
        f"disk     {format_bytes(disk['total'])}, {format_bytes(plan['disk_at_most'])} on the way; "
        f"{format_bytes(plan['disk_free'])} free",
        f"keeps    {count(kept, 'row')} ({100 * kept / rows:.4g} %) by {request['method']}, "
        f"seed {request['seed']}",
        f"bytes    {before}about {sizes['subset_data']:,} as data, about "
        f"{sizes['subset_files']:,} on disk",
        f"folder   {plan['output_dir']} (nothing was written)",
    ]
    return "\n".join(lines)


def describe_cluster(cluster: dict[str, Any]) -> list[str]:
    """Say what a run takes on a cluster: a line for each stage, and the sums."""
    memory, hours = cluster["memory"], f"{cluster['node_hours']:,.1f} hours of a node"
    if cluster["dollars"] is not None:
        hours += f", {cluster['dollars']:,.2f} dollars"
    rows = [("stage", "time", "on", "work", "read", "written", "a task")]
    for stage in cluster["stages"]:
        through = (format_bytes(stage[name]) for name in ("read_bytes", "written_bytes"))
        on = stage["unit"] if stage["unit"] == "driver" else count(stage["n_units"], stage["unit"])
        times = (format_seconds(stage[name]) for name in ("seconds", "work_seconds"))
        rows.append(
            (stage["name"], next(times), on, *times, *through, format_bytes(stage["task_bytes"]))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [
        *(f"note     {note}" for note in cluster["notes"]),
        f"cluster  {count(cluster['nodes'], 'node')}, each of "
        f"{count(cluster['gpus_per_node'], 'GPU')} and {count(cluster['cores_per_node'], 'core')}",
        f"rows     {cluster['rows']:,} in {count(cluster['shards'], 'shard')} and "
        f"{count(cluster['strata'], 'stratum', 'strata')}, {cluster['kept']:,} kept",
        *(f"         {line}" for line in shown),
        f"time     {format_seconds(cluster['total_seconds'])}, {hours}",
        f"memory   driver {format_bytes(memory['driver'])}; a node {format_bytes(memory['node'])} "
        f"with a task on every core",
    ]


def format_seconds(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
