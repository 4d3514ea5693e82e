"""The dataset card of a run: what the subset is, where it is from, how it was made.

Others write in cards too: our section lies between two markers, the rest is theirs.
"""

import json
import re
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from dq_multimodal.config import InputError
from dq_multimodal.data.local import last_part, short_name
from dq_multimodal.data.source import LICENCE
from dq_multimodal.data.splits import base_split
from dq_multimodal.files import open_parquet, parse_yaml, read_text, write_text
from dq_multimodal.manifest import Config, Manifest, Model, Origin
from dq_multimodal.stages.selection import BINS_FILE, SCORES, read_table
from dq_multimodal.stages.subset import files_by_split, subset_files

if TYPE_CHECKING:
    from jinja2 import Template

CARD = "README.md"
MAX_BYTES, MAX_HEAD = 10_000_000, 1_000_000
HUB = "https://huggingface.co/datasets/"
SAFE_IN_LINKS = ":/?#[]@!$&'()*+,;=%~"
MARKING = ("keep_rows", "difficulty", "noise_ratio", "drop_duplicates", "cap_by", "cap")
"""Settings of any method, shown where they are set."""
REPO_ID = "OWNER/NAME"
"""Stands for the repository until the card is pushed to one."""

FIGURES = "figures"
FIGURE_TEXTS = {
    "map.png": "Map of the rows by their embeddings, coloured by bin, kept rows marked",
    "bins.png": "Scores of the bins, and how many of their rows were kept",
    "coverage.png": "How far every row is from its nearest kept row, beside random selection",
}

