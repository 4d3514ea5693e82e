"""The dataset card of a run: what the subset is, where it is from, how it was made."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dq_multimodal.card_parts import LICENCE, Card, Matter, plain_card, read_card
from dq_multimodal.config import CompressConfig
from dq_multimodal.data.local import last_part, short_name
from dq_multimodal.data.splits import base_split
from dq_multimodal.files import open_parquet, read_text, write_text
from dq_multimodal.markdown import clean, code, escape, table
from dq_multimodal.stages.selection import BINS_FILE, SCORES, read_table
from dq_multimodal.stages.subset import subset_files

CARD = "README.md"
MAX_BYTES = 10_000_000
HUB = "https://huggingface.co/datasets/"
SAFE_IN_LINKS = ":/?#[]@!$&'()*+,;=%~"
MARKING = ("keep_rows", "difficulty", "noise_ratio", "drop_duplicates", "cap_by", "cap")
"""Settings of any method, shown where they are set."""
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

TARGETED = (
    " A share of the rows was picked for a target, whose rows took turns to pick their nearest row "
    "that was left."
)
METHODS = {
    "adq": "Adaptive Dataset Quantization: the rows were parted into disjoint bins by greedy "
    "GraphCut gains, every bin was scored for representativeness and diversity, and gave a share "
    "that grows with its importance",
    "dq": "Dataset Quantization: the rows were parted into disjoint bins by greedy GraphCut gains, "
    "and every bin gave the same share of its rows",
    "graphcut": "GraphCut: one greedy run over all rows, the first picks were kept",
    "random": "seeded random selection, the baseline of every coreset method",
    "blocks": "balanced random selection: of every part of similar rows, however small, the same "
    "share is drawn",
    "coverage": "coverage (facility location, as in CRAIG, arXiv:1906.01827): each row picked is "
    "the one that brings all rows of its stratum nearest to a picked row",
    "ccs": "coverage-centric selection (CCS, arXiv:2210.15809): rows likely to be labelled wrong "
    "go last, and every level of the area under the margin gives as many rows as the others",
    "dual": "DUAL (arXiv:2502.06905): a random sample that favours rows which are hard and "
    "uncertain in training, the less so the smaller the sample",
}


def write_card(run_folder: Path, config: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Write the card of a run folder; what others wrote into the one that is there stays."""
    there = open_card(run_folder, config, manifest)
    matter, body = make_matter(config, manifest), make_body(run_folder, config, manifest)
    write_text(run_folder / CARD, there.with_section(matter, body))


