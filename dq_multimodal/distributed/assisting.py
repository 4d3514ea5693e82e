"""What the other processes of a launched `compress` do while rank 0 leads: their share."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from dq_multimodal.adapters.base import Adapter
from dq_multimodal.adapters.choice import choose_adapter
from dq_multimodal.config import CompressConfig, InputError
from dq_multimodal.data.source import pin_of
from dq_multimodal.distributed.shares import bin_share
from dq_multimodal.distributed.world import World
from dq_multimodal.folder import check_folder
from dq_multimodal.stages import embedding
from dq_multimodal.stages.preparation import open_source, settle_method


def assist(world: World, options: dict[str, Any]) -> None:
    """Do what rank 0 posts until the run ends: embed whole batches, bin whole strata.

    Args:
        world: The processes; this is not rank 0.
        options: What rank 0 gives to `compress`.

    Raises:
        InputError: If this process sees another source, another model or another folder.
    """
    request = CompressConfig.from_options(options)
    adapter = None
    for task, asked in world.tasks():
        if task == "source":  # rank 0 has it: what it downloaded is in the cache
            source = open_source(request)
            if pin_of(source.origin) != asked["pin"]:
                raise InputError(f"rank {world.rank} sees another {request.dataset} than rank 0")
            request, _ = settle_method(request, source.dataset)
            adapter = choose_adapter(source.dataset, request)
        elif task == "folder":
            check = partial(check_folder, **asked, rank=world.rank)
        elif task == "embed" and adapter is not None:
            embed_share(adapter, request.batch_size, world, check, **asked)
        elif task == "bins":
            check()
            bin_share(embedding.open_embeddings(Path(asked.pop("folder"))), world, **asked)


def embed_share(
    adapter: Adapter,
    batch_size: int,
    world: World,
    check: Callable[[], object] = lambda: None,
    *,
    folder: str,
    rows: Int[ndarray, " k"] | None,
    view: int | None,
    key: str,
    is_done: Bool[ndarray, " k"],
) -> None:
    """Embed the batches that fall to this process of those that `embed_rows` shares.

    Args:
        adapter: What reads and embeds the rows.
        batch_size: As rank 0 has it.
        world: The processes.
        check: Called before anything is written.
        folder: Where to, as rank 0 says, like all that follows.
        rows: Row numbers; None is all rows.
        view: Seed of the augmented views.
        key: What tells the plan from others.
        is_done: Which batches were done when rank 0 began.

    Raises:
        InputError: If this process would embed other rows, or with another model.
    """
    plan = embedding.make_plan(adapter, batch_size, rows, view)
    if plan.key != key:
        raise InputError(f"rank {world.rank} sees other rows or another model than rank 0")
    mine = world.deal(key, np.flatnonzero(~is_done).tolist())
    first = next(mine, None)
    if first is None:  # the files may have their names by now
        return
    check()
    mine = chain([first], mine)
    out = plan.open_files(Path(folder))
    for found in embedding.embed_batches(adapter, plan, mine, out, view, world.n_here):
        world.send(found)
