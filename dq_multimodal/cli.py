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
    DEFAULT_IMAGE_MODEL,
    DEFAULT_TEXT_MODEL,
    Attribution,
    Draw,
    Embedding,
    Fill,
    InputError,
    Method,
    Modality,
    PatchCoding,
    Similarity,
)
from dq_multimodal.options import (
    Json,
    KeepRatio,
    OutputDir,
    Overwrite,
    Private,
    PushToHub,
    RunOrId,
    parse_columns,
    parse_drop_ratio,
    parse_ratio,
)
from dq_multimodal.summary import summarise

if TYPE_CHECKING:
    from dq_multimodal.run import Run

INTERRUPTED = 130

app = typer.Typer(
    help="Make training sets smaller without making models worse (Dataset Quantization).",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    modality: Annotated[
        Modality, typer.Option(help="What the rows are; auto looks for a column of images.")
    ] = "auto",
    text_columns: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Text columns, in order.  [default: detected]", show_default=False
        ),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(help="Column of images.  [default: the only one]", show_default=False),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column of strata: each value is binned on its own; that of images is found, "
            "none leaves it aside."
        ),
    ] = None,
    embedding_model: Annotated[
        str | None,
        typer.Option(
            help="sentence-transformers, timm or transformers id, or a folder.  "
            f"[default: {DEFAULT_TEXT_MODEL}, {DEFAULT_IMAGE_MODEL}]",
            show_default=False,
        ),
    ] = None,
    embedding: Annotated[
        Embedding, typer.Option(help="Of images: pooled features, or last-layer gradients.")
    ] = "features",
    embeddings: Annotated[
        str | None, typer.Option(help="Ready embeddings: FILE.npy, or a column.")
    ] = None,
    similarity: Annotated[Similarity, typer.Option(help="Similarity of the bins.")] = "cosine",
    n_bins: Annotated[int, typer.Option(help="Number of bins.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Rows through the encoder together.")] = 64,
    drop_ratio: Annotated[
        str,
        typer.Option(metavar="RATIO", help="Share of the patches of kept images to drop, [0, 1)."),
    ] = "0",
    patch_size: Annotated[
        int | None,
        typer.Option(
            help="Side of a patch in pixels.  [default: 4 up to 64 px, else 16]", show_default=False
        ),
    ] = None,
    attribution: Annotated[
        Attribution, typer.Option(help="Which patches are dropped: the least important, or any.")
    ] = "gradcam++",
    attribution_model: Annotated[
        str | None,
        typer.Option(help="Classifier for it.  [default: embedding model]", show_default=False),
    ] = None,
    patch_coding: Annotated[
        PatchCoding, typer.Option(help="exact keeps kept pixels bit for bit, webp is lossy.")
    ] = "exact",
    patch_quality: Annotated[int, typer.Option(help="Quality of webp, 0 to 100.")] = 80,
    min_psnr: Annotated[
        float | None, typer.Option(help="Filled images below so many dB keep their original.")
    ] = None,
    fill: Annotated[
        Fill | None,
        typer.Option(help="How holes are filled for that.  [default: mean]", show_default=False),
    ] = None,
    mae_model: Annotated[
        str | None, typer.Option(help="Masked autoencoder that fills holes: id or folder.")
    ] = None,
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
        modality=modality,
        text_columns=parse_columns(text_columns),
        image_column=image_column,
        label_column=label_column,
        embedding_model=embedding_model,
        embedding=embedding,
        embeddings=embeddings,
        similarity=similarity,
        n_bins=n_bins,
        batch_size=batch_size,
        drop_ratio=parse_drop_ratio(drop_ratio),
        patch_size=patch_size,
        attribution=attribution,
        attribution_model=attribution_model,
        patch_coding=patch_coding,
        patch_quality=patch_quality,
        min_psnr=min_psnr,
        fill=fill,
        mae_model=mae_model,
        output_dir=output_dir,
        overwrite=overwrite,
    )
    typer.echo(summarise(run, as_json, _push(run, push_to_hub, private)))


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
    typer.echo(summarise(drawn, as_json, _push(drawn, push_to_hub, private)))


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
