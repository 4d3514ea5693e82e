"""Image models from timm, transformers or a folder of ours: pooled features and logits."""

import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from dq_multimodal.config import DEFAULT_IMAGE_MODEL, Dtype, InputError
from dq_multimodal.data.pixels import to_square
from dq_multimodal.files import expand_home
from dq_multimodal.models.classifiers import DESCRIPTION, read_classifier
from dq_multimodal.models.locate import ModelOutOfReach, accelerator, find_model, loading

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageModel:
    """A model that looks at square pictures.

    Attributes:
        net: The module, in evaluation mode.
        name: What it was asked for by.
        revision: Its commit on the Hub, where there is one.
        size: Side of its input in pixels.
        crop: Share of the shorter side that it looks at.
        resample: Pillow's filter for scaling.
        labels: Names of its classes, empty where it has none or does not know them.
        n_classes: Number of classes, 0 where it is no classifier.
    """

    def __init__(
        self,
        net: "nn.Module",
        name: str,
        device: str | None,
        dtype: Dtype,
        *,
        size: int,
        revision: str | None = None,
        mean: Any = IMAGENET[0],
        std: Any = IMAGENET[1],
        crop: float = 1.0,
        resample: int = 3,
        labels: tuple[str, ...] = (),
    ) -> None:
        import torch

        self.device = torch.device(accelerator(device) or "cpu")
        self.dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        self.net = net.eval().to(device=self.device, dtype=self.dtype)
        self.net.to(memory_format=torch.channels_last)
        self.name, self.revision, self.labels = name, revision, labels
        self.size, self.crop, self.resample = size, crop, resample
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._head = find_head(net)
        self.n_classes = self._head.out_features if self._head is not None else 0

    def describe(self) -> dict[str, Any]:
        """Give what config.yaml records of the model."""
        return {
            "model": self.name,
            "revision": self.revision,
            "image_size": self.size,
            "crop": self.crop,
            "n_classes": self.n_classes,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def prepare(self, image: "Image") -> UInt8[ndarray, "size size 3"]:
        """Cut and scale one RGB picture to the input of the model."""
        return to_square(image, self.size, self.crop, self.resample)

    def to_input(self, pixels: UInt8[ndarray, "b size size 3"]) -> "Float[Tensor, 'b 3 size size']":
        """Move prepared pictures to the device and standardise them."""
        import torch

        pixels = np.require(pixels, requirements=["C", "W"])
        batch = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        batch = batch.permute(0, 3, 1, 2).float()  # channels last in memory, as it came
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=self.device)
        shift = torch.tensor(
            [-m / s for m, s in zip(self.mean, self.std, strict=True)], device=self.device
        )
        return batch.mul_(scale[:, None, None]).add_(shift[:, None, None]).to(self.dtype)

    def look(
        self, pictures: "Sequence[ndarray] | ndarray", *, with_middle: bool = False
    ) -> tuple[Float[ndarray, "b d"], Float[ndarray, "b c"] | None, Float[ndarray, "b k"] | None]:
        """Give pooled penultimate features, logits and pooled middle features of pictures.

        They are (b, size, size, 3) of uint8, as `prepare` gives them.

        The features are what goes into the last linear layer; of a model without one, its pooled
        output. There are no logits (None) without classes, and middle features only if asked for;
        they have no columns where the model is of no known build.
        """
        import torch

        seen: dict[str, Any] = {}
        layer = find_middle(self.net) if with_middle else None
        with ExitStack() as stack, torch.inference_mode():
            if self._head is not None:
                hook = self._head.register_forward_pre_hook(lambda _, x: seen.update(head=x[0]))
                stack.callback(hook.remove)
            if layer is not None:
                hook = layer.register_forward_hook(lambda *x: seen.update(middle=x[2]))
                stack.callback(hook.remove)
            output = self.net(self.to_input(np.asarray(pictures)))
        logits = middle = None
        features = seen["head"] if "head" in seen else _pooled(output)
        if "head" in seen:
            logits = getattr(output, "logits", output).float().cpu().numpy()
        if "middle" in seen:
            middle = pool_places(seen["middle"]).float().cpu().numpy()
        elif with_middle:
            middle = np.zeros((len(pictures), 0), dtype=np.float32)
        return features.flatten(1).float().cpu().numpy(), logits, middle

    @cached_property
    def middle_dimension(self) -> int:
        """Size k of the middle features, found by looking at one grey picture."""
        middle = self.look(self._grey(), with_middle=True)[2]
        return middle.shape[1] if middle is not None else 0

    def _grey(self) -> UInt8[ndarray, "1 size size 3"]:
        return np.full((1, self.size, self.size, 3), 127, dtype=np.uint8)

    def dimension(self) -> int:
        """Size d of the features, found by looking at one grey picture."""
        if self._head is not None:
            return int(self._head.in_features)
        return int(self.look(self._grey())[0].shape[1])


def _pooled(output: Any) -> "Tensor":
    """Give one vector a picture from the output of a model without a classifier."""
    if not hasattr(output, "last_hidden_state"):
        return output
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled
    hidden = output.last_hidden_state
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


