"""The dataset card of a run: what the subset is, where it is from, how it was made."""

from pathlib import Path
from typing import Any

import yaml

from dq_multimodal.local_data import is_local, short_name
from dq_multimodal.selection import BINS_FILE, SCORES, read_table
from dq_multimodal.splits import base_split

REPO_ID = "OWNER/NAME"
"""Stands for the repository until the card is pushed to one."""

CITATIONS = """\
```bibtex
@inproceedings{zhou2023dataset,
  title     = {Dataset Quantization},
  author    = {Zhou, Daquan and Wang, Kai and Gu, Jianyang and Peng, Xiangyu and Lian, Dongze and
               Zhang, Yifan and You, Yang and Feng, Jiashi},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023},
  note      = {arXiv:2308.10524}
}
@inproceedings{adq2025,
  title     = {Adaptive Dataset Quantization},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year      = {2025},
  note      = {arXiv:2412.16895}
}
```"""

FIGURES = "figures"
FIGURE_TEXTS = {
    "map.png": "Map of the rows by their embeddings, coloured by bin, kept rows marked",
    "bins.png": "Scores of the bins, and how many of their rows were kept",
    "coverage.png": "How far every row is from its nearest kept row, beside random selection",
}

UNTOUCHED = "Every row is an untouched row of the source; nothing was rewritten or generated."
DROPPED = (
    "Its images keep their most important patches only, as records of kept patches and a mask; "
    "the other columns are those of the source."
)

METHODS = {
    "adq": "Adaptive Dataset Quantization: the rows were parted into disjoint bins by greedy "
    "GraphCut gains, every bin was scored for representativeness and diversity, and gave a share "
    "that grows with its importance",
    "dq": "Dataset Quantization: the rows were parted into disjoint bins by greedy GraphCut gains, "
    "and every bin gave the same share of its rows",
    "graphcut": "GraphCut: one greedy run over all rows, the first picks were kept",
    "random": "seeded random selection, the baseline of every coreset method",
}


