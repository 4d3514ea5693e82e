"""The command line, `dq-multimodal`. Answers --help without loading torch."""

import errno
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import exceptions

from dq_multimodal import options
from dq_multimodal.config import InputError
from dq_multimodal.distributed.launch import join_world
from dq_multimodal.distributed.world import ALONE, Stopped, World
from dq_multimodal.report.summary import describe_plan, summarise

if TYPE_CHECKING:
    from dq_multimodal.run import Run

INTERRUPTED = 130
MAX_LINE = 2000
"""A value in a message may be a whole file."""
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)
WRONG_PATH = (
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO),
)
"""Faults of files that somebody named, or that changed on the way."""

app = typer.Typer(
    help="Make training sets smaller without making models worse (Dataset Quantization).",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def compress(
    context: typer.Context,
    dataset: Annotated[str, typer.Argument(help="Hub id, data file or glob, or folder.")],
    split: Annotated[str, typer.Option(help="Split or slice of the source.")] = "train",
    config_name: options.ConfigName = None,
    revision: options.Revision = None,
    preset: options.PresetName = None,
    keep_ratio: options.KeepRatio = "0.2",
    keep_rows: options.KeepRows = None,
    method: options.MethodName = "auto",
    dynamics: options.Dynamics = None,
    difficulty: options.Difficulty = None,
    noise_ratio: options.NoiseRatio = None,
    target: options.TargetName = None,
    target_split: options.TargetSplit = "train",
    target_config: options.TargetConfig = None,
    target_columns: options.TargetColumns = None,
    target_share: options.TargetShare = 0.7,
    target_model: options.TargetModel = None,
    target_gradients: options.TargetGradients = False,
    drop_duplicates: options.DropDuplicates = None,
    cap_by: options.CapBy = None,
    cap: options.Cap = None,
    draw: options.DrawName = "random",
    seed: options.Seed = 0,
    alpha: options.Alpha = 0.6,
    representativeness: options.RepresentativenessName = None,
    importance: options.ImportanceName = "both",
    norm: options.NormName = "minmax",
    score_rows: options.ScoreRows = None,
    modality: options.ModalityName = "auto",
    text_columns: options.TextColumns = None,
    image_column: options.ImageColumn = None,
    label_column: options.LabelColumn = None,
    embedding_model: options.EmbeddingModel = None,
    embedding: options.EmbeddingKind = "features",
    embeddings: options.Embeddings = None,
    similarity: options.SimilarityName = "cosine",
    n_bins: options.BinCount = 10,
    partition: options.PartitionName = "none",
    batch_size: options.BatchSize = 64,
    drop_ratio: options.DropRatio = "0",
    patch_size: options.PatchSize = None,
    attribution: options.AttributionName = "gradcam++",
    attribution_model: options.AttributionModel = None,
    patch_coding: options.PatchCodingName = "exact",
    patch_quality: options.PatchQuality = 80,
    min_psnr: options.MinPsnr = None,
    fill: options.FillName = None,
    mae_model: options.MaeModel = None,
    max_memory: options.MaxMemory = None,
    streaming: options.Streaming = False,
    field: options.Field = None,
    image_folder: options.ImageFolder = None,
    keep_unreadable: options.KeepUnreadable = False,
    keep_every_class: options.KeepEveryClass = False,
    report: options.WithReport = True,
    output_dir: options.OutputDir = None,
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    as_json: options.Json = False,
) -> None:
    """Compress a dataset to a share of its rows.

    Interrupted, the same command goes on where it stopped.
    """
    from dq_multimodal.pipeline import compress as run_compress

    given = options.given_options(context, "push_to_hub", "private", "as_json")
    world = context.obj or ALONE
    if not world.is_main:
        from dq_multimodal.distributed.assisting import assist

        return assist(world, given)
    _check_push(push_to_hub, private)
    run = run_compress(**given, world=world)
    _end(run, as_json, push_to_hub, private)


def _flags_of(command: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the very flags of another one."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command)
        function.__signature__ = signature  # type: ignore[attr-defined]
        found = {name: flag.annotation for name, flag in signature.parameters.items()}
        function.__annotations__ = {**found, "return": None}
        return function

    return decorate


@app.command()
@_flags_of(compress)
def plan(context: typer.Context, **flags: Any) -> None:
    """Say what compress with the same flags will take and leave, and run nothing.

    Time, memory, disk, rows and bytes, from runs on samples of the rows on this machine.
    """
    from dq_multimodal.pipeline import plan as make_plan

    given = options.given_options(context, "overwrite", "push_to_hub", "private", "as_json")
    found = make_plan(**given)
    _say(json.dumps(found, indent=2) if flags["as_json"] else describe_plan(found))


@app.command()
def resample(
    context: typer.Context,
    run: options.RunOrId,
    keep_ratio: options.OtherKeepRatio = None,
    keep_rows: options.KeepRows = None,
    method: options.OtherMethod = None,
    draw: options.OtherDraw = None,
    seed: options.OtherSeed = None,
    alpha: options.OtherAlpha = None,
    importance: options.OtherImportance = None,
    norm: options.OtherNorm = None,
    output_dir: options.OutputDir = None,
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    as_json: options.Json = False,
) -> None:
    """Draw another size or method from a finished run, without an encoder."""
    from dq_multimodal.run import open_run
    from dq_multimodal.run import resample as run_resample

    given = options.given_options(context, "run", "push_to_hub", "private", "as_json")
    _check_push(push_to_hub, private)
    _end(run_resample(open_run(run), **given), as_json, push_to_hub, private)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    embeddings_of: options.EmbeddingsOf = None,
) -> None:
    """Write report.html and the figures of a run again, from what its folder holds."""
    from dq_multimodal.run import Run

    _say(f"report   {Run(run).write_report(embeddings_of)}")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    private: options.Private = False,
) -> None:
    """Push a finished run to the Hub, as one commit."""
    from dq_multimodal.run import Run

    _say(f"pushed: {Run(run).push_to_hub(repo_id, private=private)}")


