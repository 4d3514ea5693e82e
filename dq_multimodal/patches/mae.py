"""Filling the dropped patches of images by a masked autoencoder.

The autoencoder (He et al. 2022, arXiv:2111.06377) is transformers' `ViTMAEForPreTraining`, from
any checkpoint that predicts pixels. A recipe trains a small one by `make_small_mae`, steps on
`model(pixel_values).loss`, where the model itself masks `config.mask_ratio` of the patches at
random (pixel_values are (pixel / 255 - mean) / std of images of the model's size), and `save_mae`.
`ViTMAEForPreTraining(config)` alone will not do: transformers 5.23 leaves its position tables at
zero and frozen, so all holes of an image would come back the same.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dq_multimodal.config import InputError
from dq_multimodal.models.locate import find_model, loading
from dq_multimodal.patches.fill import Images, Marks, find_holes
from dq_multimodal.patches.grid import grid_shape

if TYPE_CHECKING:
    import torch
    from transformers import ViTMAEForPreTraining

Colour = Sequence[float]
BATCH_IMAGES = 64
PREPROCESSOR_FILE = "preprocessor_config.json"
IMAGENET_COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass
class MaskedAutoencoder:
    """A ViTMAE model, mean and standard deviation of its input, and where it is from."""

    model: "ViTMAEForPreTraining"
    mean: Colour
    std: Colour
    name: str = "the model"
    _turn: Lock = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self.mean, self.std = _check_colours(self.mean, self.std)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model.vit.embeddings.patch_embeddings.projection.kernel_size[0]

    def fill(self, images: Images, keep: Marks) -> Images:
        """Fill the dropped patches with what the model makes of the kept ones, which stay as is.

        Grey images get the mean of the three channels predicted. Sizes that are no multiple of the
        patch are padded by their last row and column. On a grid other than the trained one the
        positions are interpolated: the further from it, the worse. Threads take turns: a call sets
        the model's `config.mask_ratio` to what each image drops, and puts it back.

        Raises:
            InputError: If shapes or types do not fit, or an image keeps no patch.
            RuntimeError: If the model masked other patches, or predicts no finite numbers.
        """
        holes = find_holes(images, keep, self.patch_size)
        filled, n_dropped = images.copy(), (~keep).sum(axis=1)
        config = self.model.vit.embeddings.config
        with self._turn:
            trained_ratio = config.mask_ratio
            try:
                for count in np.unique(n_dropped[n_dropped > 0]).tolist():
                    # The model keeps int(l * (1 - ratio)) patches of every image: half a patch more
                    # makes that l - count whatever the rounding.
                    config.mask_ratio = (count - 0.5) / keep.shape[1]
                    alike = np.flatnonzero(n_dropped == count)
                    for start in range(0, len(alike), BATCH_IMAGES):
                        rows = alike[start : start + BATCH_IMAGES]
                        predicted = self._predict(images[rows], keep[rows])
                        filled[rows] = np.where(holes[rows], predicted, images[rows])
            finally:
                config.mask_ratio = trained_ratio
        return filled

    def _predict(self, images: Images, keep: Marks) -> Images:
        """Predict all pixels of images that drop equally many patches."""
        import torch
        from torch.func import functional_call

        (height, width, channels), size = images.shape[1:], self.patch_size
        rows, columns = grid_shape(height, width, size)
        # A cut-off patch is padded from its own pixels: holes stay holes. Grey is padded to RGB.
        extra = ((0, 0), (0, rows * size - height), (0, columns * size - width), (0, 3 - channels))
        noise = np.arange(keep.shape[1]) + keep.shape[1] * ~keep  # low = kept; no ties
        device = self.model.device
        mean, std = (torch.tensor(values, device=device) for values in (self.mean, self.std))
        with torch.inference_mode():
            pixels = torch.from_numpy(np.pad(images, extra, mode="edge")).to(device)
            encoded = self.model.vit(
                ((pixels / 255 - mean) / std).permute(0, 3, 1, 2),
                noise=torch.from_numpy(noise).to(device),
                interpolate_pos_encoding=True,  # leaves the table alone on the trained grid
            )
            if not np.array_equal(encoded.mask.cpu().numpy() == 0, keep):
                raise RuntimeError(f"{self.name} must mask the dropped patches, but masked others")
            positions = {"decoder_pos_embed": self._decoder_positions(rows, columns)}
            tokens = (encoded.last_hidden_state, encoded.ids_restore)
            decoded = functional_call(self.model.decoder, positions, tokens)
            planes = self.model.unpatchify(decoded.logits, (rows * size, columns * size))
            colours = ((planes.permute(0, 2, 3, 1) * std + mean) * 255)[:, :height, :width]
            if channels == 1:
                colours = colours.mean(dim=3, keepdim=True)
            if not torch.isfinite(colours).all():
                raise RuntimeError(f"{self.name} must predict finite numbers, got nan or inf")
            return colours.round().clamp(0, 255).to(torch.uint8).cpu().numpy()

    def _decoder_positions(self, rows: int, columns: int) -> "Float[torch.Tensor, '1 tokens d']":
        """Fit the decoder's position table to a grid, as transformers fits the encoder's.

        Its own way for the decoder (5.23) takes the patches for one line, so it shears new grids.
        """
        import torch

        table = self.model.decoder.decoder_pos_embed
        side = math.isqrt(table.shape[1] - 1)
        if (rows, columns) == (side, side):
            return table
        planes = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        planes = torch.nn.functional.interpolate(planes, size=(rows, columns), mode="bicubic")
        return torch.cat([table[:, :1], planes.flatten(2).transpose(1, 2)], dim=1)


def load_mae(name: Path | str, device: Any = None) -> MaskedAutoencoder:
    """Load a masked autoencoder, a Hub id or a folder, onto a device: by default the GPU, if any.

    Raises:
        InputError: If it cannot be found or read, is no ViTMAE of RGB images, lacks its decoder, or
            predicts pixels normalised patch by patch, whose true colours nobody knows.
    """
    import torch
    from transformers import AutoConfig, ViTMAEForPreTraining
    from transformers.models.auto.image_processing_auto import get_image_processor_config
    from transformers.utils import logging

    place, revision = find_model(name := str(name))
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    where["local_files_only"] = Path(place).is_dir()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is said below, in one line
    try:
        with loading(name):
            _check_config(name, AutoConfig.from_pretrained(place, **where))
            load: Any = ViTMAEForPreTraining.from_pretrained
            model, report = load(place, dtype=torch.float32, output_loading_info=True, **where)
            settings = get_image_processor_config(place, **where)
    finally:
        logging.set_verbosity(verbosity)

    if missing := report["missing_keys"]:
        lack = f"lacks {len(missing)} of the weights, {min(missing)} among them"
        raise InputError(f"{name} must hold a ViTMAE's encoder and decoder, but {lack}")
    if not model.decoder.decoder_pos_embed.any():
        raise InputError(f"{name} must know where patches lie: its decoder's positions are all 0")
    if not settings.get("do_normalize", True):
        settings = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    elif not IMAGENET_COLOURS.keys() <= settings.keys():
        settings = IMAGENET_COLOURS
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    mean, std = settings["image_mean"], settings["image_std"]
    return MaskedAutoencoder(model, mean, std, name)


def make_small_mae(
    image_size: int,
    patch_size: int,
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    decoder_hidden_size: int = 64,
    decoder_num_hidden_layers: int = 2,
    mask_ratio: float = 0.5,
) -> "ViTMAEForPreTraining":
    """Make an untrained autoencoder of square RGB images, with MAE's fixed position tables."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    if image_size % patch_size:
        raise InputError(f"image_size must be a multiple of {patch_size}, got {image_size}")

    def blocks(prefix: str, width: int, depth: int) -> dict[str, Any]:
        if width % 4:
            raise InputError(f"{prefix}hidden_size must be a multiple of 4, got {width}")
        heads = math.gcd(width, max(1, width // 32))
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 4 * width}
        return {prefix + k: v for k, v in {**sizes, "num_attention_heads": heads}.items()}

    sizes: dict[str, Any] = {"image_size": image_size, "patch_size": patch_size}
    sizes["mask_ratio"] = mask_ratio
    sizes |= blocks("", hidden_size, num_hidden_layers)
    sizes |= blocks("decoder_", decoder_hidden_size, decoder_num_hidden_layers)
    config = ViTMAEConfig(norm_pix_loss=False, **sizes)
    model = ViTMAEForPreTraining(config)
    with torch.no_grad():
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            sines = _sine_positions(image_size // patch_size, table.shape[2])
            table.copy_(torch.from_numpy(sines))
        for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
            token.normal_(std=config.initializer_range)
    return model


def save_mae(model: "ViTMAEForPreTraining", mean: Colour, std: Colour, folder: Path | str) -> None:
    """Write an autoencoder and how its input is normalised, so that `load_mae` reads it back."""
    mean, std = _check_colours(mean, std)
    side = model.config.image_size
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": std}
    model.save_pretrained(folder)
    text = json.dumps({**settings, "size": {"height": side, "width": side}}, indent=2)
    (Path(folder) / PREPROCESSOR_FILE).write_text(text + "\n")


def _sine_positions(side: int, dim: int) -> Float[ndarray, "1 tokens d"]:
    """Give sines and cosines of column, then row, at dim / 4 frequencies from 1 to 1 / 10000."""
    rows, columns = np.divmod(np.arange(side * side), side)
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    angles = np.stack([columns, rows], axis=1)[:, :, None] * frequencies
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=2).reshape(side * side, dim)
    return np.pad(table, ((1, 0), (0, 0)))[None]


def _check_config(name: str, config: Any) -> None:
    """Raise unless the checkpoint is a ViTMAE of square RGB images that predicts plain pixels."""
    if config.model_type != "vit_mae":
        raise InputError(f"{name} must be a masked autoencoder (vit_mae), got {config.model_type}")
    if config.norm_pix_loss:
        raise InputError(f"{name} must be trained on plain pixels, got one with norm_pix_loss")
    if config.num_channels != 3:
        raise InputError(f"{name} must be made for 3 channels (RGB), got {config.num_channels}")
    if len(np.unique(config.image_size)) != 1:
        raise InputError(f"{name} must be trained on square images, got {config.image_size}")


def _check_colours(mean: Colour, std: Colour) -> tuple[list[float], list[float]]:
    """Give both as lists; raise unless they are three numbers each, those of std positive."""
    values = np.array([mean, std], dtype=np.float64)
    if values.shape != (2, 3) or not np.isfinite(values).all() or values[1].min() <= 0:
        raise InputError(f"image_mean and image_std must be three numbers each, got {mean}, {std}")
    return values[0].tolist(), values[1].tolist()
