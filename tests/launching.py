"""Runs scripts as their users do: by a launcher, in processes of their own, or in this process."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no")
ONE = (*ACCELERATE, "--mixed_precision", "no", "--num_processes", "1")
TWO = (*ACCELERATE, "--mixed_precision", "no", "--num_processes", "2", "--multi_gpu")
"""By its name for several processes; on a CPU here, as the environment says."""


def launch(script, *words, launcher=(), code=0, folder=ROOT):
    """Run a script, by its path from the root, in a folder; check its exit code."""
    words = [str(ROOT / script), *map(str, words)]
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if launcher:
        command, env = [sys.executable, *launcher, *words], os.environ | env
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=folder, preexec_fn=take_one_core
        )
    else:
        done = run_here(words, env, folder)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def take_one_core():
    """Leave the other cores to the other tests: training takes all that it sees."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


def run_here(words, env, folder):
    """Run a script in this process, as a process of its own would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(Path(words[0]).parent)
        for name, value in env.items():
            patch.setenv(name, value)
        return capture(partial(runpy.run_path, words[0], run_name="__main__"), words, folder)


def capture(call, words, folder):
    """Call what a process would do in a folder; give its exit code and what it said."""
    said, code = {"stdout": io.StringIO(), "stderr": io.StringIO()}, 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(said["stdout"]),
        contextlib.redirect_stderr(said["stderr"]),
    ):
        try:
            call()
        except SystemExit as end:
            code = end.code or 0
    found = {name: stream.getvalue() for name, stream in said.items()}
    return subprocess.CompletedProcess(words, code, **found)