BEGIN = "<!-- dq-multimodal: begin -->"
END = "<!-- dq-multimodal: end -->"
SECTION = re.compile(f"{BEGIN}((?:(?!{BEGIN}).)*?){END}", re.DOTALL)
WROTE = "<!-- front matter: {} -->"
"""The second line of our section: the front matter that it came with."""
READ_WROTE = re.compile("^{}(.*){}$".format(*WROTE.split("{}")), re.MULTILINE)
HEAD = re.compile(r"\ufeff?---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)

SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B"]
"""Categories of the Hub by the digits of the number of rows, from three digits on."""

Matter = dict[str, Any]

STEERING = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of characters that are no text: controls, halves of pairs, line separators."""
TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of all that follows."""


def write_card(run_folder: Path, config: Config, manifest: Manifest) -> None:
    """Write the card of a run folder; what others wrote into the one that is there stays."""
    matter = make_matter(run_folder, config, manifest)
    write_section(run_folder, matter, make_body(run_folder, config, manifest))


def write_section(folder: Path, matter: Matter, body: str) -> None:
    """Write our part of the card of a folder."""
    write_text(folder / CARD, open_card(folder).with_section(matter, body))


def clear_card(run_folder: Path) -> None:
    """Take what is ours out of the card of a run that is to be replaced."""
    path = run_folder / CARD
    if not path.is_file():
        return
    if (left := open_card(run_folder).without_section()).strip():
        write_text(path, left)
    else:
        path.unlink()


def open_card(run_folder: Path) -> "Card":
    """Read the card beside a run; InputError if it is no text file, or too large."""
    try:
        return read_card(read_text(run_folder / CARD, MAX_BYTES))
    except FileNotFoundError:
        return Card()


def make_matter(run_folder: Path, config: Config, manifest: Manifest) -> Matter:
    """Give the YAML front matter that the Hub reads.

    It makes config `default` the subset, by splits if it has several, and config `selection`
    the table of all source rows, both here and on the Hub.
    """
    source = config.source
    matter = begin_matter(_title(config, manifest), source, manifest.kept)
    matter["tags"] = ["dataset-quantization", "coreset", "data-selection"]

    def files(paths: dict[str, Any]) -> list[Matter]:
        return [{"split": split, "path": path} for split, path in paths.items()]

    split = base_split(source.split)
    parts = files_by_split(run_folder, source.splits) if source.splits else None
    data = files(parts or {split: "subset/*.parquet"})
    table_of_all = files({split: "selection.parquet"})
    matter["configs"] = [
        {"config_name": "default", "data_files": data, "default": True},
        {"config_name": "selection", "data_files": table_of_all},
    ]
    return matter


def begin_matter(title: str, source: Origin, n_rows: int) -> Matter:
    """Give the front matter of so many rows that were made from a source."""
    matter: Matter = {"pretty_name": clean(title)}
    if source.license:
        matter |= {key: source[key] for key in LICENCE if source[key]}
    if source.kind == "hub":
        matter["source_datasets"] = [source.name]
    digits = len(str(n_rows))
    return matter | {"size_categories": [SIZES[min(max(digits - 3, 0), len(SIZES) - 1)]]}


def _title(config: Config, manifest: Manifest) -> str:
    ratio = f"{100 * manifest.kept / manifest.rows:.4g} %"
    return f"{short_name(config.source.name)}, {ratio} by {config.request.method}"


def make_body(run_folder: Path, config: Config, manifest: Manifest, repo_id: str = REPO_ID) -> str:
    """Write our section of the card, all but the front matter; see report/templates/card.md."""
    source, split = config.source, json.dumps(clean(base_split(config.source.split)))
    with open_parquet(subset_files(run_folder)[0]) as file:
        has_weights = "dq_weight" in file.schema_arrow.names
    return open_template("card.md").render(
        request=config.request,
        manifest=manifest,
        table=table,
        title=escape(_title(config, manifest)),
        source=name_source(source),
        repo_id=repo_id,
        repo=json.dumps(clean(repo_id)),
        split=split,
        part="" if source.splits else f", split={split}",  # without it a DatasetDict
        has_weights=has_weights,
        has_dynamics=bool(config.dynamics),
        settings=[[escape(name), code(v)] for name, v in list_settings(config).items()],
        sizes=_sizes(manifest),
        bins=_bin_table(run_folder),
        figures=[f for f in FIGURE_TEXTS.items() if (run_folder / FIGURES / f[0]).is_file()],
        notes=[escape(note) for note in manifest.notes],
        licence=tell_licence(source),
    )


def open_template(name: str) -> "Template":
    """Open the template of a card; names are to be escaped for Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("dq_multimodal", "report/templates")
    page = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return page.get_template(name)


def _sizes(manifest: Manifest) -> list[list[str]]:
    """Compare source and subset; of dropped patches, source files against patch records."""
    sizes = manifest.bytes
    compared = {
        "rows": (manifest.rows, manifest.kept),
        "bytes (source columns, uncompressed Arrow)": (sizes.source_data, sizes.subset_data),
        "bytes of the images of the kept rows": (sizes.source_images, sizes.stored_images),
        "bytes of the files": (sizes.source_files, sizes.subset_files),
    }
    return [
        [what, "not known" if before is None else f"{before:,}", f"{after:,}"]
        for what, (before, after) in compared.items()
        if after is not None
    ]


def name_source(source: Origin) -> str:
    """Say where rows are from, as Markdown."""
    split = code(source.split)
    if source.kind == "hub":
        commit = code(source.revision or "not known")
        return f"[{escape(source.name)}]({HUB}{source.name}) (split {split}, revision {commit})"
    if source.kind == "memory":
        return "a dataset that was given in memory"
    return f"the local {code(Path(source.name).name)}, split {split}"


def list_settings(config: Config) -> dict[str, str]:
    """Give the settings that counted, by name, without folders of this machine."""
    request, rows, model = config.request, config.rows, config.embedding
    asked = request.as_dict()
    shown = ["method", "keep_ratio", "seed"]
    shown += [name for name in MARKING if asked[name] is not None]
    settings = {name: asked[name] for name in shown}
    if request.noise_share:
        settings["noise_ratio"] = request.noise_share
    if request.target is not None:
        settings["target"] = last_part(request.target)
        settings["target_share"] = request.target_share
    if request.target_model is not None:
        settings["target_model"] = last_part(request.target_model)
        settings["target_gradients"] = request.target_gradients
    if config.bins in ("dq", "graphcut"):
        settings |= {name: asked[name] for name in ("draw", "n_bins", "similarity")}
    if config.bins != "none" and request.partition is not None:
        settings["partition"] = f"{request.partition}: bins in each part"
    if request.method == "adq":
        names = ("alpha", "representativeness", "importance", "norm")
        settings |= {name: asked[name] for name in names}
    settings["label_column"] = config.label_column or (
        "none: the splits are the strata" if config.source.splits else "none: one stratum"
    )
    if model is not None:
        settings["embedding"] = _list_facts(model)
        halves = {"image": model.image, "text": model.text}
        settings |= {f"embedding of the {n}": _list_facts(m) for n, m in halves.items() if m}
        if rows is not None and (model.model or model.image) is not None:
            texts = [rows.template] if rows.template else rows.columns
            what = ", ".join([*(rows.image_columns or []), *texts])
            settings[f"embedded {rows.modality}"] = f"{what} ({rows.shape})"
    if config.patches is not None:
        names = ("drop_ratio", "attribution", "patch_coding", "min_psnr")
        settings |= {name: asked[name] for name in names if asked[name] is not None}
        settings["patch_size"] = f"{config.patches.patch_size} px"
    return {name: str(value) for name, value in settings.items()}


def _list_facts(model: Model) -> str:
    """Give what is recorded of a model in one line, but for the models of its halves."""
    facts = {key: value for key, value in model.as_dict().items() if not isinstance(value, dict)}
    facts |= {key: last_part(facts[key]) for key in ("model", "file") if key in facts}
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _bin_table(run_folder: Path) -> str:
    bins = read_table(run_folder, BINS_FILE)
    if bins["bin"].null_count:
        return "This method makes no bins."
    totals = [("size", "sum"), ("kept", "sum"), *((name, "min") for name in SCORES)]
    by_bin = bins.group_by("bin").aggregate(totals).sort_by("bin")
    has_scores = any(by_bin[f"{name}_min"].null_count < len(by_bin) for name in SCORES)
    shown = SCORES if has_scores else ()
    lines = [
        [str(row["bin"]), f"{row['size_sum']:,}", f"{row['kept_sum']:,}"]
        + ["" if x is None else f"{x:.4g}" for x in (row[f"{s}_min"] for s in shown)]
        for row in by_bin.to_pylist()
    ]
    return table(["bin", "rows", "kept", *shown], lines)


def tell_licence(source: Origin) -> str:
    """Say under which licence rows of a source are, as Markdown."""
    if not source.license:
        return (
            "That of the source. It was not recorded, because the source states none or is a local "
            "file: whoever publishes this set has to name it here."
        )
    stated = source.license if isinstance(source.license, list) else [source.license]
    found = ", ".join(code(str(part)) for part in stated)
    if source.license_name:
        found += f", {escape(str(source.license_name))}"
    if link := str(source.license_link or ""):
        if "://" not in link:  # a file of the source
            link = f"{HUB}{source.name}/blob/{source.revision or 'main'}/{link}"
        found += f" (<{quote(link, SAFE_IN_LINKS)}>)"
    return f"That of the source, which states: {found}."


@dataclass(frozen=True)
class Card:
    """A card in parts."""

    head: str = ""  # text of the front matter, without its rules
    matter: Matter = field(default_factory=dict)  # what it says
    before: str = ""  # text before our section
    after: str = ""  # after it; all of the text where there is none
    wrote: Matter = field(default_factory=dict)  # by us, so that what was typed in since is known

    def merge(self, matter: Matter) -> Matter:
        """Give our front matter with what was typed into this one; see `with_section`."""
        return _merge(self.matter, matter, self.wrote)

    def with_text_of(self, other: "Card") -> "Card":
        """Add the paragraphs of another card that this one lacks."""
        before, after = _lacking(self, other.before), _lacking(self, other.after)
        return replace(self, before=_join(self.before, before), after=_join(self.after, after))

    def with_section(self, matter: Matter, body: str, typed: Matter | None = None) -> str:
        """Give the text of the card with a section of ours, in the place of the one before.

        Of the front matter stay the entries that are not ours and those that were typed in since
        we wrote it; our tags and configs go beside others. The licence is ours if we name one.
        Typed is our front matter with what was typed into it elsewhere.
        """
        wrote = json.dumps(matter, default=str).replace("<", "\\u003c").replace(">", "\\u003e")
        section = f"{BEGIN}\n{WROTE.format(wrote)}\n\n{body}\n\n{END}"
        return f"---\n{self._merge_head(typed or matter)}---\n\n" + _join(
            self.before, section, self.after
        )

    def without_section(self) -> str:
        """Give the text of the card without what we wrote; "" where nothing is left."""
        head = self._merge_head({})
        return (f"---\n{head}---\n\n" if head.strip() else "") + _join(self.before, self.after)

    def _merge_head(self, ours: Matter) -> str:
        """Merge our front matter into the text of this one, whose other lines stay as they are."""
        theirs, merged = self.matter, _merge(self.matter, ours, self.wrote)
        if merged == theirs:
            return self.head
        is_kept = {key: key in merged and merged[key] == theirs[key] for key in theirs}
        kept = "".join(text for key, text in _entries(self.head, theirs) if is_kept.get(key, True))
        changed = [key for key in {**ours, **merged} if key in merged and not is_kept.get(key)]
        text = kept + _dump({key: merged[key] for key in changed})
        return text if _parse_head(text) == merged else _dump(merged)


def read_card(text: str) -> Card:
    """Part a card; a front matter that is no mapping, or none of ours, counts as text."""
    text = text.replace("\r\n", "\n")
    head, matter, found = "", {}, HEAD.match(text)
    if found and (parsed := _parse_head(found.group(1))) is not None:
        head, matter, text = found.group(1), parsed, text[found.end() :]
    section = SECTION.search(text)
    if section is None:
        return Card(head, matter, after=text)
    before, after = text[: section.start()], text[section.end() :]
    return Card(head, matter, before, after, _read_wrote(section.group(1)))


def _parse_head(head: str) -> Matter | None:
    try:
        found = parse_yaml(head) or {} if len(head) < MAX_HEAD else None
    except InputError:
        found = None
    return found if isinstance(found, dict) else None


def _read_wrote(section: str) -> Matter:
    line = READ_WROTE.search(section)
    try:
        found = json.loads(line.group(1)) if line else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def _join(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _lacking(card: Card, text: str) -> str:
    paragraphs = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    return "\n\n".join(p for p in paragraphs if p not in card.before and p not in card.after)


def _entries(head: str, matter: Matter) -> list[tuple[Any, str]]:
    """Give the text of each entry with its key; what stands before the first has none."""
    if not matter:
        return [(None, head)]
    node: Any = yaml.compose(head, yaml.SafeLoader)
    starts = [key.start_mark.index for key, _ in node.value]
    if len(starts) != len(matter):
        return []
    ends = [*starts[1:], len(head)]
    texts = [head[start:end] for start, end in zip(starts, ends, strict=True)]
    return [(None, head[: starts[0]]), *zip(matter, texts, strict=True)]


def _merge(theirs: Matter, ours: Matter, wrote: Matter) -> Matter:
    merged = {key: value for key, value in theirs.items() if key not in LICENCE}
    for key in {key: 0 for key in (*wrote, *ours) if key not in LICENCE}:
        value: Any
        now, mine, old = theirs.get(key), ours.get(key), wrote.get(key)
        if isinstance(mine or old, list):
            value = _unite(_as_list(mine), _as_list(now), _as_list(old))
        else:
            value = now if key in theirs and now != old else mine
        if value in (None, []):
            merged.pop(key, None)
        else:
            merged[key] = value
    stated = {key: ours[key] for key in LICENCE if key in ours}
    typed = {key: theirs[key] for key in LICENCE if theirs.get(key) != wrote.get(key)}
    typed = {key: value for key, value in typed.items() if key in theirs}
    is_the_same = stated.get("license") == theirs.get("license")
    return merged | (typed | stated if is_the_same or not stated else stated)


def _unite(mine: list[Any], now: list[Any], old: list[Any]) -> list[Any]:
    """Put our entries beside those of others; configs are told apart by their names."""

    def name(entry: Any) -> Any:
        return entry.get("config_name") if isinstance(entry, dict) else entry

    names = [name(entry) for entry in mine]
    others = [entry for entry in now if entry not in old and name(entry) not in names]
    # in their order, so that a card that says all already does not change
    found = [entry for entry in now if entry in mine or entry in others]
    return found + [entry for entry in mine if entry not in found]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _dump(matter: Matter) -> str:
    return yaml.safe_dump(matter, sort_keys=False) if matter else ""


def clean(text: str) -> str:
    """Put a text on one line, without characters that only steer what shows it."""
    found = (
        " " if c.isspace() else "\ufffd" if unicodedata.category(c) in STEERING else c
        for c in text
        if c not in TURNING
    )
    return " ".join("".join(found).split())


def escape(text: str) -> str:
    """Give a text that Markdown shows as it is, on one line, wherever it stands."""
    text = re.sub(r"([\\`*\[\]|~$#])", r"\\\1", clean(text))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word it is no mark
    text = text.replace("://", ":&#47;/").replace("www.", "www&#46;")  # or it becomes a link
    text = re.sub(r"&(?!#(47|46);)(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    text = re.sub(r"^([-+=>])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", text)


def code(text: str) -> str:
    """Give a text as a code span, which shows it letter for letter; "" has none."""
    text = clean(text)
    if not text:
        return ""
    if "<!--" in text or "|" in text:  # the marks of our section; the walls of a table
        return escape(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(head: list[str], lines: list[list[str]]) -> str:
    """Give a table of cells that are Markdown already."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])
