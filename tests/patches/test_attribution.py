import functools

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from dq_multimodal.config import InputError
from dq_multimodal.patches.attribution import (
    GradCamPlusPlus,
    channel_weights,
    find_layer,
    patch_scores,
)
from dq_multimodal.patches.grid import drop_lowest, grid_shape


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Toy(nn.Module):
    """A convolution, and logits that are linear in its output."""

    def __init__(self, size=5, channels=3, n_classes=4, activation=None):
        super().__init__()
        self.features = nn.Conv2d(3, channels, 3, padding=1)
        self.activation = activation or nn.Identity()
        self.head = nn.Linear(channels * size * size, n_classes)

    def forward(self, images):
        return self.head(self.activation(self.features(images)).flatten(1))


def images_of(n, height, width=None, dtype=torch.float32):
    return torch.randn(n, 3, height, width or height, dtype=dtype)


@functools.cache
def resnet():
    torch.manual_seed(1)
    model = timm.create_model("resnet18", num_classes=10).eval()
    for module in model.modules():  # an untrained ResNet's logits barely depend on its images
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@functools.cache
def vit(img_size=64, dynamic=False):
    torch.manual_seed(1)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=img_size, num_classes=10, depth=3, dynamic_img_size=dynamic
    ).eval()
    nn.init.normal_(model.head.weight, std=0.1)
    return model


# The definition


def test_alpha_is_the_ratio_of_derivatives_of_exp_s():
    model = Toy().double().eval()
    image = images_of(1, 5, dtype=torch.float64)
    features = model.features(image).detach()
    for label in range(4):

        def y(a, label=label):
            return model.head(a.flatten(1))[0, label].exp()

        flat = features.flatten().requires_grad_(True)
        (first,) = torch.autograd.grad(y(flat[None]), flat, create_graph=True)
        second, third = torch.empty_like(flat), torch.empty_like(flat)
        for i in range(len(flat)):
            (row,) = torch.autograd.grad(first[i], flat, create_graph=True)
            second[i] = row[i].detach()
            third[i] = torch.autograd.grad(row[i], flat, retain_graph=True)[0][i]
        total = features.sum((2, 3)).repeat_interleave(25, dim=1)[0]
        alpha = second / (2 * second + total * third)
        slope = torch.autograd.grad(y(flat[None]).log(), flat)[0]
        weights = (alpha * slope.relu()).reshape(3, 25).sum(1)
        wanted = torch.einsum("k,khw->hw", weights, features[0]).relu()

        with GradCamPlusPlus(model, model.features) as cam:
            result = cam(image, torch.tensor([label]))
        assert result.maps.dtype == torch.float64
        torch.testing.assert_close(result.maps[0], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_weights_are_finite_at_and_around_every_pole(dtype, eps):
    slope = torch.logspace(-45, 6, 2000, dtype=torch.float64).to(dtype)
    for total in (-2 / slope, -2 / slope.nextafter(slope + 1), 2 / slope, 0 * slope, -slope):
        total = total.clamp(-1e30, 1e30)
        weights = channel_weights(
            total[:, None, None, None], slope[:, None, None, None].clone(), eps
        )
        assert weights.isfinite().all()
    pole = channel_weights(torch.full((1, 1, 1, 1), -2.0), torch.ones(1, 1, 1, 1))
    assert pole.item() == 0
    zeros = torch.zeros(1, 2, 3, 3)
    assert channel_weights(zeros, zeros, eps).tolist() == [[0, 0]]


# Another implementation


def oracle(model, layer, images, labels, reshape=None):
    """Raw maps of the package grad-cam, before it scales them."""
    gradcam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with gradcam.GradCAMPlusPlus(model, [layer], reshape_transform=reshape) as cam:
        targets = [ClassifierOutputTarget(label) for label in labels]
        cam(images, targets)
        activations = cam.activations_and_grads.activations[0].numpy()
        gradients = cam.activations_and_grads.gradients[0].numpy()
        weights = cam.get_cam_weights(images, layer, targets, activations, gradients)
        raw = cam.get_cam_image(images, layer, targets, activations, gradients)
    coarse = torch.from_numpy(raw).relu()[:, None]
    maps = functional.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=False)
    return activations, gradients, weights, maps[:, 0]


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_equals_grad_cam(family):
    model = {"resnet": resnet, "vit": vit}[family]().double()
    try:
        images = images_of(3, 64, dtype=torch.float64)
        labels = [0, 7, 3]
        layer, _ = find_layer(model)
        reshape = None
        if family == "vit":
            assert layer is model.blocks[-1].norm1

            def reshape(tokens):
                return tokens[:, 1:].reshape(len(tokens), 4, 4, -1).permute(0, 3, 1, 2)

        activations, gradients, weights, maps = oracle(model, layer, images, labels, reshape)
        ours = channel_weights(torch.tensor(activations), torch.tensor(gradients), eps=1e-6)
        np.testing.assert_allclose(ours, weights, rtol=1e-9, atol=1e-14)
        with GradCamPlusPlus(model, eps=1e-6) as cam:
            result = cam(images, torch.tensor(labels))
        assert maps.amax((1, 2)).min() > 0
        torch.testing.assert_close(result.maps, maps, rtol=1e-8, atol=1e-8 * maps.max().item())
    finally:
        model.float()


