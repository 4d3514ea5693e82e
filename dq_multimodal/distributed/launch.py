"""What a launcher (`torchrun`, `accelerate launch`) says to each of the processes it starts."""

import io
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any

from dq_multimodal.config import InputError
from dq_multimodal.distributed.world import ALONE, JOIN_SECONDS, World, is_launched

LOOPBACK = "127.0.0.1"


@contextmanager
def join_world() -> Iterator[World]:
    """Join the processes that a launcher started; without one, be alone and load nothing.

    Raises:
        InputError: If the others cannot be met.
    """
    if not is_launched():
        yield ALONE
        return
    world = _meet()
    try:
        world.start()
        with nullcontext() if world.is_main else redirect_stdout(io.StringIO()):
            yield world
    except BaseException as error:
        world.end(1, f"rank {world.rank} failed: {type(error).__name__}: {error}")
        raise
    finally:
        world.leave()


def _meet() -> World:
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is loaded: one bar is enough
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost store is one line, not frames
    from torch.distributed import PrefixStore, rendezvous

    wait = timedelta(seconds=JOIN_SECONDS)
    # The agent of torchrun holds the store itself, for all networks.
    is_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_agent and os.environ.get("MASTER_ADDR") in (None, "", "localhost"):
        os.environ["MASTER_ADDR"] = LOOPBACK
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT")
    is_holder = os.environ.get("RANK") == "0" and not is_agent
    try:
        if is_holder and port and is_loopback(address):
            size = int(os.environ["WORLD_SIZE"])
            store, rank = _open_here(address, int(port), size, wait), 0
        else:
            store, rank, size = next(iter(rendezvous("env://", timeout=wait)))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"cannot meet the other processes at {address}:{port}: {reason}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return World(PrefixStore(f"dq-multimodal/{attempt}", store), rank, size)


def is_loopback(address: str) -> bool:
    """Say whether an address, which is no name, can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _open_here(address: str, port: int, size: int, wait: timedelta) -> Any:
    """Hold the store at one address: by itself it would listen to all networks."""
    from torch.distributed import TCPStore

    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    holder = socket.create_server((address, port), family=kind)
    return TCPStore(address, port, size, True, wait, master_listen_fd=holder.detach())
