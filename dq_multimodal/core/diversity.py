"""Diversity of the bins by a contrastive discriminator (ADQ, Eq. 4-5)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

if TYPE_CHECKING:
    from torch import Generator, Tensor

TAU = 0.1
HIDDEN, OUT = 256, 128
N_NETS, EPOCHS, BATCH_ROWS = 2, 8, 256
BLOCK_ROWS = 512
MOST_ROWS = 2000
"""Rows that stand for a bin at most, where their number is not given."""


def learn_directions(
    rows: Float[ndarray, "k f"],
    views: Float[ndarray, "k f"],
    *,
    seed: int = 0,
    tau: float = TAU,
    n_epochs: int = EPOCHS,
    on_steps: Callable[[int], object] | None = None,
) -> tuple[Float[ndarray, "k out"], Float[ndarray, "k out"]]:
    r"""Train the discriminator d on pairs of a row and its augmented view, and apply it to both.

    d is two perceptrons with one hidden layer each, side by side, on standardised features, so its
    cosine is the mean of theirs; one alone gives scores that differ more from seed to seed. Each
    learns by InfoNCE: of row i the positive is its view, and the negatives are the other rows of
    the batch, as in Eq. 5. The loss is the mean over i of $-\log \frac{p_i}{p_i + \sum_{j \ne i}
    e^{cos(d_i, d_j)/\tau}}$ with $p_i = e^{cos(d_i, d_i^+)/\tau}$. The authors' code never trains
    its discriminator.

    Args:
        rows: Features [penultimate, pooled intermediate] of the sampled rows of all bins.
        views: The same of one augmented view of each.
        seed: Of weights and batches.
        tau: Temperature, above 0.
        n_epochs: Passes of each perceptron over the pairs, by Adam in batches of up to 256.
        on_steps: Called with the number of steps done since (for progress bars); there are
            `count_steps` of them.

    Returns:
        d of the rows and of the views, unit length, float32.
    """
    import torch

    both = np.concatenate([rows, views]).astype(np.float32)
    spread = both.std(axis=0)
    both = (both - both.mean(axis=0)) / np.where(spread > 0, spread, 1)
    data = torch.from_numpy(both)
    generator = torch.Generator().manual_seed(seed % 2**63)
    n_steps = count_steps(len(rows), n_epochs) // N_NETS
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that their number does not change the last bits
    try:
        directions = [
            _learn_one(data, n_steps, tau, generator, on_steps or (lambda _: None))
            for _ in range(N_NETS)
        ]
    finally:
        torch.set_num_threads(n_threads)
    turned = (torch.cat(directions, dim=1) / N_NETS**0.5).numpy()
    return turned[: len(rows)], turned[len(rows) :]


def _learn_one(
    data: "Float[Tensor, 'both f']",
    n_steps: int,
    tau: float,
    generator: "Generator",
    on_steps: Callable[[int], object],
) -> "Float[Tensor, 'both half']":
    """Train one perceptron on the rows (first half of the data) and their views, and apply it."""
    import torch
    from torch import nn

    n_rows = len(data) // 2
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        net = nn.Sequential(nn.Linear(data.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    size = min(BATCH_ROWS, n_rows)
    for _ in range(n_steps):
        picks = torch.randperm(n_rows, generator=generator)[:size]
        anchors, positives = (
            nn.functional.normalize(net(data[start + picks]), dim=1) for start in (0, n_rows)
        )
        logits = anchors @ anchors.T / tau
        logits.diagonal().copy_((anchors * positives).sum(1) / tau)
        loss = nn.functional.cross_entropy(logits, torch.arange(size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_steps(1)
    with torch.inference_mode():
        return nn.functional.normalize(net(data), dim=1)


def count_steps(n_rows: int, n_epochs: int = EPOCHS) -> int:
    """Give the number of training steps of `learn_directions`."""
    return N_NETS * n_epochs * -(-n_rows // BATCH_ROWS) if n_rows > 1 else 0


def diversity(
    rows: Float[ndarray, "k out"], views: Float[ndarray, "k out"], tau: float = TAU
) -> float:
    r"""Measure the diversity of one bin (ADQ, arXiv:2412.16895, Eq. 4-5).

    $Div = -\frac{1}{k} \sum_i \frac{1}{k - 1} \sum_{j \ne i}
    \frac{\exp(cos(d_i, d_j) / \tau)}{\exp(cos(d_i, d_i^+) / \tau)}$. The products are made block
    by block, so memory grows with k, not with its square.

    Args:
        rows: d of the rows of the bin; unit length, or zero.
        views: d of their positive views, in the same order.
        tau: Temperature, above 0.

    Returns:
        A negative number; closer to 0 is more diverse. NaN for fewer than two rows.
    """
    n_rows = len(rows)
    if n_rows < 2:
        return float("nan")
    rows, views = rows.astype(np.float64), views.astype(np.float64)
    own = np.einsum("kd,kd->k", rows, views)
    total = 0.0
    for start in range(0, n_rows, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, n_rows))
        ratios = np.exp((rows[block] @ rows.T - own[block, None]) / tau)
        numbers = np.arange(block.start, block.stop)
        ratios[numbers - start, numbers] = 0.0
        total += float(ratios.sum())
    return -total / (n_rows * (n_rows - 1))


def count_sampled(size: int, n_rows: int | None = None) -> int:
    """Give the rows that stand for a bin of some size; see `sample_bins`."""
    return min(size, min(MOST_ROWS, max(100, size * 3 // 20)) if n_rows is None else n_rows)


def sample_bins(
    members: Int[ndarray, " n"],
    key: ndarray,
    n_rows: int | None = None,
    sizes: Int[ndarray, " m"] | None = None,
) -> Int[ndarray, " k"]:
    """Choose the rows of each bin that stand for it, those of the lowest keys; give them ascending.

    A bin of -1 leaves a row out; keys differ. None for n_rows takes 15 % of a bin, 100 to 2,000
    rows. Sizes are the rows of each bin where these are only some of them, those of the lowest keys
    (of each part `MOST_ROWS` or n_rows); None counts these.
    """
    order = np.lexsort((key, members))
    order = order[members[order] >= 0]
    picks = []
    for rows in np.split(order, np.flatnonzero(np.diff(members[order])) + 1):
        size = len(rows) if sizes is None else int(sizes[members[rows[:1]]].sum())
        picks.append(rows[: count_sampled(size, n_rows)])
    return np.sort(np.concatenate(picks)) if picks else np.zeros(0, dtype=np.int64)