@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_weights_equal_grad_cam_where_denominators_are_negative(scale):
    gradcam = pytest.importorskip("pytorch_grad_cam")
    features, slope = torch.randn(2, 4, 50, 3, 3, dtype=torch.float64).mul(scale)
    slope[0, 0] = 0
    assert (2 + slope * features.sum((2, 3), keepdim=True) < 0).any() or scale < 1
    arrays = features.numpy(), slope.numpy()
    wanted = gradcam.GradCAMPlusPlus.get_cam_weights(None, None, None, None, *arrays)
    np.testing.assert_allclose(channel_weights(features, slope, eps=1e-6), wanted, rtol=1e-8)


# Batches, classes, types


@pytest.mark.parametrize("make", [resnet, vit])
def test_a_batch_is_its_images_one_by_one(make):
    images = images_of(4, 64)
    with GradCamPlusPlus(make()) as cam:
        batch = cam(images)
        for i in range(4):
            one = cam(images[i : i + 1])
            scale = batch.maps[i].max().item()
            torch.testing.assert_close(one.maps[0], batch.maps[i], rtol=1e-3, atol=1e-3 * scale)
            assert one.classes[0] == batch.classes[i]


def test_classes():
    model, images = resnet(), images_of(4, 64)
    with torch.no_grad():
        logits = model(images)
    predicted = logits.argmax(1)
    with GradCamPlusPlus(model) as cam:
        free = cam(images)
        given = cam(images, predicted)
        mixed = cam(images, torch.tensor([-1, 9, 0, -1], dtype=torch.int32))
        other = cam(images, torch.tensor([9, 9, 0, 0]))
    torch.testing.assert_close(free.logits, logits)
    assert not free.logits.requires_grad and not free.maps.requires_grad
    assert torch.equal(free.classes, predicted) and torch.equal(free.maps, given.maps)
    assert mixed.classes.tolist() == [predicted[0], 9, 0, predicted[3]]
    assert torch.equal(mixed.maps[[0, 3]], free.maps[[0, 3]])
    assert torch.equal(mixed.maps[[1, 2]], other.maps[[1, 2]])
    assert not torch.equal(other.maps[3], free.maps[3]) or predicted[3] == 0


