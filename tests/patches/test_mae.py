"""Filling holes: the mask in the model is ours, kept pixels stay, misfits are refused."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEForPreTraining,
)

from dq_multimodal import InputError
from dq_multimodal.patches import mae
from dq_multimodal.patches.fill import fill_mean, fill_zero, psnr_of_holes
from dq_multimodal.patches.grid import count_dropped, drop_lowest, grid_shape
from dq_multimodal.patches.mae import MaskedAutoencoder, load_mae, make_small_mae, save_mae

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE = 8
SHAPES = [(32, 32), (27, 45), (64, 64), (8, 128)]
"""Trained grid, no multiple of the patch, larger, one row of as many patches."""


def small_model(seed=0):
    torch.manual_seed(seed)
    return make_small_mae(32, SIZE, 32, 2, 16, 1)


@pytest.fixture(scope="module")
def small_mae():
    return MaskedAutoencoder(small_model(), MEAN, STD)


def some_images(n_images, height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n_images, height, width, channels), dtype=np.uint8)


def some_marks(n_images, height, width, ratio=0.4, seed=1):
    n_patches = math.prod(grid_shape(height, width, SIZE))
    scores = np.random.default_rng(seed).random((n_images, n_patches))
    return drop_lowest(scores, count_dropped(n_patches, ratio))


def naive_holes(images, keep, patch_size=SIZE):
    """Mark every pixel by its own patch number."""
    n_images, height, width, _ = images.shape
    columns = math.ceil(width / patch_size)
    holes = np.zeros((n_images, height, width), dtype=bool)
    for i in range(n_images):
        for y in range(height):
            for x in range(width):
                holes[i, y, x] = not keep[i, (y // patch_size) * columns + x // patch_size]
    return holes


def paint(model, colour):
    """Make the decoder predict one colour everywhere."""
    normalised = (np.array(colour) / 255 - MEAN) / STD
    with torch.no_grad():
        model.decoder.decoder_pred.weight.zero_()
        model.decoder.decoder_pred.bias.copy_(torch.from_numpy(np.tile(normalised, SIZE**2)))
    return MaskedAutoencoder(model, MEAN, STD)


@pytest.mark.parametrize("shape", SHAPES)
def test_kept_pixels_stay_and_holes_change_whatever_lies_in_them(small_mae, shape):
    images = some_images(3, *shape)
    keep = some_marks(3, *shape)
    before = images.copy()
    filled = small_mae.fill(images, keep)
    holes = naive_holes(images, keep)
    assert filled.dtype == np.uint8 and filled.shape == images.shape
    assert np.array_equal(filled[~holes], images[~holes])
    assert np.mean(filled[holes] != images[holes]) > 0.9
    assert np.array_equal(images, before)
    assert np.array_equal(filled, small_mae.fill(fill_zero(images, keep, SIZE), keep))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("colour", "shown"), [([200, 30, 121], [200, 30, 121]), ([-40, 300, 99.6], [0, 255, 100])]
)
def test_holes_take_the_predicted_colour_within_the_range(shape, colour, shown):
    images, keep = some_images(2, *shape), some_marks(2, *shape)
    wanted = images.copy()
    wanted[naive_holes(images, keep)] = shown
    assert np.array_equal(paint(small_model(), colour).fill(images, keep), wanted)


def masks_seen(model):
    """Collect the masks that the encoder reports."""
    seen = []
    model.vit.register_forward_hook(lambda module, args, out: seen.append(out.mask.numpy() == 0))
    return seen


@pytest.mark.parametrize("n_patches", [2, 7, 49, 196])
def test_every_count_of_dropped_patches(n_patches):
    model = make_small_mae(32, SIZE, 4, 1, 4, 1)
    seen = masks_seen(model)
    n_dropped = np.unique(np.linspace(1, n_patches - 1, 12).astype(int))
    keep = np.ones((len(n_dropped), n_patches), dtype=bool)
    for row, count in zip(keep, n_dropped, strict=True):
        row[np.random.default_rng(count).permutation(n_patches)[:count]] = False
    images = some_images(len(n_dropped), SIZE, SIZE * n_patches)
    MaskedAutoencoder(model, MEAN, STD).fill(images, keep)
    assert np.array_equal(np.concatenate(seen), keep)


def test_another_mask_or_no_numbers_are_an_error(monkeypatch):
    model = small_model()
    masking = model.vit.embeddings.random_masking
    monkeypatch.setattr(
        model.vit.embeddings, "random_masking", lambda x, noise=None: masking(x, -noise)
    )
    with pytest.raises(RuntimeError, match="must mask the dropped patches"):
        MaskedAutoencoder(model, MEAN, STD).fill(some_images(1, 32, 32), some_marks(1, 32, 32))
    assert model.config.mask_ratio == 0.5  # as it was
    with pytest.raises(RuntimeError, match="finite"):
        paint(small_model(), [0, float("nan"), 0]).fill(
            some_images(1, 32, 32), some_marks(1, 32, 32)
        )


def test_equals_the_whole_model_on_the_trained_grid(small_mae):
    images, keep = some_images(4, 32, 32), some_marks(4, 32, 32)
    model = small_mae.model
    pixels = torch.from_numpy((images / 255 - MEAN) / STD).float().permute(0, 3, 1, 2)
    model.config.mask_ratio = 6 / 16
    with torch.no_grad():
        out = model(pixels, noise=torch.from_numpy(1.0 - keep + np.linspace(0, 0.5, 16)))
        planes = model.unpatchify(out.logits).permute(0, 2, 3, 1).numpy()
    model.config.mask_ratio = 0.5
    assert np.array_equal(out.mask.numpy() == 0, keep)
    wanted = np.clip(np.rint((planes * STD + MEAN) * 255), 0, 255)
    holes = naive_holes(images, keep)
    assert np.abs(small_mae.fill(images, keep)[holes] - wanted[holes]).max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_equals_one_by_one(small_mae, shape, monkeypatch):
    images = some_images(7, *shape)
    keep = some_marks(7, *shape)
    n_patches = keep.shape[1]
    keep[1] = True
    keep[4] = np.arange(n_patches) == n_patches - 1
    keep[5] = np.arange(n_patches) != 1
    whole = small_mae.fill(images, keep)
    for batch_size in (1, 2, 64):
        monkeypatch.setattr(mae, "BATCH_IMAGES", batch_size)
        filled = small_mae.fill(images, keep)
        # Sums of another batch size may round otherwise in the last bit.
        assert np.abs(filled.astype(int) - whole).max() <= 1
    for i in range(7):
        one = small_mae.fill(images[i : i + 1], keep[i : i + 1])
        assert np.abs(one[0].astype(int) - whole[i]).max() <= 1
    assert np.array_equal(whole[1], images[1])


def test_nothing_dropped_gives_the_images_back(small_mae):
    images = some_images(2, 30, 20)
    keep = np.ones((2, 12), dtype=bool)
    for filled in (
        small_mae.fill(images, keep),
        fill_mean(images, keep, SIZE),
        fill_zero(images, keep, SIZE),
    ):
        assert np.array_equal(filled, images) and filled is not images
    assert small_mae.fill(images[:0], keep[:0]).shape == (0, 30, 20, 3)


def test_grey_images(small_mae):
    images = some_images(2, 27, 45, channels=1)
    keep = some_marks(2, 27, 45)
    filled = small_mae.fill(images, keep)
    holes = naive_holes(images, keep)
    assert filled.shape == images.shape
    assert np.array_equal(filled[~holes], images[~holes])
    rgb = small_mae.fill(np.repeat(images, 3, axis=3), keep).mean(axis=3, keepdims=True)
    assert np.abs(filled - rgb).max() <= 1
    painted = paint(small_model(), [10, 20, 60]).fill(images, keep)
    assert np.unique(painted[holes]).tolist() == [30]


@pytest.mark.parametrize("shape", [(32, 32), (24, 48), (16, 64), (70, 90)])
def test_the_decoder_knows_rows_from_columns(shape):
    """A decoder that shows its positions: red on the left half, green on the upper half."""
    model = small_model()
    decoder = model.decoder
    x, y = np.meshgrid([1, 1, -1, -1], [1, 1, -1, -1])
    table = np.zeros((17, 16), dtype=np.float32)
    table[1:, :4] = np.stack([x, -x, y, -y], axis=-1).reshape(16, 4)
    weight = np.zeros((SIZE**2, 3, 16), dtype=np.float32)
    weight[:, 0, 0] = weight[:, 1, 2] = 1
    with torch.no_grad():
        decoder.decoder_layers = torch.nn.ModuleList()
        for parameter in (*decoder.decoder_embed.parameters(), decoder.mask_token):
            parameter.zero_()
        decoder.decoder_pos_embed.copy_(torch.from_numpy(table))
        decoder.decoder_pred.weight.copy_(torch.from_numpy(weight.reshape(-1, 16)))
        decoder.decoder_pred.bias.zero_()
    wrapped = MaskedAutoencoder(model, (0.5, 0.5, 0.5), (0.1, 0.1, 0.1))

    height, width = shape
    rows, columns = grid_shape(height, width, SIZE)
    images = np.zeros((2, height, width, 3), dtype=np.uint8)
    even = np.arange(rows * columns) % 2 == 0
    keep = np.stack([even, ~even])
    filled = wrapped.fill(images, keep)
    holes = naive_holes(images, keep)
    merged = np.where(holes[0, ..., None], filled[0], filled[1]).astype(int)
    column, row = np.meshgrid(np.arange(width) // SIZE, np.arange(height) // SIZE)
    for channel, place, middle in ((0, column, (columns - 1) / 2), (1, row, (rows - 1) / 2)):
        level = merged[..., channel]
        assert (level[place < middle] > 128).all() and (level[place > middle] < 128).all()


def test_naive_fills_and_psnr():
    for channels in (1, 3):
        images = some_images(3, 19, 29, channels)
        keep = some_marks(3, 19, 29)
        keep[2] = True
        holes = naive_holes(images, keep)
        mean, zero = images.copy(), images.copy()
        for i in range(3):
            for c in range(channels):
                kept = images[i, ..., c][~holes[i]].tolist()
                mean[i, ..., c][holes[i]] = round(sum(kept) / len(kept))
                zero[i, ..., c][holes[i]] = 0
        assert np.array_equal(fill_mean(images, keep, SIZE), mean)
        assert np.array_equal(fill_zero(images, keep, SIZE), zero)

        psnr = psnr_of_holes(images, mean, keep, SIZE)
        for i in range(2):
            errors = [
                (int(images[i, y, x, c]) - int(mean[i, y, x, c])) ** 2
                for y, x in zip(*np.nonzero(holes[i]), strict=True)
                for c in range(channels)
            ]
            wanted = 10 * math.log10(255**2 / (sum(errors) / len(errors)))
            assert psnr[i] == pytest.approx(wanted, rel=1e-12)
        assert psnr[2] == math.inf
        assert (psnr_of_holes(images, images, keep, SIZE) == math.inf).all()


def test_small_models_have_positions_that_do_not_train():
    model = make_small_mae(16, 4, hidden_size=48, decoder_hidden_size=12)
    table = model.vit.embeddings.position_embeddings[0, 1:].reshape(4, 4, 2, 2, 12)
    for row in range(4):
        for column in range(4):
            for place, axis in ((column, 0), (row, 1)):
                angles = place / 10000 ** (np.arange(12) / 12)
                wanted = np.stack([np.sin(angles), np.cos(angles)])
                assert np.allclose(table[row, column, axis], wanted, atol=1e-6)
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert not table.requires_grad and len(np.unique(table.numpy(), axis=1)[0]) == 17
    assert model.config.norm_pix_loss is False and model.decoder.mask_token.any()
    for sizes in ((30, 8), (32, 8, 30), (32, 8, 32, 1, 18)):
        with pytest.raises(InputError, match="must be a multiple of"):
            make_small_mae(*sizes)


def test_saved_and_read_back(tmp_path):
    model = small_model()
    save_mae(model, MEAN, STD, tmp_path)
    loaded = load_mae(tmp_path, device="cpu")
    assert loaded.patch_size == SIZE and loaded.name == str(tmp_path)
    assert loaded.mean == list(MEAN) and loaded.std == list(STD)
    assert not loaded.model.training and loaded.model.config.mask_ratio == 0.5
    images, keep = some_images(2, 32, 40), some_marks(2, 32, 40)
    wanted = MaskedAutoencoder(model, MEAN, STD).fill(images, keep)
    assert np.array_equal(loaded.fill(images, keep), wanted)

    processor = AutoImageProcessor.from_pretrained(tmp_path)
    processed = processor(images=images[:, :, :32], return_tensors="np")["pixel_values"]
    wanted = ((images[:, :, :32] / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    assert np.allclose(processed, wanted, atol=1e-5)

    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    plain = load_mae(tmp_path)
    assert (plain.mean, plain.std) == ([0.0] * 3, [1.0] * 3)
    (tmp_path / "preprocessor_config.json").unlink()
    bare = load_mae(tmp_path)
    assert bare.mean == mae.IMAGENET_COLOURS["image_mean"]


def test_checkpoints_of_older_releases(tmp_path):
    """The Hub's checkpoints name their weights as transformers before 5 did."""
    save_mae(small_model(), MEAN, STD, tmp_path)
    images, keep = some_images(2, 32, 32), some_marks(2, 32, 32)
    wanted = load_mae(tmp_path, device="cpu").fill(images, keep)
    old = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for new, before in (
            ("vit.layers.", "vit.encoder.layer."),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            name = name.replace(new, before)
        old[name] = tensor
    assert "vit.encoder.layer.1.attention.attention.query.weight" in old
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert np.array_equal(load_mae(tmp_path, device="cpu").fill(images, keep), wanted)


def changed(**changes):
    """Give what writes a model whose configuration says something else."""

    def write(folder):
        save_mae(small_model(), MEAN, STD, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return write


def write_classifier(folder):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = ViTConfig(image_size=32, patch_size=8, intermediate_size=8, **shape)
    ViTForImageClassification(config).save_pretrained(folder)


def write_no_weights(folder):
    save_mae(small_model(), MEAN, STD, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")


def write_no_positions(folder):
    """What transformers makes of a config has none, nor has what is trained from that."""
    save_mae(ViTMAEForPreTraining(small_model().config), MEAN, STD, folder)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (
            lambda folder: small_model().vit.save_pretrained(folder),
            "encoder and decoder, but lacks",
        ),
        (changed(norm_pix_loss=True), "norm_pix_loss"),
        (changed(num_channels=1), "3 channels"),
        (changed(image_size=[32, 128]), "square"),
        (changed(model_type="no_such"), "cannot load"),
        (changed(hidden_size=64), "cannot load"),
        (changed(num_hidden_layers=3), "lacks"),
        (write_classifier, "must be a masked autoencoder (vit_mae), got vit"),
        (write_no_weights, "cannot load"),
        (write_no_positions, "positions are all 0"),
        (lambda folder: None, "cannot load"),
        (lambda folder: folder.rmdir(), ""),
    ],
)
def test_folders_that_will_not_do_are_one_line(tmp_path, write, reason, capfd):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    capfd.readouterr()
    with pytest.raises(InputError) as caught:
        load_mae(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and reason in message
    assert "MISSING" not in capfd.readouterr().err  # what transformers prints of weights


def test_a_model_that_the_hub_would_have():
    with pytest.raises(InputError, match="out of reach"):
        load_mae("facebook/vit-mae-no-such")


def test_bad_input_is_refused(small_mae, tmp_path):
    images, keep = some_images(2, 32, 32), some_marks(2, 32, 32)
    with pytest.raises(InputError, match=r"uint8 .* got float64 \(2, 32, 32, 3\)"):
        small_mae.fill(images / 1.0, keep)
    with pytest.raises(InputError, match="images must be"):
        small_mae.fill(images[0], keep)
    with pytest.raises(InputError, match=r"bool \(2, 16\) for patches of 8, got bool \(2, 15\)"):
        small_mae.fill(images, keep[:, 1:])
    with pytest.raises(InputError, match="got int64"):
        fill_mean(images, keep.astype(int), SIZE)
    for fill in (small_mae.fill, lambda *args: fill_mean(*args, SIZE)):
        with pytest.raises(InputError, match="image 1 keeps none"):
            fill(images, np.stack([keep[0], np.zeros(16, dtype=bool)]))
    with pytest.raises(InputError, match="filled must be"):
        psnr_of_holes(images, images[:1], keep, SIZE)
    for mean, std in (((0.5,), (0.5,)), (MEAN, (0.1, 0.0, 0.1)), (MEAN, (0.1, math.nan, 0.1))):
        with pytest.raises(InputError, match="three numbers"):
            save_mae(small_mae.model, mean, std, tmp_path)


def test_threads_take_turns():
    """A call sets the model's mask ratio: two at once would mask each other's patches."""
    model = make_small_mae(16, 4, 32, 1, 32, 1)
    autoencoder = MaskedAutoencoder(model, (0.5,) * 3, (0.5,) * 3)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    keeps = [drop_lowest(rng.random((8, 16)), 1 + k % 9) for k in range(40)]
    alone = [autoencoder.fill(images, keep) for keep in keeps]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda keep: autoencoder.fill(images, keep), keeps))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.astype(int), other, atol=1)
