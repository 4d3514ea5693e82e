r"""Linear probe: multinomial logistic regression on the frozen features of a pretrained encoder.

With standardised features $x_i$, classes $y_i$ and loss weights $w_i$ (mean 1) of the n kept rows,
the probe minimises

$$\frac1n \Big(\sum_i w_i (\log \sum_c e^{W_c x_i + b_c} - W_{y_i} x_i - b_{y_i})
+ \frac{\lambda}{2} \|W\|_F^2\Big).$$

That is strictly convex in W, so the result depends on the kept rows alone: neither on a seed nor on
the start. scikit-learn's C is $1 / \lambda$. The probe of frozen features goes back to Alain and
Bengio (arXiv:1610.01644).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dq_multimodal.config import InputError
from dq_multimodal.options import NEEDED, Request, check_count, option
from harness.bundle import Bundle
from harness.suite import ABOVE_0, AMOUNTS, Job, at_ratio

HISTORY = 20
"""Earlier steps from which L-BFGS takes the curvature."""
NO_VARIATION = 1e-6
"""A standard deviation of less than this share of the mean is rounding of float32."""


@dataclass(frozen=True)
class Protocol(Request):
    r"""Settings of a linear probe.

    $\lambda$ is the inverse variance of a normal prior of W, so it need not change with the rows.
    """

    penalties: float | dict[float, float] = option("", NEEDED, "Lambda; by keep ratio.", AMOUNTS)
    tolerance: float = option("", 1e-4, "No entry of the last gradient is larger.", ABOVE_0)
    max_iterations: int = option("", 1000, "Or after so many steps.", check_count)


def train(
    job: Job, bundle: Bundle, device: torch.device, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Fit the probe to the kept rows, and give its accuracy on the test rows.

    A class without a kept row is never predicted.

    Args:
        job: What to train; its net and seed change nothing.
        bundle: Holds TASK/train/features, (n, d), TASK/train/labels, and the same of test.
        device: Where to.
        progress: Told the share of the way to the tolerance, on the logarithm of the gradient.

    Returns:
        The steps, the test accuracy in percent, and the largest entry of the last gradient.
    """
    if job.is_sampled:
        raise InputError("a probe sees all rows at once: use_weights sample is for image and text")
    data = load_features(bundle.folder_path, job.task, device)
    rows = torch.from_numpy(np.asarray(job.rows)).to(device)
    classes, targets = torch.unique(data.labels[rows], return_inverse=True)
    given = np.ones(len(rows)) if job.weights is None else job.weights
    fitted = fit(
        data.features[rows].double(),
        targets,
        torch.as_tensor(given, dtype=torch.float64, device=device),
        penalty=at_ratio(job.protocol.penalties, job.keep_ratio),
        tolerance=job.protocol.tolerance,
        max_iterations=job.protocol.max_iterations,
        progress=progress,
    )
    scores = torch.addmm(fitted.bias.float(), data.test_features, fitted.matrix.float())
    found = classes[scores.argmax(dim=1)]
    accuracy = 100 * (found == data.test_labels).double().mean().item()
    return {
        "steps": fitted.steps,
        "metrics": {"test accuracy": {"last": accuracy, "best": None}},
        "gradient": fitted.gradient,
    }


class Features(NamedTuple):
    """Standardised features and classes on one device."""

    features: Tensor
    labels: Tensor
    test_features: Tensor
    test_labels: Tensor


@lru_cache(maxsize=1)
def load_features(folder: Path, task: str, device: torch.device) -> Features:
    """Read the features of a task; kept for the next cell.

    Each is shifted and scaled to mean 0 and standard deviation 1 over all training rows of the
    bundle, which needs no label; one that does not vary is only shifted.
    """
    bundle = Bundle(folder)
    parts = [(part, what) for part in ("train", "test") for what in ("features", "labels")]
    arrays = {key: bundle.array("/".join((task, *key))) for key in parts}
    rows, tests = arrays["train", "features"], arrays["test", "features"]
    mean = rows.mean(axis=0, dtype=np.float64)
    rows -= mean.astype(np.float32)
    deviation = np.sqrt(np.einsum("nd,nd->d", rows, rows, dtype=np.float64) / len(rows))
    scale = np.where(deviation > NO_VARIATION * np.abs(mean), deviation, 1).astype(np.float32)
    rows /= scale
    tests -= mean.astype(np.float32)
    tests /= scale
    return Features(*(torch.from_numpy(array).to(device) for array in arrays.values()))


class Fitted(NamedTuple):
    """A fitted probe: (d, c), (c,), the steps, and the largest entry of the last gradient."""

    matrix: Tensor
    bias: Tensor
    steps: int
    gradient: float


def fit(
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    penalty: float,
    tolerance: float,
    max_iterations: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Fitted:
    r"""Minimise the loss of the module's head by L-BFGS with a strong Wolfe line search from 0.

    Args:
        rows: (n, d) float64: in float32 the search can stall before the tolerance.
        targets: (n,) classes 0 ... c-1, every one of them there.
        weights: (n,) loss weights.
        penalty: $\lambda$, for the sum over the rows.
        tolerance: Of the largest absolute entry of the gradient.
        max_iterations: Most steps.
        progress: Told the share of the way to the tolerance, on the logarithm of the gradient.
    """
    n_classes, share = int(targets.max()) + 1, penalty / len(rows)
    matrix = rows.new_zeros(rows.shape[1], n_classes)
    bias = rows.new_zeros(n_classes)
    chosen = targets[:, None]
    shares = (weights / len(rows)).to(rows.dtype)[:, None]
    sizes: list[float] = []

    def loss() -> float:
        logs = torch.log_softmax(torch.addmm(bias, rows, matrix), dim=1)
        value = share / 2 * matrix.square().sum() - (shares * logs.gather(1, chosen)).sum()
        errors = logs.exp_().scatter_add_(1, chosen, torch.full_like(shares, -1)).mul_(shares)
        slope = (errors.T @ rows).T  # a third faster on a CPU than rows.T @ errors
        matrix.grad = torch.add(slope, matrix, alpha=share).contiguous()
        bias.grad = errors.sum(dim=0)
        sizes.append(max(matrix.grad.abs().max().item(), bias.grad.abs().max().item()))
        first, last = max(sizes), min(sizes)
        is_there = last <= tolerance
        progress(1.0 if is_there else math.log(first / last) / math.log(first / tolerance))
        return value.item()

    search = torch.optim.LBFGS(
        [matrix, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=HISTORY,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    search.step(loss)
    loss()
    return Fitted(matrix, bias, int(search.state[matrix]["n_iter"]), sizes[-1])
