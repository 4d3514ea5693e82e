"""Start the command line in several processes, as a launcher does: `python launch_ranks.py JOBS`.

JOBS is a JSON list of {"size", "arguments", "name"}, run one after the other. The packages are
loaded once, before the processes part. What rank r says goes to NAME.r.out and NAME.r.err, and its
exit code to NAME.r.code. {"signal": [r, FILE, number]} sends a signal to rank r once FILE is there.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import sentence_transformers  # noqa: F401
import timm  # noqa: F401

from dq_multimodal import cli, pipeline  # noqa: F401
from dq_multimodal.distributed import assisting  # noqa: F401
from dq_multimodal.stages import scoring  # noqa: F401


def run_rank(job, rank, port):
    """Be one of the processes."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["size"], "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    for number, kind in ((1, "out"), (2, "err")):
        name = f"{job['name']}.{rank}.{kind}"
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli.main(job["arguments"])
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(stop.code)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(70)


def main():
    """Run all jobs."""
    for job in json.loads(sys.argv[1]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = {}
        for rank in range(job["size"]):
            child = os.fork()
            if not child:
                run_rank(job, rank, port)
            children[child] = rank
        if "signal" in job:
            rank, path, number = job["signal"]
            while not Path(path).exists():
                time.sleep(0.02)
            os.kill(next(child for child in children if children[child] == rank), number)
        for child, rank in children.items():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            Path(f"{job['name']}.{rank}.code").write_text(str(code))


if __name__ == "__main__":
    main()