@app.command()
def verify(run: options.RunOrId, as_json: options.Json = False) -> None:
    """Recompute what can be recomputed of a run, and say what was compared."""
    from dataclasses import asdict

    from dq_multimodal.run import open_run
    from dq_multimodal.verification import verify as run_verify

    checks = run_verify(open_run(run))
    if as_json:
        _say(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _say("\n".join(f"{check.result:8} {check.name}: {check.detail}" for check in checks))
    failed = [check.name for check in checks if check.result == "failed"]
    if failed:
        raise InputError(f"{run} is not what it says: {', '.join(failed)}")


def _check_push(repo_id: str | None, private: bool) -> None:
    """Raise before the work if what comes out of it could not be pushed."""
    if repo_id is not None:
        from dq_multimodal.hub import check_push

        check_push(repo_id, private=private)


def _end(run: "Run", as_json: bool, repo_id: str | None, private: bool) -> None:
    """Push a run that is done, if asked, and say what came out, pushed or not."""
    address = None
    try:
        if repo_id is not None:
            address = run.push_to_hub(repo_id, private=private)
    finally:
        _say(summarise(run, as_json, address))


def _say(text: str) -> None:
    """Print the answer of a command; a reader that has left (`| head -1`) is no fault of it."""
    try:
        typer.echo(_escape(text))
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        if not isinstance(error, BrokenPipeError):
            raise


def _open_console() -> None:
    """Let printing never fail: what a console cannot show is escaped, a closed one is no console.

    Without the latter the next file that is opened, one of the run, would get the number of a
    closed stream, and what libraries print with it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None, run: Callable[..., Any] = app) -> None:
    """Run the command line: exit code 0 done, 2 wrong use or bad input, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _open_console()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with join_world() as world:
            code, line = _attempt(_fill_in(arguments) or ["--help"], run, world)
            line = world.end(code, line)
            if line:
                with suppress(OSError):  # nobody listens
                    print(line, file=sys.stderr)  # noqa: T201
    except InputError as error:  # the processes did not meet
        code = 2
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _fill_in(arguments: list[str]) -> list[str]:
    """Give --drop-duplicates the number that it stands for where none follows."""
    found = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        found.append(argument)
        if argument == "--drop-duplicates" and not _is_number(following):
            found.append("0.95")
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _attempt(arguments: list[str], run: Callable[..., Any], world: World) -> tuple[int, str | None]:
    """Run a command; give its exit code and, if it fails, the line to print."""
    code: Any = 0
    try:
        for argument in arguments:
            argument.encode()  # before it stands in files and messages
        if not world.is_main and "compress" not in arguments[:1]:
            for _ in world.tasks():  # nothing to share: wait until rank 0 is done
                pass
            return 0, None
        code = run(args=arguments, prog_name="dq-multimodal", standalone_mode=False, obj=world)
    except InputError as error:
        return 2, _one_line(str(error))
    except exceptions.TyperException as error:
        line = error.format_message().replace("Value error, ", "")
        is_glob = "unexpected extra argument" in line
        return 2, _one_line(line + (": put a glob in quotes" if is_glob else ""))
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            what = f"cannot write{f' {error.filename}' if error.filename else ''}"
            return 2, _one_line(
                f"{what}: {os.strerror(error.errno)}; the same command goes on when it can"
            )
        if error.errno not in WRONG_PATH or error.filename is None:
            raise
        return 2, _one_line(f"cannot use {error.filename}: {error.strerror}")
    except UnicodeEncodeError as error:
        if error.reason != "surrogates not allowed":
            raise
        found = error.object[max(0, error.start - 40) : error.end + 40]
        return 2, f"error: names of files and folders must be UTF-8, got {found!a}"
    except Stopped as stop:
        return stop.fault.code, _one_line(stop.fault.line)
    except (exceptions.Abort, KeyboardInterrupt, SystemExit):  # the last: who read our log has left
        code = INTERRUPTED
    if code == INTERRUPTED:
        return INTERRUPTED, "interrupted: the same command goes on where it stopped"
    return (code if isinstance(code, int) else 0), None


def _one_line(message: str) -> str:
    line = _escape(" ".join(message.split()))
    return "error: " + (line if len(line) <= MAX_LINE else line[:MAX_LINE] + " ...")


def _escape(text: str) -> str:
    """Escape what would steer a terminal, such as colours or a change of direction in a name."""
    return "".join(c if c.isprintable() or c.isspace() else ascii(c)[1:-1] for c in text)


if __name__ == "__main__":
    main()
