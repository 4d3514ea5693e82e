"""Processes for the command line that need not load the large libraries first.

A server loads them once and forks: a child has its own environment, folder and streams. Those that
read the environment as they are loaded, `huggingface_hub` and all that uses it, it loads itself.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["numba", "pandas", "PIL.Image", "pyarrow.parquet", "sklearn.cluster", "torch", "yaml"]
)
SECONDS = 300


def run_forked(
    words: list[str], folder: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a forked process to its end."""
    with tempfile.TemporaryDirectory() as place:
        files = [str(Path(place) / name) for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_run, args=(words, str(folder), dict(env), files))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, SECONDS)
        texts = [Path(file).read_text() for file in files]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def _run(words: list[str], folder: str, env: dict[str, str], files: list[str]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=env.get("PYTHONIOENCODING", "utf-8"))
    from dq_multimodal import cli

    cli.main(words)