def clear_card(run_folder: Path, config: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Take what is ours out of the card of a run that is to be replaced."""
    path = run_folder / CARD
    if not path.is_file():
        return
    left = open_card(run_folder, config, manifest).without_section()
    if left.strip():
        write_text(path, left)
    else:
        path.unlink()


def open_card(
    run_folder: Path, config: dict[str, Any], manifest: dict[str, Any], repo_id: str = REPO_ID
) -> Card:
    """Read the card beside a run; one of an earlier release that nobody changed is an empty one.

    Raises:
        InputError: If it is no text file, or too large.
    """
    path = run_folder / CARD
    try:
        text = read_text(path, MAX_BYTES)
    except FileNotFoundError:
        return Card()
    card = read_card(text)
    if card.has_section:
        return card
    try:
        body = make_body(run_folder, config, manifest, repo_id)
        is_untouched = text == plain_card(make_matter(config, manifest), body)
    except (LookupError, TypeError, ValueError, OSError):  # a run that is not whole
        is_untouched = False
    return Card() if is_untouched else card


def make_matter(config: dict[str, Any], manifest: dict[str, Any]) -> Matter:
    """Give the YAML front matter that the Hub reads.

    It makes config `default` the subset and config `selection` the table of all source rows, both
    here and on the Hub.
    """
    return _front_matter(clean(_title(config, manifest)), config["source"], manifest["kept"])


def _title(config: dict[str, Any], manifest: dict[str, Any]) -> str:
    ratio = f"{100 * manifest['kept'] / manifest['rows']:.4g} %"
    return f"{short_name(config['source']['name'])}, {ratio} by {config['request']['method']}"


def make_body(
    run_folder: Path, config: dict[str, Any], manifest: dict[str, Any], repo_id: str = REPO_ID
) -> str:
    """Write our section of the card, all but the front matter."""
    request, source = config["request"], config["source"]
    rows, kept, sizes = manifest["rows"], manifest["kept"], manifest["bytes"]
    parts = [
        f"# {escape(_title(config, manifest))}",
        f"**{kept:,} of the {rows:,} rows** of {_name_source(source)}, a smaller set to train on. "
        + (DROPPED if request["drop_ratio"] else UNTOUCHED)
        + " Dataset quantization has nothing to do with the quantization of model weights.",
        "## How to load it",
        _loading(repo_id, source["split"], bool(request["drop_ratio"])),
        "`dq_row` is the number of the row in the source, `dq_bin` and `dq_rank` tell its place.",
        *_weighing(run_folder, repo_id, source["split"]),
        "## How it was made",
        METHODS[request["method"]] + "." + (TARGETED if request.get("target") else ""),
        table(["setting", "value"], _settings(config)),
        "## Before and after",
        table(
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
        parts += ["## Notes on the rows", "\n".join(f"- {escape(n)}" for n in manifest["notes"])]
    seen = "embeddings of the rows, never at a trained model's results"
    if config.get("dynamics"):
        seen = "how a model learned the rows, never at what one learns from the subset"
    parts += [
        "## Limits",
        f"The selection looks at {seen}. "
        "Whether the subset trains as well as the whole has to be measured for each model and "
        "task; random selection of the same size is a strong baseline. Errors and biases of the "
        "source are still here.",
        "## Licence",
        _licence(source),
        "## Citation",
        CITATIONS,
    ]
    return "\n\n".join(parts)


def _image_bytes(sizes: dict[str, Any]) -> list[list[str]]:
    """Compare the images of the kept rows, source files against patch records."""
    if "stored_images" not in sizes:
        return []
    before, after = sizes["source_images"], sizes["stored_images"]
    return [["bytes of the images of the kept rows", f"{before:,}", f"{after:,}"]]


def _front_matter(title: str, source: dict[str, Any], kept: int) -> Matter:
    matter: Matter = {"pretty_name": title}
    if source.get("license"):
        matter |= {key: source[key] for key in LICENCE if source.get(key)}
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
    split = code(source["split"])
    if source["kind"] == "hub":
        commit = code(source["revision"] or "not known")
        address = f"[{escape(source['name'])}]({HUB}{source['name']})"
        return f"{address} (split {split}, revision {commit})"
    name = f"{code(Path(source['name']).name)}, split {split}"
    return {"memory": "a dataset that was given in memory"}.get(source["kind"], f"the local {name}")


def _loading(repo_id: str, split: str, has_patches: bool) -> str:
    repo, part = (json.dumps(clean(text)) for text in (repo_id, base_split(split)))
    whole = (
        "\n\nfrom dq_multimodal.patches import restore\n\n"
        'subset = restore(subset, fill="mean")  # images again; or fill="mae", mae_model=...'
    )
    return (
        "```python\nfrom datasets import load_dataset\n\n"
        f"subset = load_dataset({repo}, split={part})\n"
        f'selection = load_dataset({repo}, "selection", split={part})'
        "  # one row a source row" + (whole if has_patches else "") + "\n```\n\n"
        "Other sizes and methods, without an encoder: "
        f"`dq-multimodal resample {repo_id} --keep-ratio 0.05`."
    )


def _weighing(run_folder: Path, repo_id: str, split: str) -> list[str]:
    """Say how to train with the weights, where the rows of the subset have them."""
    with open_parquet(subset_files(run_folder)[0]) as file:
        if "dq_weight" not in file.schema_arrow.names:
            return []
    repo, part = (json.dumps(clean(text)) for text in (repo_id, base_split(split)))
    return [
        "## Train with the weights",
        "`dq_weight` says how many rows of the source a row stands for; its mean is 1. Without the "
        "weights the subset shows a model more of what is rare than the source does. As loss "
        "weights:\n\n```python\n"
        'losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")\n'
        'loss = (batch["dq_weight"] * losses).mean()\n'
        "loss.backward()\n```\n\nOr, with the usual loss, as the chance of a row to be drawn:\n\n"
        "```python\n"
        f'weights = load_dataset({repo}, split={part})["dq_weight"]\n'
        "sampler = torch.utils.data.WeightedRandomSampler(weights, len(weights))\n"
        "loader = torch.utils.data.DataLoader(subset, batch_size=64, sampler=sampler)\n```",
    ]


def _settings(config: dict[str, Any]) -> list[list[str]]:
    request, rows, model = config["request"], config["rows"], config["embedding"]
    settings = {name: request[name] for name in ("method", "keep_ratio", "seed")}
    settings |= {name: request[name] for name in MARKING if request.get(name) is not None}
    noise_share = CompressConfig.from_dict(request).noise_share
    if noise_share:
        settings["noise_ratio"] = noise_share
    if request.get("target") is not None:
        settings["target"] = last_part(request["target"])
        settings["target_share"] = request["target_share"]
        if request.get("target_model") is not None:
            settings["target_model"] = last_part(request["target_model"])
            settings["target_gradients"] = request["target_gradients"]
    if config["bins"] in ("dq", "graphcut"):
        settings |= {name: request[name] for name in ("draw", "n_bins", "similarity")}
    if config["bins"] != "none" and request.get("partition") is not None:
        settings["partition"] = f"{request['partition']}: bins in each part"
    if request["method"] == "adq":
        names = ("alpha", "representativeness", "importance", "norm")
        settings |= {name: request[name] for name in names}
    settings["label_column"] = config["label_column"] or "none: one stratum"
    if model is not None:
        shown = {
            **model,
            **{key: last_part(model[key]) for key in ("model", "file") if key in model},
        }
        settings["embedding"] = ", ".join(f"{k} {v}" for k, v in shown.items() if v is not None)
        if rows is not None and "model" in model:
            what = rows.get("template", ", ".join(rows["columns"]))
            settings[f"embedded {rows['modality']}"] = f"{what} ({rows['shape']})"
    if request["drop_ratio"]:
        names = ("drop_ratio", "attribution", "patch_coding", "min_psnr")
        settings |= {name: request[name] for name in names if request[name] is not None}
        settings["patch_size"] = f"{config['patches']['patch_size']} px"
    return [[escape(name), code(str(value))] for name, value in settings.items()]


def _bin_table(run_folder: Path) -> str:
    bins = read_table(run_folder, BINS_FILE)
    if bins["bin"].null_count:
        return "This method makes no bins."
    totals = [("size", "sum"), ("kept", "sum"), *((name, "min") for name in SCORES)]
    by_bin = bins.group_by("bin").aggregate(totals).sort_by("bin")
    has_scores = any(by_bin[f"{name}_min"].null_count < len(by_bin) for name in SCORES)
    lines = [
        [str(row["bin"]), f"{row['size_sum']:,}", f"{row['kept_sum']:,}"]
        + [_number(row[f"{name}_min"]) for name in SCORES if has_scores]
        for row in by_bin.to_pylist()
    ]
    return table(["bin", "rows", "kept", *(SCORES if has_scores else ())], lines)


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
    stated, name, link = (source.get(key) for key in LICENCE)
    if not stated:
        return (
            "That of the source. It was not recorded, because the source states none or is a local "
            "file: whoever publishes this subset has to name it here."
        )
    found = ", ".join(
        code(str(part)) for part in (stated if isinstance(stated, list) else [stated])
    )
    if name:
        found += f", {escape(str(name))}"
    if link and "://" not in str(link):  # a file of the source
        link = f"{HUB}{source['name']}/blob/{source['revision'] or 'main'}/{link}"
    return (
        f"That of the source, which states: {found}"
        + (f" (<{quote(str(link), SAFE_IN_LINKS)}>)" if link else "")
        + "."
    )
