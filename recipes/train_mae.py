"""Train a small masked autoencoder on the images at hand, to fill dropped patches with.

    accelerate launch recipes/train_mae.py --dataset_name uoft-cs/cifar10 --output_dir DIR
    dq-multimodal compress uoft-cs/cifar10 --drop-ratio 0.25 --mae-model DIR/model ...

For use where no pretrained ViTMAE fits or can be had: CIFAR-10 has 32 px and patches of 4 px, and
the published ones have 224 and 16. Pixels are predicted as they are (no `norm_pix_loss`). The same
command goes on where it was interrupted.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dq_multimodal.config import InputError, check_count
from dq_multimodal.training import record
from dq_multimodal.training.arguments import load_rows, run
from dq_multimodal.training.pictures import ImageDataArguments

HELD_OUT_ROWS = 1000


@dataclass
class MaeArguments:
    """What to train, and how."""

    output_dir: str = field(default="runs/mae", metadata={"help": "Folder of the run."})
    patch_size: int | None = field(
        default=None, metadata={"help": "Side of a patch. Default: 4 up to 64 px, else 16."}
    )
    mask_ratio: float = field(default=0.4, metadata={"help": "Share of patches to predict."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the encoder."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the encoder."})
    decoder_hidden_size: int = field(default=64, metadata={"help": "Width of the decoder."})
    decoder_num_hidden_layers: int = field(default=2, metadata={"help": "Layers of the decoder."})
    num_train_epochs: int = field(default=50, metadata={"help": "Passes over the rows."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Pictures a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, falling as a cosine."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of AdamW."})
    seed: int = field(default=0, metadata={"help": "Of weights, batches and masks."})

    def __post_init__(self) -> None:
        check_count("num_train_epochs", self.num_train_epochs)
        check_count("per_device_train_batch_size", self.per_device_train_batch_size)
        if not 0 < self.mask_ratio < 1:
            raise InputError(f"mask_ratio must lie in (0, 1), got {self.mask_ratio}")


def main() -> None:
    """Parse the flags and run."""
    run(train, [ImageDataArguments, MaeArguments])


def train(data: ImageDataArguments, args: MaeArguments) -> None:
    """Train, measure the filled holes of held-out pictures, save."""
    import numpy as np
    from accelerate.utils import set_seed

    from dq_multimodal.data.columns import find_image_column
    from dq_multimodal.data.source import pin_of
    from dq_multimodal.patches.grid import default_patch_size
    from dq_multimodal.patches.mae import make_small_mae, save_mae
    from dq_multimodal.training.pictures import Pictures, read_files

    accelerator = record.make_accelerator()
    output_dir = Path(args.output_dir)
    source = load_rows(data)
    pins = {"n_processes": accelerator.num_processes, "source": pin_of(source.origin)}
    asked = record.describe_request(asdict(data), asdict(args), pins)
    if not record.begin(output_dir, asked, accelerator):
        return
    started = time.perf_counter()
    size = data.find_size(source.dataset)
    read = read_files(source.dataset, find_image_column(source.dataset, data.image_column))
    classes = np.zeros(len(source.dataset), dtype=np.int64)  # no matter which
    pictures = Pictures(read, classes, size, name="decode")
    order = np.random.default_rng(args.seed).permutation(pictures.rows)
    n_held_out = min(HELD_OUT_ROWS, max(1, len(order) // 50))
    held_out, pictures.rows = order[:n_held_out], np.sort(order[n_held_out:])
    patch_size = args.patch_size or default_patch_size(size)
    set_seed(args.seed)
    encoder = (args.hidden_size, args.num_hidden_layers)
    decoder = (args.decoder_hidden_size, args.decoder_num_hidden_layers)
    model = make_small_mae(size, patch_size, *encoder, *decoder, args.mask_ratio)
    n_parameters = sum(p.numel() for p in model.parameters())
    found = optimise(model, pictures, args, accelerator)
    if accelerator.is_main_process:
        save_mae(accelerator.unwrap_model(model), *pictures.statistics, output_dir / "model")
        pixels, _ = pictures.__getitems__(held_out.tolist())
        psnr = measure(output_dir / "model", pixels, patch_size)
        found |= {"psnr_of_holes": psnr, "rows_held_out": len(held_out)}
        found |= {"parameters": n_parameters, "seconds": round(time.perf_counter() - started, 2)}
        record.finish(output_dir, asked, accelerator.device, **found)
        shown = ", ".join(f"{name} {value:.2f} dB" for name, value in psnr.items())
        print(
            f"holes of {len(held_out):,} held-out images, a quarter of each dropped at random: "
            f"{shown}; {output_dir / 'model'} is ready as --mae-model"
        )


def optimise(model: Any, pictures: Any, args: MaeArguments, accelerator: Any) -> dict[str, Any]:
    """Run the epochs that are left; masks and batches follow from the seed and the epoch."""
    import numpy as np
    import torch
    from tqdm import tqdm

    batch_size = args.per_device_train_batch_size * accelerator.num_processes
    n_steps = max(1, len(pictures.rows) // batch_size)
    total = n_steps * args.num_train_epochs
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay
    )
    n_warmup = max(1, total // 20)

    def rate(step: int) -> float:
        fall = (step - n_warmup) / max(1, total - n_warmup)
        return min((step + 1) / n_warmup, 0.5 * (1 + math.cos(math.pi * max(0.0, fall))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    checkpoints = record.Checkpoints(accelerator, Path(args.output_dir), args.num_train_epochs)
    first, device, losses = checkpoints.first, accelerator.device, []
    standardise = pictures.standardiser(device)
    n_patches = (pictures.size // accelerator.unwrap_model(model).config.patch_size) ** 2
    model.train()
    is_quiet = not accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    with tqdm(total=total, initial=first * n_steps, unit="step", disable=is_quiet) as bar:
        for epoch in range(first, args.num_train_epochs):
            rng = np.random.default_rng((args.seed, epoch))
            order = rng.permutation(pictures.rows)
            losses = []
            for k in range(n_steps):
                rows = order[k * batch_size : (k + 1) * batch_size]
                draws = rng.random((len(rows), n_patches + 1), dtype=np.float32)[rank::world]
                found, numbers = pictures.__getitems__(rows[rank::world].tolist())
                if not len(found):
                    raise InputError("none of the pictures of a batch can be read")
                draws = torch.from_numpy(draws[np.isin(rows[rank::world], numbers)])
                pixels, is_mirrored = torch.from_numpy(found), draws[:, -1] < 0.5
                pixels = torch.where(is_mirrored[:, None, None, None], pixels.flip(2), pixels)
                with accelerator.autocast():
                    inputs = standardise(pixels.to(device))
                    loss = model(inputs, noise=draws[:, :-1].to(device)).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
                bar.update()
            checkpoints.note(epoch)
    last = float(torch.stack(losses).mean()) if losses else None
    return {"steps": total, "last_epoch_loss": last, "is_resumed": first > 0}


def measure(folder: Path, pixels: Any, patch_size: int) -> dict[str, float]:
    """Give the mean PSNR in dB of random holes of a quarter of the patches, by each fill."""
    import numpy as np

    from dq_multimodal.patches.fill import fill_mean, fill_zero, psnr_of_holes
    from dq_multimodal.patches.grid import count_dropped, drop_lowest, grid_shape
    from dq_multimodal.patches.mae import load_mae

    n_patches = math.prod(grid_shape(*pixels.shape[1:3], patch_size))
    scores = np.random.default_rng(0).random((len(pixels), n_patches))
    keep = drop_lowest(scores, count_dropped(n_patches, 0.25))
    filled = {
        "mae": load_mae(str(folder)).fill(pixels, keep),
        "mean": fill_mean(pixels, keep, patch_size),
        "zero": fill_zero(pixels, keep, patch_size),
    }
    return {
        name: round(float(psnr_of_holes(pixels, made, keep, patch_size).mean()), 3)
        for name, made in filled.items()
    }


if __name__ == "__main__":
    main()