def find_middle(net: "nn.Module") -> "nn.Module | None":
    """Find a layer in the middle: of timm's stages, else of the longest list of layers."""
    from torch import nn

    stages = getattr(net, "feature_info", None)
    if stages is not None:
        infos = stages if isinstance(stages, list) else stages.info
        names = [info["module"] for info in infos]
        with suppress(AttributeError, IndexError):  # some of timm's nets name what is not there
            return net.get_submodule(names[(len(names) - 1) // 2])
    lists = [part for part in net.modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    longest = max(lists, key=len, default=None)
    return longest[(len(longest) - 1) // 2] if longest is not None else None


def pool_places(output: Any) -> "Float[Tensor, 'b k']":
    """Take the mean over the places of a feature map or the tokens of a sequence."""
    if isinstance(output, tuple | list):
        output = output[0]
    if output.ndim == 3:
        return output.mean(dim=1)
    if output.ndim == 4:
        is_last = output.shape[1] == output.shape[2] != output.shape[3]  # Swin's (b, h, w, k)
        return output.mean(dim=(1, 2) if is_last else (2, 3))
    return output.flatten(1)


def find_head(net: "nn.Module") -> "nn.Linear | None":
    """Find the last linear layer of a classifier; None where there is none."""
    from torch import nn

    found: Any = net
    head = (
        found.get_classifier() if hasattr(net, "get_classifier") else getattr(net, "classifier", 0)
    )
    if isinstance(head, nn.Sequential):
        head = next((layer for layer in reversed(head) if isinstance(layer, nn.Linear)), None)
    return head if isinstance(head, nn.Linear) else None


def load_image_model(name: str, device: str | None = None, dtype: Dtype = "auto") -> ImageModel:
    """Load an image model.

    Args:
        name: A folder of `recipes/train_extractor.py` or of timm or transformers, a timm model
            name, `hf-hub:OWNER/NAME`, `local-dir:FOLDER`, or a Hub id of either library.
        device: Where it runs; None is a GPU if there is one.
        dtype: Its numbers; auto is float32.

    Raises:
        InputError: If it cannot be found, reached or read.
    """
    net, settings = _load(name)
    with loading(name):
        return ImageModel(net, name, device, dtype, **settings)


def _load(name: str) -> tuple["nn.Module", dict[str, Any]]:
    """Give a model and the settings of an `ImageModel`."""
    import timm

    folder = expand_home(name)
    if (folder / DESCRIPTION).is_file():
        net, found = read_classifier(folder)
        given = {key: getattr(found, key) for key in ("mean", "std", "crop", "labels")}
        return net, {"size": found.image_size, **given}
    place = name.removeprefix("hf-hub:").removeprefix("local-dir:")
    if "/" not in place and not Path(place).is_dir():
        if not timm.is_model(place.split(".")[0]):
            raise InputError(f"no model {name}: neither a folder, a timm model nor a Hub id")
        place = _hub_id(place)
    try:
        place, revision = find_model(place)
    except ModelOutOfReach as error:
        hint = "the default model needs it: " if name == DEFAULT_IMAGE_MODEL else ""
        raise InputError(
            f"{error}: {hint}give a folder as --embedding-model (recipes/train_extractor.py makes "
            "one from the dataset itself), or --ready-embeddings"
        ) from error
    with loading(name):
        config = _read_config(place, revision)
        if "architecture" in config:
            net, settings = _load_timm(place, revision)
            settings["labels"] = tuple(config.get("label_names", ()))
        else:
            net, settings = _load_transformers(place, revision)
    return net, {"revision": revision, **settings}


def _hub_id(name: str) -> str:
    """Give the repository of a timm model's weights, which their tag is part of."""
    import timm

    found: Any = timm.get_pretrained_cfg(name)
    owner = (found and found.hf_hub_id) or "timm/"
    tag = f".{found.tag}" if found and found.tag and "." not in name else ""
    return f"{owner}{name}{tag}" if owner.endswith("/") else owner


def _read_config(place: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    path = Path(place) / "config.json"
    if not Path(place).is_dir():
        path = Path(hf_hub_download(place, "config.json", revision=revision))
    elif not path.is_file():
        raise InputError(f"the folder {place} holds no model: it has no config.json")
    return json.loads(path.read_text())


def _load_timm(place: str, revision: str | None) -> tuple["nn.Module", dict[str, Any]]:
    import timm

    address = f"local-dir:{place}" if Path(place).is_dir() else f"hf-hub:{place}@{revision}"
    net = timm.create_model(address, pretrained=True)
    data = timm.data.resolve_model_data_config(net)
    settings = {"size": data["input_size"][-1], "mean": data["mean"], "std": data["std"]}
    resample = FILTERS.get(data["interpolation"], 3)
    return net, {**settings, "crop": data["crop_pct"], "resample": resample}


def _load_transformers(place: str, revision: str | None) -> tuple["nn.Module", dict[str, Any]]:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
    )

    where: dict[str, Any] = {"revision": revision, "local_files_only": Path(place).is_dir()}
    where["trust_remote_code"] = False
    config: Any = AutoConfig.from_pretrained(place, **where)
    is_classifier = any("ImageClassification" in a for a in config.architectures or [])
    kind = AutoModelForImageClassification if is_classifier else AutoModel
    net: Any = kind.from_pretrained(place, **where)
    net = getattr(net, "vision_model", net)  # of pairs such as CLIP and SigLIP
    processor: Any = AutoImageProcessor.from_pretrained(place, backend="pil", **where)
    size: Any = dict(processor.size)
    scaled = size.get("shortest_edge") or size["height"]
    cut = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    side = int(dict(cut)["height"] if cut else scaled)
    labels = getattr(config, "id2label", None) if is_classifier else None
    return net, {
        "size": side,
        "mean": processor.image_mean or IMAGENET[0],
        "std": processor.image_std or IMAGENET[1],
        "crop": side / scaled,
        "resample": int(processor.resample if processor.resample is not None else 3),
        "labels": tuple(labels[k] for k in sorted(labels)) if labels else (),
    }
