"""Representativeness of a row: the texture level of an image, and its analogue for text."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

if TYPE_CHECKING:
    from torch import Tensor

PATCH = 32
"""Side L of a patch in pixels, and length of a window in tokens."""


def image_texture(
    luma: Float[ndarray, "b h w"], patch: int = PATCH
) -> tuple[Float[ndarray, " b"], Int[ndarray, " b"]]:
    r"""Measure the texture level of images of one size (ADQ, arXiv:2412.16895, Eq. 3).

    $T(P) = \frac{1}{L^2} \sum_{ij} G(P_{ij})$, the mean of a gradient operator over a patch; the
    level of an image is the mean over its patches. The paper leaves the operator open ("a general
    gradient operator"): here it is $0.5 |Sobel_x| + 0.5 |Sobel_y|$, 3 x 3, with the border
    mirrored at its pixels, on the whole image before it is cut. A patch that the edge makes
    smaller counts as its own size.

    Args:
        luma: Brightness in [0, 1].
        patch: Side L of a patch in pixels.

    Returns:
        Texture level of each image, in [0, 4], and its number of patches.
    """
    n_images, height, width = luma.shape
    luma = np.pad(luma.astype(np.float32, copy=False), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    down = luma[:, :-2] + 2 * luma[:, 1:-1] + luma[:, 2:]
    across = luma[:, :, :-2] + 2 * luma[:, :, 1:-1] + luma[:, :, 2:]
    steps = np.abs(down[:, :, 2:] - down[:, :, :-2]) + np.abs(across[:, 2:] - across[:, :-2])
    rows, columns = np.arange(0, height, patch), np.arange(0, width, patch)
    sums = np.add.reduceat(np.add.reduceat(steps, rows, axis=1, dtype=np.float64), columns, axis=2)
    areas = np.diff([*rows, height])[:, None] * np.diff([*columns, width])
    levels = 0.5 * (sums / areas).mean(axis=(1, 2))
    return levels, np.full(n_images, len(rows) * len(columns))


def token_texture(
    tokens: "Float[Tensor, 'b t d']", is_token: "Tensor", window: int = PATCH
) -> "tuple[Float[Tensor, ' b'], Int[Tensor, ' b']]":
    """Measure the texture level of token vectors: Eq. 3 of ADQ carried over to the token axis.

    The gradient operator becomes the L2 step between neighbouring token vectors, and patches
    become windows of L tokens: the mean step within each window, then the mean over the windows
    of the row. The paper has no score for text; this one is ours.

    Args:
        tokens: Token vectors, in the units of the encoder's last layer.
        is_token: (b, t) booleans: which tokens count. A step needs two that count side by side.
        window: Tokens L in a window; the last one may be shorter.

    Returns:
        Texture level of each row, 0 where it has no step, and the number of its windows that
        hold a step.
    """
    import torch

    n_rows, n_tokens = is_token.shape
    if n_tokens < 2:
        empty = torch.zeros(n_rows, device=tokens.device)
        return empty, empty.long()
    nth = is_token.long().cumsum(1) - 1
    steps = (tokens[:, 1:] - tokens[:, :-1]).float().norm(dim=2)
    of_window = nth[:, :-1] // window
    is_step = is_token[:, 1:] & is_token[:, :-1] & (nth[:, 1:] // window == of_window)
    n_windows = -(-n_tokens // window)
    cells = of_window.clamp(min=0)
    # float64, so that the order of a parallel sum does not reach the float32 result
    sums = torch.zeros(n_rows, n_windows, device=tokens.device, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    sums.scatter_add_(1, cells, (steps * is_step).double())
    counts.scatter_add_(1, cells, is_step.double())
    has_step = counts > 0
    n_used = has_step.sum(1)
    levels = (sums / counts.clamp(min=1)).sum(1) / n_used.clamp(min=1)
    return levels.float(), n_used
