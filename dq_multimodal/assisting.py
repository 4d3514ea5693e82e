"""What the other processes of a launched `compress` do while rank 0 leads: their share."""

from pathlib import Path
from typing import Any

from dq_multimodal.adapters.choice import choose_adapter
from dq_multimodal.config import InputError
from dq_multimodal.embedding import embed_share, open_embeddings
from dq_multimodal.folder import check_folder
from dq_multimodal.preparation import make_request
from dq_multimodal.shares import bin_share
from dq_multimodal.source import load_source, pin_of
from dq_multimodal.world import World

LED = ("output_dir", "overwrite", "report")
"""Options of `compress` that are the business of rank 0."""


def assist(world: World, options: dict[str, Any]) -> None:
    """Do what rank 0 posts until the run ends: embed whole batches, bin whole strata.

    Args:
        world: The processes; this is not rank 0.
        options: What rank 0 gives to `compress`.

    Raises:
        InputError: If this process sees another source, another model or another folder.
    """
    given = {name: value for name, value in options.items() if name not in LED}
    request = make_request(str(given.pop("dataset")), given)
    adapter, where = None, {}
    for task, asked in world.tasks():
        if task == "source":  # rank 0 has it: what it downloaded is in the cache
            source = load_source(
                request.dataset,
                split=request.split,
                config_name=request.config_name,
                revision=request.revision,
            )
            if pin_of(source.origin) != asked["pin"]:
                raise InputError(f"rank {world.rank} sees another {request.dataset} than rank 0")
            adapter = choose_adapter(source.dataset, request)
        elif task == "folder":
            where = asked
        elif task == "embed" and adapter is not None:
            check_folder(**where, rank=world.rank)
            embed_share(adapter, request.batch_size, world, **asked)
        elif task == "bins":
            check_folder(**where, rank=world.rank)
            bin_share(open_embeddings(Path(asked.pop("folder"))), world, **asked)
