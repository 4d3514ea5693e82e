"""What all methods share: the beginning, the steps, a stop and going on, errors."""

from dataclasses import replace

import pytest
import torch
from tiny_real import make_real

from dq_multimodal.condensation import loop
from dq_multimodal.condensation.config import CondenseConfig
from dq_multimodal.condensation.loop import History, begin, run_loop
from dq_multimodal.condensation.multisize import Prefixes
from dq_multimodal.condensation.synthetic import Synthetic
from dq_multimodal.config import InputError

TINY = {"net_width": 4, "images_per_class": 3, "iterations": 6, "augment": ("crop", "color")}


def make_config(method="dm", **options):
    if method == "dc":
        options = {"inner_loops": 2, "net_steps": 1} | options
    return CondenseConfig("x", method=method, **(TINY | options))


class Stop(Exception):
    pass


def stop_at(monkeypatch, method, n_losses):
    """Let a method fail, once, at its so many-th loss."""
    match, left = loop.METHODS[method], [n_losses]

    def stopping(*arguments):
        for loss_of in match(*arguments):
            left[0] -= 1
            if not left[0]:
                raise Stop
            yield loss_of

    monkeypatch.setitem(loop.METHODS, method, stopping)


CASES = {
    "dm": {},
    "dc": {},
    "krr": {"learn_labels": True},
    "dc, many sizes": {"multisize": True, "multisize_period": 1},
    "dc, drawn sizes": {"multisize": True, "multisize_choice": "uniform"},
    "krr, many sizes": {"multisize": True, "multisize_period": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n_losses", [2, 5])
def test_a_run_that_was_stopped_ends_with_the_same_bits(case, n_losses, tmp_path, monkeypatch):
    real, config = make_real(), make_config(case.split(",")[0], **CASES[case])
    wanted, history = run_loop(real, config, tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        stop_at(patched, config.method, n_losses)
        with pytest.raises(Stop):
            run_loop(real, config, tmp_path / "state")
    is_first = config.method == "dc" and n_losses == 2  # in the first iteration
    assert (tmp_path / "state").exists() != is_first
    torch.manual_seed(5)  # of no account
    found, again = run_loop(real, config, tmp_path / "state")
    assert again == history and len(history.losses) == 6
    for name, value in wanted.learnt.items():
        assert torch.equal(found.learnt[name], value), name


def test_a_state_goes_to_the_device_of_the_set(tmp_path):
    """All but the numbers of steps, which Adam keeps on the CPU."""

    def make(device):
        rate = torch.ones((), device=device, requires_grad=True)
        some = Synthetic(torch.ones(2, 1, 8, 8, device=device, requires_grad=True), 2, rate=rate)
        groups = [{"params": [value]} for value in some.learnt.values()]
        return some, torch.optim.Adam(groups), Prefixes(), History()

    before = make("cpu")
    sum(value.sum() for value in before[0].learnt.values()).backward()
    before[1].step()
    loop._write_state(tmp_path / "state", *before)
    after = make("meta")
    loop._read_state(tmp_path / "state", *after)
    for values in after[1].state.values():
        found = {name: value.device.type for name, value in values.items()}
        assert found == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_the_set_learns_and_what_is_random_outside_stays(tmp_path):
    real = make_real()
    config = make_config(iterations=100, augment=("none",), init="noise")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    _, history = run_loop(real, config, tmp_path / "state")
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(history.losses[-10:]) < 0.5 * sum(history.losses[:3]) * 10 / 3


def test_frozen_images_do_not_move_and_the_others_do(tmp_path, monkeypatch):
    """With the momentum that they had."""
    real = make_real()
    config = make_config("dc", multisize=True, multisize_period=2, iterations=2)
    distances = iter([[9.0, 9.0], [9.0, 5.0], [9.0, 4.0]])  # then 2 follows 1, and stays
    monkeypatch.setattr(loop.FeatureDistance, "__call__", lambda *_: next(distances))
    before, history = run_loop(real, config, tmp_path / "state")
    assert history.choices == [(2, 2, 1)]
    distances = iter([[9.0, 9.0], [9.0, 4.0]])
    after, history = run_loop(real, replace(config, iterations=4), tmp_path / "state")
    assert history.choices == [(2, 2, 1), (4, 2, 0)]
    moved = (after.images != before.images).flatten(1).any(1)
    assert moved.tolist() == [False] * 3 + [True] * 6


def test_a_prefix_adds_its_loss(tmp_path, monkeypatch):
    """A step of plain descent: the first image gets both gradients, the others one."""
    seen = []

    def match(real, synthetic, config, draw_net):
        yield lambda some: seen.append(len(some.images)) or some.images.sum()

    monkeypatch.setitem(loop.METHODS, "dm", match)
    config = make_config(multisize=True, iterations=1)
    start = begin(make_real(), replace(config, init="noise"))
    monkeypatch.setattr(loop, "begin", lambda *_: start)
    before = start.images.detach().clone()
    found, _ = run_loop(make_real(), config, tmp_path / "state")
    assert seen == [9, 3]
    steps = (before - found.images).mean((1, 2, 3)).round(decimals=4).tolist()
    assert steps == [2.0] * 3 + [1.0] * 6


def test_uniform_prefixes_are_of_all_sizes_and_nothing_is_frozen(tmp_path, monkeypatch):
    seen = []

    def match(real, synthetic, config, draw_net):
        for _ in range(10):
            yield lambda some: seen.append(some.per_class) or some.images.square().sum()

    monkeypatch.setitem(loop.METHODS, "dm", match)
    options = {"multisize": True, "multisize_period": 1, "learning_rate": 1e-3}
    config = make_config(images_per_class=5, iterations=8, multisize_choice="uniform", **options)
    before = begin(make_real(), replace(config, init="noise"))
    monkeypatch.setattr(loop, "begin", lambda *_: before)
    start = before.images.detach().clone()
    found, history = run_loop(make_real(), config, tmp_path / "state")
    assert seen[::2] == [5] * 80 and {*seen[1::2]} == {1, 2, 3, 4}
    assert min(seen[1::2].count(n) for n in (1, 2, 3, 4)) > 8
    assert len({*seen[1:20:2]}) > 1  # drawn at each step, not once an iteration
    assert history.choices == []
    shrunk = (found.images / start).flatten(1).mean(1)
    assert (shrunk[:3] < shrunk[-3:]).all()  # the first is in every prefix


def test_a_set_begins_with_real_rows_of_its_classes():
    real = make_real()
    found = begin(real, make_config())
    assert found.per_class == 3 and found.classes.tolist() == [0, 1, 2] * 3
    for k in range(3):
        pictures = real.normalise(real.images[real.classes == k])
        places = [[torch.equal(x, y) for y in pictures].index(True) for x in found.of_class(k)]
        assert len({*places}) == 3
    first = [3, 1, 2, 0, 4, 5, 6, 7, 8]
    named = begin(real, make_config(init="some run"), first)
    assert torch.equal(named.images, real.normalise(real.images[first]))
    noise = begin(real, make_config(init="noise"))
    assert (
        abs(float(noise.images.detach().mean())) < 0.2
        and abs(float(noise.images.detach().std()) - 1) < 0.2
    )


def test_a_prefix_is_the_first_rows_of_every_class():
    images = torch.arange(12.0).view(12, 1, 1, 1)
    synthetic = Synthetic(images, 4, targets=torch.eye(4).repeat(3, 1))
    part = synthetic.prefix(2)
    assert part.images.flatten().tolist() == [*range(8)] and len(part.targets) == 8
    assert part.of_class(1).flatten().tolist() == [1, 5]


def test_errors_are_one_line(tmp_path):
    real = make_real(n_rows=10)
    with pytest.raises(
        InputError, match=r"^5 images of each class .* c0 \(4\), c1 \(3\), c2 \(3\)$"
    ):
        run_loop(real, make_config(images_per_class=5), tmp_path / "state")
    with pytest.raises(InputError, match="no number: try a smaller learning_rate than 1e"):
        run_loop(real, make_config(learning_rate=1e30), tmp_path / "state")
    state = tmp_path / "broken"
    state.write_bytes(b"no state")
    with pytest.raises(InputError, match="is not the state of this run: remove it to begin anew"):
        run_loop(real, make_config(), state)
    run_loop(real, make_config(), state := tmp_path / "other")
    with pytest.raises(InputError, match="is not the state of this run"):
        run_loop(real, make_config(images_per_class=2), state)


def test_a_last_step_that_leads_nowhere_is_no_set(tmp_path, monkeypatch):
    """The loss is 0, its slope is not finite."""

    def match(*_):
        yield lambda some: (0 * some.images).sum().sqrt()

    monkeypatch.setitem(loop.METHODS, "dm", match)
    with pytest.raises(InputError, match="what was learnt is no number: try a smaller"):
        run_loop(make_real(), make_config(iterations=1), tmp_path / "state")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "mtt"}, "mtt needs experts: train them by recipes/train_experts.py"),
        ({"experts": "x"}, "experts is for mtt, and the method is dm"),
        ({"kernel": "ntk"}, "kernel is for krr, and the method is dm"),
        ({"method": "krr", "net_steps": 3}, "net_steps is for dc, and the method is krr"),
        ({"learn_labels": True}, "learn_labels is for krr, and the method is dm"),
        ({"multisize": True, "images_per_class": 1}, "multisize needs images_per_class of at"),
        ({"augment": ("blur",)}, "augment must be none or some of color, crop"),
        ({"augment": ("none", "crop")}, "augment must be none or some of"),
        ({"split": "all"}, "split all would learn from test rows too"),
        ({"image_size": 4}, "image_size must be a whole number from 8 to 1024, got 4"),
        ({"images_per_class": 0}, "images_per_class must be a whole number of at least 1"),
        ({"method": "idc"}, "method must be one of dm, dc, krr, mtt, got 'idc'"),
    ],
)
def test_wrong_settings_are_one_line(options, said):
    with pytest.raises(InputError, match=said):
        CondenseConfig("x", **options)


def test_settings_of_dc_are_those_of_its_paper():
    found = {
        n: make_config("dc", images_per_class=n, inner_loops=None, net_steps=None)
        for n in (1, 7, 50)
    }
    assert {n: (c.inner_loops, c.net_steps) for n, c in found.items()} == {
        1: (1, 1),
        7: (10, 50),
        50: (50, 10),
    }
