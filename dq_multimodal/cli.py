"""The command line, `dq-multimodal`. Answers --help without loading torch."""

import argparse
import errno
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from dq_multimodal import __version__
from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.config import CompressConfig, InputError, PlanConfig, ResampleConfig
from dq_multimodal.options import Help, add_options, suggest
from dq_multimodal.report.summary import describe_plan, summarise

if TYPE_CHECKING:
    from dq_multimodal.condensation.result import Condensed
    from dq_multimodal.run import Run

R = TypeVar("R", "Run", "Condensed")

INTERRUPTED = 130
ONCE = ("compress", "condense", "plan", "resample", "push")
"""Commands that several processes of a launcher would do several times."""
LAST_SECONDS = 5.0
"""So long other processes of a launcher wait: until then rank 0 has said what is wrong."""
MAX_LINE = 2000
"""A value in a message may be a whole file."""
ANSWER = ("push_to_hub", "private", "json")
"""What is done with the result."""
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)
WRONG_PATH = (
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO),
)
"""Faults of files that somebody named, or that changed on the way."""


class Answered(Exception):
    """A flag such as --help was answered: there is no more to do."""


class Parser(argparse.ArgumentParser):
    """Reads the command line; what is wrong with it is an InputError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=Help)

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Refuse what is not known, naming the nearest flag."""
        found, left = super().parse_known_args(*arguments, **options)
        flags = [argument for argument in left if argument.startswith("-")]
        for flag in flags:
            name = flag.partition("=")[0]
            raise InputError(f"no such option: {name}{suggest(name, self._option_string_actions)}")
        if left:
            raise InputError(f"unexpected extra argument {left[0]}: put a glob in quotes")
        return found, left

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise InputError(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Leave after --help or --version."""
        raise Answered

    def _print_message(self, message: str, file: Any = None) -> None:
        _say(message.removesuffix("\n"))


def compress(asked: dict[str, Any]) -> None:
    """Compress a dataset to a share of its rows.

    Interrupted, the same command goes on where it stopped.
    """
    from dq_multimodal.pipeline import compress as run_compress

    answer = _take_answer(asked)
    _end(run_compress(asked.pop("dataset"), **asked), summarise, **answer)


def condense(asked: dict[str, Any]) -> None:
    """Make a small synthetic set of images that trains like all of them.

    Interrupted, the same command goes on where it stopped.
    """
    from dq_multimodal.condensation.pipeline import condense as run_condense
    from dq_multimodal.condensation.result import Condensed

    answer = _take_answer(asked, "condensed set")
    _end(run_condense(asked.pop("dataset"), **asked), Condensed.summarise, **answer)


def plan(asked: dict[str, Any]) -> None:
    """Say what compress with the same flags will take and leave, and run nothing.

    Time, memory, disk, rows and bytes, from runs on samples of the rows on this machine.
    """
    from dq_multimodal.pipeline import plan as make_plan

    as_json = asked.pop("json")
    found = make_plan(asked.pop("dataset"), **asked)
    _say(json.dumps(found, indent=2) if as_json else describe_plan(found))


def resample(asked: dict[str, Any]) -> None:
    """Draw another size or method from a finished run, without an encoder."""
    from dq_multimodal.run import open_run
    from dq_multimodal.run import resample as run_resample

    answer = _take_answer(asked)
    _end(run_resample(open_run(asked.pop("run")), **asked), summarise, **answer)


def push(asked: dict[str, Any]) -> None:
    """Push a finished run or condensed set to the Hub, as one commit."""
    found = _open(asked["run"])
    _say(f"pushed: {found.push_to_hub(asked['repo_id'], private=asked['private'])}")


def report(asked: dict[str, Any]) -> None:
    """Write report.html and the figures of a run or condensed set again, from its folder."""
    from dq_multimodal.run import Run

    found, embeddings_of = _open(asked["run"]), asked["embeddings_of"]
    if isinstance(found, Run):
        _say(f"report   {found.write_report(embeddings_of)}")
        return
    if embeddings_of is not None:
        raise InputError(f"--embeddings-of is for runs, and {found.path} is a condensed set")
    _say(f"report   {found.write_report()}")


def verify(asked: dict[str, Any]) -> None:
    """Recompute what can be recomputed of a run or condensed set, and say what was compared."""
    from dq_multimodal.condensation.result import open_result
    from dq_multimodal.condensation.verification import verify as verify_result

    run = asked["run"]
    checks = verify_result(open_result(run))
    if asked["json"]:
        _say(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _say("\n".join(f"{check.result:8} {check.name}: {check.detail}" for check in checks))
    failed = [check.name for check in checks if check.result == "failed"]
    if failed:
        raise InputError(f"{run} is not what it says: {', '.join(failed)}")


def make_parser() -> Parser:
    """Put together the commands and their flags."""
    parser = Parser(
        prog="dq-multimodal",
        description="Make training sets smaller without making models worse: Dataset Quantization.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    made = {}
    for command in (compress, condense, plan, resample, push, report, verify):
        title, _, more = (command.__doc__ or "").partition("\n\n")
        about = f"{title} {' '.join(more.split())}"
        made[command] = commands.add_parser(command.__name__, help=title, description=about)
        made[command].set_defaults(command=command)
    for command in (push, report):
        made[command].add_argument("run", metavar="RUN", help="Folder of a run or condensed set.")
    made[verify].add_argument(
        "run", metavar="RUN", help="Folder of a run or condensed set, or OWNER/NAME on the Hub."
    )
    groups = {command: made[command].add_argument_group("Output") for command in (push, verify)}
    groups[compress] = add_options(made[compress], CompressConfig)["Output"]
    groups[condense] = add_options(made[condense], CondenseConfig)["Output"]
    groups[plan] = add_options(made[plan], PlanConfig, leave_out=("overwrite",))["Output"]
    groups[resample] = add_options(made[resample], ResampleConfig)["Output"]
    made[push].add_argument("repo_id", metavar="OWNER/NAME", help="Repository on the Hub.")
    made[report].add_argument(
        "--embeddings-of",
        metavar="RUN",
        help="Run folder whose embeddings to show, for a run that was resampled.",
    )
    for command in (compress, condense, resample):
        groups[command].add_argument(
            "--push-to-hub", metavar="OWNER/NAME", help="Push the result there."
        )
    for command in (compress, condense, resample, push):
        groups[command].add_argument(
            "--private", action="store_true", help="Make a new repository private."
        )
    for command in (compress, condense, plan, resample, verify):
        groups[command].add_argument("--json", action="store_true", help="Print one JSON document.")
    for each in made.values():
        needed = " ".join(str(a.metavar) for a in each._actions if not a.option_strings)
        each.usage = f"%(prog)s {needed} [flags]"
    return parser


def _open(name: str) -> "Run | Condensed":
    """Open the folder of a run or condensed set."""
    from dq_multimodal.condensation.result import Condensed, is_condensed
    from dq_multimodal.files import expand_home
    from dq_multimodal.run import Run

    return Condensed(name) if is_condensed(expand_home(name)) else Run(name)


def _take_answer(asked: dict[str, Any], what: str = "run") -> dict[str, Any]:
    """Take out of the flags what is done with the result, a run or something else.

    Raises:
        InputError: Before the work, if what comes out of it could not be pushed.
    """
    answer = {name: asked.pop(name) for name in ANSWER}
    if answer["push_to_hub"] is not None:
        from dq_multimodal.hub import CONDENSED_SET, RUN, check_push

        kind = RUN if what == RUN.name else CONDENSED_SET
        check_push(answer["push_to_hub"], private=answer["private"], kind=kind)
    return answer


def _end(
    run: R,
    summary: Callable[[R, bool, str | None], str],
    push_to_hub: str | None,
    private: bool,
    json: bool,
) -> None:
    """Push a run that is done, if asked, and say what came out, pushed or not."""
    address = None
    try:
        if push_to_hub is not None:
            address = run.push_to_hub(push_to_hub, private=private)
    finally:
        _say(summary(run, json, address))


def _say(text: str) -> None:
    """Print the answer of a command; a reader that has left (`| head -1`) is no fault of it."""
    try:
        print(_escape(text), flush=True)  # noqa: T201
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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit code 0 done, 2 wrong use or bad input, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _open_console()
    arguments = sys.argv[1:] if arguments is None else arguments
    code, line = _attempt(_fill_in(arguments) or ["--help"])
    if line:
        with suppress(OSError):  # nobody listens
            print(line, file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _fill_in(arguments: list[str]) -> list[str]:
    """Give --drop-duplicates the number that it stands for where none follows.

    argparse would take whatever follows, such as the dataset.
    """
    bare, found = CompressConfig.__dataclass_fields__["drop_duplicates"].metadata["bare"], []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        found.append(argument)
        if argument == "--drop-duplicates":
            try:
                float(following)
            except ValueError:
                found.append(str(bare))
    return found


def _attempt(arguments: list[str]) -> tuple[int, str | None]:
    """Run a command; give its exit code and, if it fails, the line to print."""
    try:
        for argument in arguments:
            argument.encode()  # before it stands in files and messages
        n_started = os.environ.get("WORLD_SIZE", "")
        if arguments[0] in ONCE and n_started.isdigit() and int(n_started) > 1:
            return 2, _refuse_launcher(arguments[0], n_started)
        asked = vars(make_parser().parse_args(arguments))
        asked.pop("command")(asked)
    except Answered:
        pass
    except InputError as error:
        return 2, _one_line(str(error))
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
    except (KeyboardInterrupt, SystemExit):  # the latter: who read our log has left
        return INTERRUPTED, "interrupted: the same command goes on where it stopped"
    return 0, None


def _refuse_launcher(command: str, n_started: str) -> str | None:
    """Give what the first of several processes says; the others wait until it has said it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(LAST_SECONDS)  # a launcher ends all once one has ended
        return None
    line = f"{command} was started {n_started} times by a launcher: start it once"
    if command in ("compress", "plan"):
        line += ", with --engine ray for several GPUs or machines"
    return _one_line(line)


def _one_line(message: str) -> str:
    line = _escape(" ".join(message.split()))
    return "error: " + (line if len(line) <= MAX_LINE else line[:MAX_LINE] + " ...")


def _escape(text: str) -> str:
    """Escape what would steer a terminal, such as colours or a change of direction in a name."""
    return "".join(c if c.isprintable() or c.isspace() else ascii(c)[1:-1] for c in text)


if __name__ == "__main__":
    main()
