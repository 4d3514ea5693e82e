"""How one forges a run: documents that are changed, and a manifest that says that all is right."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dq_multimodal.files import describe_file

ORDER, NUMBERS, ROWS, BINS, FILES = range(5)
"""Places of the checks of verify."""
RUN_FILES = {"config.yaml", "manifest.json", "README.md", "embeddings.npy"}
RUN_FILES |= {"selection.parquet", "bins.parquet", "subset"}
SUBSET = "subset/part-00000.parquet"


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


def record_again(run):
    """Make the manifest say that all is as it was written, as one who forges can."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"] = {
        name: describe_file(run / name) for name in manifest["files"] if (run / name).exists()
    }
    manifest["bytes"]["subset_files"] = manifest["files"][SUBSET]["bytes"]
    (run / "manifest.json").write_text(json.dumps(seal(manifest)))


def change_table(run, name, column, change):
    """Change a column of one of the tables of a run."""
    table = pq.read_table(run / name)
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, change(table[column])), run / name)


def swap(column):
    """Give the column with its first and last values in each other's place."""
    values = column.to_pylist()
    return pa.array([values[-1], *values[1:-1], values[0]], column.type)