@pytest.mark.parametrize(
    "classes", [[0, 10], [0, -2], [0], [[0, 1]], [0.0, 1.0]], ids=["high", "low", "n", "2d", "f"]
)
def test_bad_classes(classes):
    with GradCamPlusPlus(resnet()) as cam, pytest.raises(InputError, match="classes must be 2"):
        cam(images_of(2, 64), torch.tensor(classes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_finished_in_float32(dtype):
    model = Toy().eval()
    images = images_of(2, 5)
    with GradCamPlusPlus(model, model.features) as cam:
        wanted = cam(images, torch.tensor([0, 1])).maps
        model.to(dtype)
        maps = cam(images.to(dtype), torch.tensor([0, 1])).maps
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, wanted, rtol=0.1, atol=0.1 * wanted.max().item())


def test_an_empty_batch():
    with GradCamPlusPlus(resnet()) as cam:
        result = cam(images_of(0, 64), torch.tensor([], dtype=torch.int64))
    assert result.maps.shape == (0, 64, 64) and patch_scores(result.maps, 16).shape == (0, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [resnet, vit])
def test_a_gpu_gives_the_same_order(make):
    model, images = make().double(), images_of(3, 64, dtype=torch.float64)
    try:
        with GradCamPlusPlus(model) as cam:
            here = cam(images)
            model.cuda()
            there = cam(images.cuda(), here.classes)
        assert there.maps.is_cuda
        torch.testing.assert_close(there.maps.cpu(), here.maps, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            patch_scores(there.maps, 16).cpu(), patch_scores(here.maps, 16), rtol=1e-6, atol=1e-9
        )
    finally:
        model.float().cpu()


# What stays as it was


def hooks(model):
    return [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    ]


class Broken(Exception):
    pass


def test_nothing_stays_behind():
    model = Toy().eval()
    model.features.weight.requires_grad_(False)
    model.head.bias.grad = marker = torch.ones(4)
    before = hooks(model), [p.requires_grad for p in model.parameters()]
    images = images_of(2, 5)

    def state():
        return hooks(model), [p.requires_grad for p in model.parameters()]

    with GradCamPlusPlus(model, model.features) as cam:
        assert sum(hooks(model)) == 1
        cam(images)
        assert torch.is_grad_enabled() and model(images).requires_grad
        with cam:  # opened twice: still one hook
            assert sum(hooks(model)) == 1
    assert state() == before
    with pytest.raises(InputError, match="open it first"):
        cam(images)

    def fail(*_):
        raise Broken

    handle = model.head.register_forward_hook(fail)
    with pytest.raises(Broken), GradCamPlusPlus(model, model.features) as cam:
        cam(images)
    handle.remove()
    assert state() == before and torch.is_grad_enabled()
    with GradCamPlusPlus(model, model.features) as cam:  # one failure does not spoil the next call
        handle = model.head.register_forward_hook(fail)
        with torch.no_grad(), pytest.raises(Broken):
            cam(images)
        handle.remove()
        assert torch.is_grad_enabled() and cam(images).maps.isfinite().all()
        assert not model(images).isnan().any()
    assert state() == before
    assert model.head.bias.grad is marker and marker.tolist() == [1] * 4
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.bias")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_of_the_caller(mode):
    model = Toy().eval()
    images = images_of(2, 5)
    with GradCamPlusPlus(model, model.features) as cam:
        wanted = cam(images).maps
        with mode():
            was = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            again = cam(images.clone()).maps  # an inference tensor, under inference mode
            assert was == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert torch.equal(again, wanted)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_an_inplace_activation_after_the_layer():
    images = images_of(2, 5)
    results = []
    for inplace in (False, True):
        torch.manual_seed(3)
        model = Toy(activation=nn.ReLU(inplace=inplace)).eval()
        with GradCamPlusPlus(model, model.features) as cam:
            results.append(cam(images).maps)
    assert torch.equal(*results)


# Families


def timm_model(name, **options):
    return lambda: timm.create_model(name, num_classes=5, **options)


def transformers_model(name, **options):
    def make():
        import transformers

        config = getattr(transformers, f"{name}Config")(num_labels=5, **options)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return make


SWIN = {"embed_dim": 12, "depths": (1, 2), "num_heads": (2, 2), "window_size": 4}
SWIN |= {"img_size": (32, 64)}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64}
TINY_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
HF_VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
HF_VIT |= {"intermediate_size": 32, "image_size": (48, 64)}
HF_SWIN = {"embed_dim": 12, "depths": [1, 1, 1], "num_heads": [2, 2, 2], "window_size": 2}
HF_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
HF_CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg"}
FAMILIES = {
    "resnet": (timm_model("resnet10t"), (64, 96)),
    "convnext": (timm_model("convnext_atto", **TINY_CONVNEXT), (64, 96)),
    "mobilenetv2": (timm_model("mobilenetv2_035"), (64, 96)),
    "mobilenetv3": (timm_model("mobilenetv3_small_050"), (64, 96)),
    "swin": (timm_model("swin_tiny_patch4_window7_224", **SWIN), (32, 64)),
    "swinv2": (timm_model("swinv2_tiny_window8_256", **SWIN), (32, 64)),
    "vit": (timm_model("vit_tiny_patch16_224", **VIT | {"img_size": (64, 96)}), (64, 96)),
    "vit dynamic": (timm_model("vit_tiny_patch16_224", dynamic_img_size=True, **VIT), (96, 64)),
    "vit registers": (timm_model("vit_tiny_patch16_224", reg_tokens=4, **VIT), (64, 64)),
    "vit average": (timm_model("vit_tiny_patch16_224", **NO_CLASS_TOKEN, **VIT), (64, 64)),
    "deit": (timm_model("deit_tiny_distilled_patch16_224", **VIT), (64, 64)),
    "hf vit": (transformers_model("ViT", **HF_VIT), (48, 64)),
    "hf resnet": (transformers_model("ResNet", **HF_RESNET), (64, 96)),
    "hf convnext": (transformers_model("ConvNext", **HF_CONVNEXT), (64, 96)),
    "hf swin": (transformers_model("Swin", image_size=64, **HF_SWIN), (50, 72)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    make, size = FAMILIES[family]
    model = make().eval()
    for name, parameter in model.named_parameters():  # heads start near 0, some layers at 0
        if parameter.ndim > 1 or name.endswith(("gamma", "layer_scale_parameter")):
            nn.init.normal_(parameter, std=0.2)
    images = images_of(2, *size)
    with torch.no_grad():
        output = model(images)
    before = hooks(model)
    layer, _ = find_layer(model)
    grids = []
    with GradCamPlusPlus(model) as cam:
        if cam.to_grid:
            inner = cam.to_grid
            cam.to_grid = lambda *given: grids.append(inner(*given)) or grids[-1]
        assert cam.layer is layer
        result = cam(images, torch.tensor([4, -1]))
    assert result.maps.shape == (2, *size) and result.maps.isfinite().all()
    assert (result.maps >= 0).all() and result.maps.max() > 0
    torch.testing.assert_close(result.logits, getattr(output, "logits", output))
    assert hooks(model) == before
    for grid in grids:  # rows and columns are not mixed up
        assert abs(grid.shape[2] / grid.shape[3] - size[0] / size[1]) < 0.15


# Wrong use


def test_unknown_models():
    with pytest.raises(InputError, match=r"Toy: pass layer="):
        GradCamPlusPlus(Toy().eval())
    post = timm.create_model(
        "vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ResPostBlock
    )
    with pytest.raises(InputError, match=r"ResPostBlock.*layer="):
        find_layer(post)


def test_training_mode():
    model = Toy(activation=nn.BatchNorm2d(3)).eval()
    model.activation.train()
    with GradCamPlusPlus(model, model.features) as cam:
        with pytest.raises(InputError, match="eval mode, activation is training"):
            cam(images_of(2, 5))
        model.train()
        with pytest.raises(InputError, match="eval mode, it is training"):
            cam(images_of(2, 5))


class Odd(Toy):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.unused = nn.Identity()

    def forward(self, images):
        features = self.features(images)
        if self.kind == "twice":
            features = self.features(features)
        if self.kind == "aside":
            features = images
        if self.kind == "off":
            with torch.no_grad():
                return self.head(features.flatten(1))
        if self.kind == "flat":
            return self.head(features.flatten(1)).sum(1)
        if self.kind == "nan":
            features = features / 0
        return self.head(features.flatten(1))


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        ("never", "unused", "did not run"),
        ("twice", "features", "ran twice"),
        ("aside", "features", "no gradient"),
        ("off", "features", "no gradient"),
        ("flat", "features", r"logits must be \(b, classes\), got Tensor \(2,\)"),
        ("nan", "features", r"not finite.*\[0, 1\]"),
        ("tokens", "head", r"gives \(2, 4\).*: pass to_grid="),
    ],
)
def test_models_that_do_not_fit(kind, layer, message):
    model = Odd(kind).eval()
    with (
        GradCamPlusPlus(model, model.get_submodule(layer)) as cam,
        pytest.raises(InputError, match=message),
    ):
        cam(images_of(2, 5))
    assert torch.is_grad_enabled() and sum(hooks(model)) == 0


