"""What a launcher (`torchrun`, `accelerate launch`) says to each of the processes it starts."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

from dq_multimodal.config import InputError
from dq_multimodal.world import ALONE, JOIN_SECONDS, World, is_launched


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

    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        met = rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS))
        store, rank, size = next(iter(met))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot meet the other processes at {place}: {reason}") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return World(PrefixStore(f"dq-multimodal/{attempt}", store), rank, size)
