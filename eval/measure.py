"""The frame of the measuring scripts: flags, results file, memory, a process for each piece.

A results file says, beside what was measured, the command, machine, versions and commit.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
DATA = Path(os.environ.get("DQ_TEST_DATA") or ROOT.parent / "shared" / "data")
PACKAGES = (
    *("dq-multimodal", "datasets", "lm_eval", "numba", "numpy"),
    *("peft", "torch", "transformers"),
)
PIECE = "--piece"
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        fail(message)


def flags(document: str, name: str) -> Parser:
    """Start the flags of eval/NAME.py, with --output for its results file."""
    parser = Parser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    return parser


def fail(message: str) -> NoReturn:
    """Say on one line of stderr what is wrong with the input, and exit with code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def need(*names: str) -> None:
    """Fail if a file of the folder of test data, named by a path or a glob, is not there."""
    for name in names:
        if not any(DATA.glob(name)):
            fail(f"no {name} in {DATA} (set DQ_TEST_DATA)")


def save(path: Path, found: dict[str, Any]) -> None:
    """Write what was measured, and how, whole or not at all."""
    write(path, {**describe_run(), **found})
    print(path)


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    from dq_multimodal.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def describe_run() -> dict[str, Any]:
    """Give the command, the machine, the versions and the commit."""
    import torch

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    return {
        "command": command_line(),
        "commit": commit,
        "device": f"cpu, {torch.get_num_threads()} threads",
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions(*PACKAGES),
    }


def command_line() -> str:
    """Give the command as it is typed in the root of the project, without folders of a machine."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", f"eval/{Path(sys.argv[0]).name}", *words])


def versions(*names: str) -> dict[str, str]:
    """Give the releases of Python and of those packages that are installed."""
    installed = {one.name: one.version for one in metadata.distributions()}
    found = {name: installed[name] for name in names if name in installed}
    return {"python": platform.python_version(), **found}


def timed(work: Callable[[], object]) -> float:
    """Give the seconds that some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def gauge(work: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Time some work, one to five times by how long it takes, and give what it found too.

    Its memory is the peak of the process above what was resident before; run in a process of its
    own, it has a peak of its own.
    """
    seconds, used = list[float](), list[float]()
    load, before = os.getloadavg()[0], _status("VmRSS") or peak_bytes()
    if (place := Path("/proc/self/clear_refs")).exists():
        place.write_text("5")  # the peak begins anew
    while len(seconds) < (5 if sum(seconds) < 8 else 3 if sum(seconds) < 30 else 1):
        started, began = time.perf_counter(), time.process_time()
        found = work()
        seconds.append(time.perf_counter() - started)
        used.append(time.process_time() - began)
    spread = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    about = {
        "seconds": {name: round(value, 4) for name, value in spread.items()},
        "repeats": len(seconds),
        "cpu_seconds": round(statistics.median(used), 4),
        "memory_bytes": max(0, peak_bytes() - before),
        "load_before": round(load, 2),
    }
    return about, found


def peak_bytes() -> int:
    """Give the largest resident memory of this process since the peak began anew, on Linux."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def _status(name: str, process: int | str = "self") -> int:
    place = Path(f"/proc/{process}/status")
    lines = place.read_text().splitlines() if place.exists() else []
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(name + ":")), 0)


def run_piece(script: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Run `script --piece JSON` in a process of its own, and read the JSON that it prints last.

    Of one that fails, `absent` is the last line of its stderr.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, script, PIECE, json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"absent": f"failed: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


class Done(NamedTuple):
    """What a command printed, its seconds, and the peaks of its memory in bytes.

    `anonymous` is sampled, without mapped files, which are the system's to drop. `resident` is at
    least what the script that measures has itself (Linux counts from before the program is loaded).
    """

    found: Any
    seconds: float
    resident: int
    anonymous: int


def dq(*arguments: object, output_dir: Path | None = None) -> Done:
    """Run the real command line with --json; ends where it fails."""
    where = [] if output_dir is None else ["--output-dir", str(output_dir)]
    command = [sys.executable, "-m", "dq_multimodal.cli", *map(str, arguments), "--json", *where]
    started, anonymous = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(command, stdout=out)
        while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
            anonymous = max(anonymous, _status("RssAnon", child.pid))
            time.sleep(0.02)
        seconds, (_, status, usage) = time.perf_counter() - started, ended
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(child.returncode)
        out.seek(0)
        return Done(json.load(out), seconds, usage.ru_maxrss * RSS_UNIT, anonymous)


def save_untrained(model: str, side: int, folder: Path) -> None:
    """Write a classifier of ten classes with random weights, which change no time."""
    import torch

    from dq_multimodal.models.classifiers import Classifier, build_classifier, save_classifier

    torch.manual_seed(0)
    about = Classifier(model, side, 10, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)
    save_classifier(build_classifier(model, 10, side), about, folder)


def known_model(folder: str) -> str:
    """Read the name of the model of a folder made by recipes/train_extractor.py."""
    return json.loads((Path(folder) / "classifier.json").read_text())["model"]


def grid(rows: list[tuple[str, ...]]) -> str:
    """Lay out rows, the first being the head, as Markdown."""
    rule = ("---",) * len(rows[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