def test_other_bad_input():
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="eps must be finite"):
            GradCamPlusPlus(resnet(), eps=eps)
    images = images_of(3, 64)
    with GradCamPlusPlus(resnet()) as cam:
        with pytest.raises(InputError, match=r"shape \(b, 3, h, w\), got \(3, 64, 64\)"):
            cam(images[0])
        images[1, 0, 5, 5] = torch.nan
        with pytest.raises(InputError, match=r"not finite.*images \[1\]"):
            cam(images)
    with pytest.raises(InputError, match="patch_size must be at least 1, got 0"):
        patch_scores(torch.zeros(1, 4, 4), 0)


# Patches


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 50), (7, 40)])
@pytest.mark.parametrize("patch_size", [8, 45])
def test_patch_scores_are_means(height, width, patch_size):
    maps = torch.rand(3, height, width)
    scores = patch_scores(maps, patch_size)
    rows, columns = grid_shape(height, width, patch_size)
    assert scores.shape == (3, rows * columns) and scores.dtype == torch.float64
    for i in range(3):
        for patch in range(rows * columns):
            top, left = patch // columns * patch_size, patch % columns * patch_size
            cell = maps[i, top : top + patch_size, left : left + patch_size]
            assert scores[i, patch].item() == pytest.approx(cell.double().mean().item(), rel=1e-12)


def test_equal_patches_tie():
    scores = patch_scores(torch.full((2, 50, 33), 0.1), 16)
    assert (scores == scores[0, 0]).all()
    keep = drop_lowest(scores.numpy(), 3)
    assert np.array_equal(keep, np.arange(12) >= np.array([[3], [3]]))
