"""The image trainer of the benchmark, on tiny pictures made in code."""

import numpy as np
import pytest
import torch
from harness import images
from harness.suite import Job

CPU = torch.device("cpu")
PLAIN = {"batch_size": 16, "learning_rate": 0.1, "epochs": 1, "precision": "float32"}


class Line(torch.nn.Module):
    """A linear layer on the mean colour, with known weights."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(self.line.weight, 0.1)
        torch.nn.init.zeros_(self.line.bias)

    def forward(self, x):
        return self.line(x.mean((2, 3)))


class Pack:
    """Stands in for a bundle: two classes of 8 px, dark above or dark below, under noise."""

    def __init__(self, n=96, side=8, labels=None):
        rng = np.random.default_rng(0)
        self.arrays = {}
        for split in ("train", "test"):
            classes = rng.integers(0, 2, n)
            pictures = rng.integers(60, 256, (n, side, side, 3))
            half = np.arange(side)[None, :, None, None] < side // 2
            is_dark = half == (classes == 0)[:, None, None, None]
            pictures = np.where(is_dark, pictures // 3, pictures)
            self.arrays[f"t/{split}/images"] = pictures.astype(np.uint8)
            self.arrays[f"t/{split}/labels"] = classes.astype(np.int64)
        if labels is not None:
            self.arrays["t/train/labels"] = labels

    def array(self, name):
        return self.arrays[name]


PACK = Pack()


def job(
    rows=96, net="small-cnn", keep_ratio=1.0, seed=0, weights=None, is_sampled=False, **settings
):
    protocol = images.Protocol(**(PLAIN | settings))
    return Job("t", protocol, net, np.arange(rows), keep_ratio, seed, weights, is_sampled)


def train(pack=PACK, progress=lambda share: None, **settings):
    return images.train(job(**settings), pack, CPU, progress)


def final_weights(monkeypatch, **settings):
    """Train, and give the numbers of the net at the end too."""
    nets, make = [], images.build_net
    with monkeypatch.context() as patch:
        patch.setattr(images, "build_net", lambda *a: nets.append(make(*a)) or nets[0])
        found = train(**settings)
    return found, torch.cat([v.detach().double().flatten() for v in nets[0].parameters()])


def test_an_easy_set_is_learnt():
    found = train(epochs=8, evaluations=4, mirror=True)
    accuracy = found["metrics"]["test accuracy"]
    assert 85 < accuracy["last"] <= accuracy["best"] <= 100
    assert found["steps"] == 48 and found["batch_size"] == 16 and found["epochs"] == 8
    assert train(epochs=1)["metrics"]["test accuracy"]["best"] is None  # there was one test only


def test_the_same_job_gives_the_same_numbers(monkeypatch):
    settings = {"epochs": 2, "crop": "reflect", "cutout": 3, "evaluations": 2}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, weights = final_weights(monkeypatch, **settings)
    assert torch.equal(torch.get_rng_state(), before)  # the state of the process is left alone
    torch.manual_seed(2)
    again, same = final_weights(monkeypatch, **settings)
    assert first == again and torch.equal(weights, same)
    _, other = final_weights(monkeypatch, seed=1, **settings)
    assert not torch.equal(weights, other)


def test_rows_of_weight_zero_have_no_say(monkeypatch):
    """Their labels may be anything: only the normalisation of the batch sees their pixels."""
    weights = np.repeat([0.0, 2.0], 48)
    labels = PACK.arrays["t/train/labels"].copy()
    labels[:48] = 1 - labels[:48]
    pack = Pack(labels=labels)
    _, right = final_weights(monkeypatch, weights=weights, epochs=2)
    _, wrong = final_weights(monkeypatch, weights=weights, epochs=2, pack=pack)
    assert torch.equal(right, wrong)
    _, unweighted = final_weights(monkeypatch, epochs=2)
    _, unweighted_wrong = final_weights(monkeypatch, epochs=2, pack=pack)
    assert not torch.equal(unweighted, unweighted_wrong)
    assert not torch.equal(unweighted, right)


def test_weights_reach_the_step(monkeypatch):
    """One step of plain SGD from known weights, with smoothed labels: the gradient by hand."""

    nets = []
    monkeypatch.setattr(images, "build_net", lambda *a: nets.append(Line()) or nets[-1])
    weights = np.array([0.0, 1, 2, 3, 0, 0, 1, 1])
    same = {"crop": "none", "mirror": False, "momentum": 0.0, "weight_decay": 0.0}
    same["label_smoothing"] = 0.2
    train(rows=8, weights=weights, batch_size=8, **same)
    pixels = PACK.arrays["t/train/images"][:8].astype(float)
    features = (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    features = features.mean((1, 2))
    bias_slope = np.zeros(2)
    for x, label, weight in zip(features, PACK.arrays["t/train/labels"], weights, strict=False):
        logits = np.full(2, 0.1 * x.sum())
        p = np.exp(logits) / np.exp(logits).sum()
        bias_slope += weight * (p - (0.8 * np.eye(2)[label] + 0.1)) / 8
    np.testing.assert_allclose(nets[0].line.bias.detach().numpy(), -0.1 * bias_slope, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "keep_ratio", "batch", "steps"),
    [(96, 0.1, 4, 48), (96, 0.2, 16, 12), (97, 0.3, 16, 12), (96, 1.0, 32, 6), (20, 1.0, 20, 2)],
)
def test_batch_and_steps_follow_the_keep_ratio(rows, keep_ratio, batch, steps):
    by_ratio = {0.1: 4, 0.3: 16, 1.0: 32}
    equal_epochs = images.Protocol(batch_size=by_ratio, learning_rate=0.1, epochs=2)
    assert images.count_steps(equal_epochs, rows, keep_ratio) == (batch, steps)
    equal_steps = images.Protocol(batch_size=by_ratio, learning_rate=0.1, steps=7)
    assert images.count_steps(equal_steps, rows, keep_ratio) == (batch, 7)


def test_an_epoch_shows_every_row_once_less_what_is_left_over():
    pictures = images.load_pictures(PACK, "t", CPU)
    protocol = images.Protocol(**PLAIN)
    rows, fill = torch.arange(5, 45), torch.zeros(3, dtype=torch.uint8)
    batches = images.make_batches(
        pictures, rows, 16, protocol, fill, torch.Generator().manual_seed(0)
    )
    epochs = [torch.cat([next(batches)[1], next(batches)[1]]) for _ in range(3)]
    for places in epochs:
        assert len(places) == 32 and len(places.unique()) == 32 and places.max() < 40
    assert not torch.equal(epochs[0], epochs[1])


def test_rows_are_drawn_in_proportion_to_their_chances():
    pictures = images.load_pictures(PACK, "t", CPU)
    rows, fill = torch.arange(40), torch.zeros(3, dtype=torch.uint8)
    chances = torch.tensor([0.0, 1.0, 3.0, 0.0] * 10)
    generator = torch.Generator().manual_seed(0)
    batches = images.make_batches(
        pictures, rows, 40, images.Protocol(**PLAIN), fill, generator, chances
    )
    drawn = torch.cat([next(batches)[1] for _ in range(250)])
    share = torch.bincount(drawn, minlength=40).double() / len(drawn)
    # 10,000 draws: the deviation of a share of 7.5 % is 0.26 %
    assert (share - chances / chances.sum()).abs().max() < 0.012
    assert share[0] == share[3] == 0


def test_weights_are_chances_where_the_suite_says_so(monkeypatch):
    weights = np.repeat([0.0, 2.0], 48)
    labels = PACK.arrays["t/train/labels"].copy()
    labels[:48] = 1 - labels[:48]
    given = {"weights": weights, "is_sampled": True, "epochs": 2}
    _, right = final_weights(monkeypatch, **given)
    _, wrong = final_weights(monkeypatch, **given, pack=Pack(labels=labels))
    assert torch.equal(right, wrong)
    _, in_loss = final_weights(monkeypatch, weights=weights, epochs=2)
    assert not torch.equal(right, in_loss)


@pytest.mark.parametrize("crop", ["none", "zero", "reflect"])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("cutout", [0, 3, 4])
def test_augmentation_is_its_definition(crop, mirror, cutout):
    rng = np.random.default_rng(0)
    height, width, pad = 16, 24, (2, 3)
    pixels = rng.integers(0, 256, (9, height, width, 3)).astype(np.uint8)
    rows, fill = np.array([3, 3, 0, 8, 5]), np.array([7, 8, 9], dtype=np.uint8)
    protocol = images.Protocol(**(PLAIN | {"crop": crop, "mirror": mirror, "cutout": cutout}))
    generator = torch.Generator().manual_seed(4)
    draws = images.Draws.make(len(rows), height, width, generator)
    found = images.augment(
        torch.tensor(pixels), torch.tensor(rows), draws, protocol, torch.tensor(fill)
    )
    assert found.dtype == torch.uint8
    for number, row in enumerate(rows):
        picture = pixels[row]
        if crop != "none":
            modes = {"zero": "constant", "reflect": "reflect"}
            padded = np.pad(picture, ((pad[0],) * 2, (pad[1],) * 2, (0, 0)), modes[crop])
            top, left = draws.shift[number].numpy() + pad
            picture = padded[top : top + height, left : left + width]
        if mirror and draws.is_mirrored[number]:
            picture = picture[:, ::-1]
        picture = picture.copy()
        for i in range(height):
            for j in range(width):
                centre_i, centre_j = draws.hole[number].numpy() - cutout // 2
                if 0 <= i - centre_i < cutout and 0 <= j - centre_j < cutout:
                    picture[i, j] = fill
        np.testing.assert_array_equal(found[number].numpy(), picture)


def test_colours_are_those_of_the_kept_rows():
    pixels = torch.tensor(PACK.arrays["t/train/images"])
    mean, spread = images.measure_colours(pixels, torch.tensor([1, 4, 5]))
    kept = pixels[[1, 4, 5]].double().numpy()
    np.testing.assert_allclose(mean, kept.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(spread, kept.std((0, 1, 2)), rtol=1e-5)


def test_rates_follow_the_schedule():
    cosine = images.Protocol(**PLAIN)
    assert images.rate_at(cosine, 0, 200) == 1
    assert images.rate_at(cosine, 50, 200) == pytest.approx((1 + np.cos(np.pi / 4)) / 2)
    one_cycle = images.Protocol(**PLAIN, warmup=0.25, decay="linear")
    rates = [images.rate_at(one_cycle, t, 40) for t in range(40)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 1 - np.arange(30) / 30)
    assert min(rates) > 0


def test_progress_rises_to_one_and_may_end_the_run():
    shares = []
    train(progress=shares.append, evaluations=3)
    assert shares == sorted(shares) and shares[0] == 0 < shares[1] < 0.3 and shares[-1] == 1
    assert len(shares) > 6

    class Enough(Exception):
        pass

    def stop(share):
        raise Enough

    state = torch.get_rng_state()
    with pytest.raises(Enough):
        train(progress=stop)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiled_cell_gives_nearly_the_same(monkeypatch):
    make = torch.compile  # without the compiler of C++, which takes a minute
    plain, eager = final_weights(monkeypatch, rows=32)
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: make(net, backend="eager"))
    monkeypatch.setattr(images, "pays_to_compile", lambda device, steps: True)
    found, compiled = final_weights(monkeypatch, rows=32)
    assert (plain["compiled"], found["compiled"]) == (None, "default")
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("can_compile", [True, False])
def test_long_cells_on_a_gpu_are_compiled_where_that_works(monkeypatch, can_compile):
    monkeypatch.setattr(images, "can_compile", lambda device: can_compile)
    cuda, least = torch.device("cuda"), images.COMPILE_STEPS
    assert images.pays_to_compile(cuda, least) is can_compile
    assert not images.pays_to_compile(cuda, least - 1) and not images.pays_to_compile(CPU, 10**6)


@pytest.mark.parametrize("net", ["resnet9", "small-cnn", "resnet10-narrow", "mobilenetv2"])
def test_nets_give_a_logit_a_class(net):
    logits = images.build_net(net, 7, 32)(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and torch.isfinite(logits).all()


def test_bf16_learns_too():
    assert train(epochs=8, precision="bf16")["metrics"]["test accuracy"]["last"] > 85
