"""The dataset card of a condensed set."""

import json
from pathlib import Path
from typing import Any

from dq_multimodal import card
from dq_multimodal.card import Matter, clean, code, escape
from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.documents import PICTURES, CondensedConfig, CondensedManifest
from dq_multimodal.data.local import last_part, short_name
from dq_multimodal.files import count

OF_ALL = ("method", "images_per_class", "init", "iterations", "learning_rate", "real_batch")
OF_METHOD: dict[str, tuple[str, ...]] = {
    "dm": ("net", "net_width"),
    "dc": ("inner_loops", "net_steps", "net", "net_width"),
    "krr": ("kernel", "ridge", "learn_labels", "net", "net_width"),
    "mtt": ("experts", "expert_epochs", "student_steps", "max_start_epoch", "net", "net_width"),
}
"""Settings that count."""
SHOWN_CLASSES = 20
"""Names of classes that the card lists; the type of the label column has all of them."""


def make_matter(config: CondensedConfig, manifest: CondensedManifest) -> Matter:
    """Give the YAML front matter that the Hub reads; the one split is train."""
    matter = card.begin_matter(title_of(config, manifest), config.source, manifest.rows)
    matter["task_categories"] = ["image-classification"]
    matter["tags"] = ["dataset-condensation", "dataset-distillation", "synthetic"]
    files = [{"split": "train", "path": "data/train-*.parquet"}]
    matter["configs"] = [{"config_name": "default", "data_files": files, "default": True}]
    return matter


def title_of(config: CondensedConfig, manifest: CondensedManifest) -> str:
    """Name a set by its source, size and method."""
    how = config.request.method.upper() + (", multisize" if config.request.multisize else "")
    pictures = count(manifest.images_per_class, "synthetic image")
    return f"{short_name(config.source.name)}, {pictures} a class by {how}"


def list_settings(request: CondenseConfig, manifest: CondensedManifest) -> dict[str, str]:
    """Give the settings that counted, by name, without folders of this machine."""
    asked = request.as_dict()
    names = [*OF_ALL, *OF_METHOD[request.method], "augment", "stored_as", "seed"]
    if request.multisize:
        names += ["multisize", "multisize_choice"]
        names += ["multisize_period"] if request.multisize_choice == "learnable" else []
    shown: dict[str, Any] = {name: asked[name] for name in names}
    shown |= {name: last_part(shown[name]) for name in ("init", "experts") if shown.get(name)}
    shown["augment"] = ", ".join(request.augment)
    kind = "grey" if manifest.channels == 1 else "colour"
    shown["images"] = f"{manifest.side} x {manifest.side} px, {kind}"
    return {name: str(value) for name, value in shown.items()}


def make_body(
    place: Path,
    config: CondensedConfig,
    manifest: CondensedManifest,
    repo_id: str = card.REPO_ID,
) -> str:
    """Write our section of the card, all but the front matter; see report/templates."""
    request, names = config.request, manifest.classes
    settings = list_settings(request, manifest)
    listed = [code(name) or "(no name)" for name in names[:SHOWN_CLASSES]]
    return card.open_template("condensed.md").render(
        request=request,
        manifest=manifest,
        title=escape(title_of(config, manifest)),
        source=card.name_source(config.source),
        licence=card.tell_licence(config.source),
        repo=json.dumps(clean(repo_id)),
        classes=", ".join(listed) + (", ..." if len(names) > len(listed) else ""),
        n_classes=len(names),
        net=code(request.net),
        image_column=code(config.image_column),
        label_column=code(config.label_column),
        settings=[[escape(name), code(value)] for name, value in settings.items()],
        notes=[escape(note) for note in manifest.notes],
        pictures=PICTURES if (place / PICTURES).is_file() else None,
        table=card.table,
        mean=[round(value, 6) for value in manifest.mean],
        spread=[round(value, 6) for value in manifest.spread],
        has_soft_labels=bool(manifest.bytes.soft_labels),
    )
