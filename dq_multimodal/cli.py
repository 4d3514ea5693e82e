"""The command line, `dq-multimodal`. Answers --help without loading torch."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import exceptions

from dq_multimodal.config import (
    DEFAULT_TEXT_MODEL,
    Draw,
    InputError,
    Method,
    Similarity,
    check_keep_ratio,
)

if TYPE_CHECKING:
    from dq_multimodal.run import Run

INTERRUPTED = 130

app = typer.Typer(
    help="Make training sets smaller without making models worse (Dataset Quantization).",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def parse_ratio(text: str) -> float:
    """Read a ratio in (0, 1]."""
    try:
        ratio = float(text)
        check_keep_ratio(ratio)
    except ValueError:
        hint = " (write 0.2 for 20 %)" if "%" in str(text) else ""
        raise InputError(f"keep_ratio must lie in (0, 1], got {text}{hint}") from None
    return ratio


def parse_columns(text: str | None) -> tuple[str, ...] | None:
    """Read column names parted by commas."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError(f"text_columns must be names parted by commas, got {text!r}")
    return names


KeepRatio = Annotated[
    str, typer.Option(metavar="RATIO", help="Share of the rows to keep, in (0, 1].")
]
OutputDir = Annotated[
    Path | None,
    typer.Option(help="The run folder.  [default: runs/DATASET-METHOD-RATIO]", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run in that folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
PushToHub = Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Push the result there.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
RunOrId = Annotated[
    str, typer.Argument(metavar="RUN", help="Run folder, or OWNER/NAME on the Hub.")
]


@app.command()
def compress(
    dataset: Annotated[str, typer.Argument(help="Hub id, data file or glob, or folder.")],
    split: Annotated[str, typer.Option(help="Split or slice of the source.")] = "train",
    config_name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    keep_ratio: KeepRatio = "0.2",
    method: Annotated[Method, typer.Option(help="How rows are chosen.")] = "dq",
    draw: Annotated[
        Draw, typer.Option(help="Within a bin: by seeded hash, or by rank.")
    ] = "random",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    text_columns: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Text columns, in order.  [default: detected]", show_default=False
        ),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of strata: each value is binned on its own.")
    ] = None,
    embedding_model: Annotated[
        str, typer.Option(help="sentence-transformers model id or folder.")
    ] = DEFAULT_TEXT_MODEL,
    embeddings: Annotated[
        str | None, typer.Option(help="Ready embeddings: FILE.npy, or a column.")
    ] = None,
    similarity: Annotated[Similarity, typer.Option(help="Similarity of the bins.")] = "cosine",
    n_bins: Annotated[int, typer.Option(help="Number of bins.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Rows through the encoder together.")] = 64,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Compress a dataset to a share of its rows.

    Interrupted, the same command goes on where it stopped.
    """
    from dq_multimodal.pipeline import compress as run_compress

    run = run_compress(
        dataset,
        split=split,
        config_name=config_name,
        revision=revision,
        keep_ratio=parse_ratio(keep_ratio),
        method=method,
        draw=draw,
        seed=seed,
        text_columns=parse_columns(text_columns),
        label_column=label_column,
        embedding_model=embedding_model,
        embeddings=embeddings,
        similarity=similarity,
        n_bins=n_bins,
        batch_size=batch_size,
        output_dir=output_dir,
        overwrite=overwrite,
    )
    _report(run, as_json, _push(run, push_to_hub, private))


@app.command()
def resample(
    run: RunOrId,
    keep_ratio: KeepRatio,
    method: Annotated[
        Method | None,
        typer.Option(help="Another method.  [default: the run's]", show_default=False),
    ] = None,
    draw: Annotated[
        Draw | None, typer.Option(help="Another draw.  [default: the run's]", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Another seed.  [default: the run's]", show_default=False)
    ] = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Draw another size or method from a finished run, without an encoder."""
    from dq_multimodal.hub import open_run
    from dq_multimodal.run import resample as run_resample

    drawn = run_resample(
        open_run(run),
        parse_ratio(keep_ratio),
        method=method,
        draw=draw,
        seed=seed,
        output_dir=output_dir,
        overwrite=overwrite,
    )
    _report(drawn, as_json, _push(drawn, push_to_hub, private))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    private: Private = False,
) -> None:
    """Push a finished run to the Hub, as one commit."""
    from dq_multimodal.run import Run

    typer.echo(f"pushed: {_push(Run(run), repo_id, private)}")


@app.command()
def verify(run: RunOrId, as_json: Json = False) -> None:
    """Recompute what can be recomputed of a run, and say what was compared."""
    from dataclasses import asdict

    from dq_multimodal.hub import open_run
    from dq_multimodal.verification import verify as run_verify

    checks = run_verify(open_run(run))
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            typer.echo(f"{check.result:8} {check.name}: {check.detail}")
    failed = [check.name for check in checks if check.result == "failed"]
    if failed:
        raise InputError(f"{run} is not what it says: {', '.join(failed)}")


def _push(run: "Run", repo_id: str | None, private: bool) -> str | None:
    if repo_id is None:
        return None
    from dq_multimodal.hub import push as run_push

    return run_push(run, repo_id, private=private)


def _report(run: "Run", as_json: bool, address: str | None) -> None:
    """Print what came out: a few lines for people, or one JSON document."""
    request, manifest = run.request, run.manifest
    if as_json:
        keys = ("rows", "kept", "bytes", "seconds", "notes")
        document = {"output_dir": str(run.path), "complete": True, "pushed": address}
        document["was_complete"] = run.was_complete
        document |= {"request": request.as_dict()} | {key: manifest[key] for key in keys}
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    columns = run.config["rows"]
    read_as = f" ({columns['shape']}: {', '.join(columns['columns'])})" if columns else ""
    rows, kept, sizes = manifest["rows"], manifest["kept"], manifest["bytes"]
    how: str = request.method
    if run.config["bins"] == "dq" and request.method == "dq":
        how += f", {request.n_bins} bins, {request.similarity}, {request.draw} draw"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in manifest["seconds"].items())
    lines = ["already complete: nothing was done anew"] if run.was_complete else []
    lines += [f"source   {request.dataset}, {rows:,} rows{read_as}"]
    lines += [f"note     {note}" for note in manifest["notes"]]
    lines += [
        f"kept     {kept:,} rows ({100 * kept / rows:.4g} %) by {how}, seed {request.seed}",
        f"bytes    {sizes['source_data']:,} -> {sizes['subset_data']:,} as data, "
        f"{sizes['subset_files']:,} on disk",
        f"time     {seconds}",
        f"folder   {run.path}",
    ]
    if address:
        lines.append(f"pushed   {address}")
    typer.echo("\n".join(lines))


def main(arguments: list[str] | None = None, run: Callable[..., Any] = app) -> None:
    """Run the command line: exit code 0 done, 2 wrong use or bad input, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = run(args=arguments or ["--help"], prog_name="dq-multimodal", standalone_mode=False)
    except InputError as error:
        sys.exit(_fail(str(error)))
    except exceptions.TyperException as error:
        sys.exit(_fail(error.format_message().replace("Value error, ", "")))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        sys.exit(_fail(f"cannot write: {error.strerror}; the same command goes on when it can"))
    except (exceptions.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)  # noqa: T201
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    main()
