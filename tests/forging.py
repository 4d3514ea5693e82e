"""How one forges a run: documents that are changed, and a manifest that says that all is right."""

import hashlib
import json

import yaml


def change_document(path, change):
    """Change what config.yaml or manifest.json holds, in place."""
    is_config = path.suffix == ".yaml"
    document = (yaml.safe_load if is_config else json.loads)(path.read_text())
    change(document)
    path.write_text((yaml.safe_dump if is_config else json.dumps)(document))


def seal(manifest):
    """Give a manifest its digest: that of all it holds, but for how the work went."""
    lasting = {k: v for k, v in manifest.items() if k not in ("digest", "seconds", "resumed")}
    text = json.dumps(lasting, sort_keys=True)
    return {**manifest, "digest": hashlib.sha256(text.encode()).hexdigest()}