def make_card(run_folder: Path, config: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Write the card of a run folder, with the YAML front matter the Hub reads.

    The front matter makes config `default` the subset and config `selection` the table of all
    source rows, both here and on the Hub.
    """
    request, source = config["request"], config["source"]
    rows, kept, sizes = manifest["rows"], manifest["kept"], manifest["bytes"]
    ratio = f"{100 * kept / rows:.4g} %"
    title = f"{short_name(source['name'])}, {ratio} by {request['method']}"
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(title, source, kept), sort_keys=False) + "---",
        f"# {title}",
        f"**{kept:,} of the {rows:,} rows** of {_name_source(source)}, a smaller set to train on. "
        + (DROPPED if request["drop_ratio"] else UNTOUCHED)
        + " Dataset quantization has nothing to do with the quantization of model weights.",
        "## How to load it",
        _loading(source["split"], bool(request["drop_ratio"])),
        "`dq_row` is the number of the row in the source, `dq_bin` and `dq_rank` tell its place.",
        "## How it was made",
        METHODS[request["method"]] + ".",
        _table(["setting", "value"], _settings(config)),
        "## Before and after",
        _table(
            ["", "source", "subset"],
            [
                ["rows", f"{rows:,}", f"{kept:,}"],
                [
                    "bytes (source columns, uncompressed Arrow)",
                    f"{sizes['source_data']:,}",
                    f"{sizes['subset_data']:,}",
                ],
                *_image_bytes(sizes),
                [
                    "bytes of the files",
                    f"{sizes['source_files']:,}" if sizes["source_files"] else "not known",
                    f"{sizes['subset_files']:,}",
                ],
            ],
        ),
        "## Rows by bin",
        _bin_table(run_folder),
        *_figures(run_folder),
    ]
    if manifest["notes"]:
        parts += ["## Notes on the rows", "\n".join(f"- {_escape(n)}" for n in manifest["notes"])]
    parts += [
        "## Limits",
        "The selection looks at embeddings of the rows, never at a trained model's results. "
        "Whether the subset trains as well as the whole has to be measured for each model and "
        "task; random selection of the same size is a strong baseline. Errors and biases of the "
        "source are still here.",
        "## Licence",
        _licence(source),
        "## Citation",
        CITATIONS,
    ]
    return "\n\n".join(parts) + "\n"


def _image_bytes(sizes: dict[str, Any]) -> list[list[str]]:
    """Compare the images of the kept rows, source files against patch records."""
    if "stored_images" not in sizes:
        return []
    before, after = sizes["source_images"], sizes["stored_images"]
    return [["bytes of the images of the kept rows", f"{before:,}", f"{after:,}"]]


def _front_matter(title: str, source: dict[str, Any], kept: int) -> dict[str, Any]:
    matter: dict[str, Any] = {"pretty_name": title}
    if source.get("license"):
        matter["license"] = source["license"]
    if source["kind"] == "hub":
        matter["source_datasets"] = [source["name"]]
    bounds = [
        (1e3, "n<1K"),
        (1e4, "1K<n<10K"),
        (1e5, "10K<n<100K"),
        (1e6, "100K<n<1M"),
        (1e7, "1M<n<10M"),
        (1e8, "10M<n<100M"),
    ]
    matter["size_categories"] = [next((name for top, name in bounds if kept < top), "100M<n<1B")]
    matter["tags"] = ["dataset-quantization", "coreset", "data-selection"]
    split = base_split(source["split"])
    matter["configs"] = [
        {
            "config_name": "default",
            "data_files": [{"split": split, "path": "subset/*.parquet"}],
            "default": True,
        },
        {
            "config_name": "selection",
            "data_files": [{"split": split, "path": "selection.parquet"}],
        },
    ]
    return matter


def _name_source(source: dict[str, Any]) -> str:
    name = f"`{Path(source['name']).name}`, split `{source['split']}`"
    if source["kind"] == "hub":
        commit = source["revision"] or "not known"
        return f"[{source['name']}](https://huggingface.co/datasets/{source['name']}) " + (
            f"(split `{source['split']}`, revision `{commit}`)"
        )
    return {"memory": "a dataset that was given in memory"}.get(source["kind"], f"the local {name}")


def _loading(split: str, has_patches: bool) -> str:
    whole = (
        "\n\nfrom dq_multimodal.patches import restore\n\n"
        'subset = restore(subset, fill="mean")  # images again; or fill="mae", mae_model=...'
    )
    return (
        "```python\nfrom datasets import load_dataset\n\n"
        f'subset = load_dataset("{REPO_ID}", split="{base_split(split)}")\n'
        f'selection = load_dataset("{REPO_ID}", "selection", split="{base_split(split)}")'
        "  # one row a source row" + (whole if has_patches else "") + "\n```\n\n"
        "Other sizes and methods, without an encoder: "
        f"`dq-multimodal resample {REPO_ID} --keep-ratio 0.05`."
    )


def _settings(config: dict[str, Any]) -> list[list[str]]:
    request, rows, model = config["request"], config["rows"], config["embedding"]
    settings = {name: request[name] for name in ("method", "keep_ratio", "seed")}
    if config["bins"] != "none":
        settings |= {name: request[name] for name in ("draw", "n_bins", "similarity")}
        if request.get("partition") is not None:
            settings["partition"] = f"{request['partition']}: bins in each part"
    if request["method"] == "adq":
        names = ("alpha", "representativeness", "importance", "norm")
        settings |= {name: request[name] for name in names}
    settings["label_column"] = config["label_column"] or "none: one stratum"
    if model is not None:
        shown = {key: _without_folders(value) for key, value in model.items()}
        settings["embedding"] = ", ".join(f"{k} {v}" for k, v in shown.items() if v is not None)
        if rows is not None and "model" in model:
            what = rows.get("template", ", ".join(rows["columns"]))
            settings[f"embedded {rows['modality']}"] = f"{what} ({rows['shape']})"
    if request["drop_ratio"]:
        names = ("drop_ratio", "attribution", "patch_coding", "min_psnr")
        settings |= {name: request[name] for name in names if request[name] is not None}
        settings["patch_size"] = f"{config['patches']['patch_size']} px"
    return [[name, f"`{_escape(str(value))}`"] for name, value in settings.items()]


def _without_folders(value: Any) -> Any:
    """Leave out the folders of this machine that a file or model may be named by."""
    return Path(value).name if isinstance(value, str) and is_local(value) else value


def _bin_table(run_folder: Path) -> str:
    table = read_table(run_folder, BINS_FILE)
    if table["bin"].null_count:
        return "No bins: the rows were drawn at random."
    totals = [("size", "sum"), ("kept", "sum"), *((name, "min") for name in SCORES)]
    by_bin = table.group_by("bin").aggregate(totals).sort_by("bin")
    has_scores = any(by_bin[f"{name}_min"].null_count < len(by_bin) for name in SCORES)
    lines = [
        [str(row["bin"]), f"{row['size_sum']:,}", f"{row['kept_sum']:,}"]
        + [_number(row[f"{name}_min"]) for name in SCORES if has_scores]
        for row in by_bin.to_pylist()
    ]
    return _table(["bin", "rows", "kept", *(SCORES if has_scores else ())], lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _figures(run_folder: Path) -> list[str]:
    """Show the figures that the report left for the card."""
    shown = [
        f"![{text}]({FIGURES}/{name})"
        for name, text in FIGURE_TEXTS.items()
        if (run_folder / FIGURES / name).is_file()
    ]
    return ["## Figures", *shown] if shown else []


def _licence(source: dict[str, Any]) -> str:
    if source.get("license"):
        return f"That of the source, which states: `{source['license']}`."
    return (
        "That of the source. It was not recorded, because the source states none or is a local "
        "file: whoever publishes this subset has to name it here."
    )


def _table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
