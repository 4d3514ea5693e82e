"""Exact greedy runs over a large stratum on an accelerator."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray

from dq_multimodal.config import Similarity
from dq_multimodal.core.blocks import PlainRows
from dq_multimodal.core.greedy import Greedy
from dq_multimodal.core.rows import RowSource, find_equal
from dq_multimodal.core.table import Table
from dq_multimodal.core.way import Way

if TYPE_CHECKING:
    from torch import Tensor

FRONT_ROWS, MAX_FRONT_ROWS = 512, 1024
"""Rows among which picks are made: at first, and where others overtake them early."""

RUN_PICKS = 128
"""Picks that are made in a row, at most."""

SWEPT_VALUES = 2**25
"""Gains that are worked out at once; four arrays of so many float64 numbers live meanwhile."""

DEVICE_SHARE = 0.5
"""Part of the free memory of a device that a stratum may take."""


class Sweep(Greedy):
    """Exact greedy runs that work all gains out in float64 after every few picks, see `Greedy`.

    The rows lie on the device, in float64. The best of them become the front, among which some
    picks are made in a row by the processor, see `Table`. One product of all rows with the way that
    W went gives the gains of all at every pick; the picks up to the first at which a row outside
    the front might have won or tied are kept.

    Args:
        source: The rows; no outer products.
        similarity: Which gain.
        device: "cuda", or "cpu".
    """

    def __init__(self, source: RowSource, similarity: Similarity, device: str) -> None:
        import torch

        super().__init__(similarity, len(source), np.zeros(source.n_columns), 0.0)
        self.numbers, self.next_equal = find_equal(source)
        n_rows = len(self.numbers)
        self.rows = torch.empty((n_rows, source.n_columns), dtype=torch.float64, device=device)
        for span in source.spans():
            block = source.take(span)
            self.total += block.sum()
            self.square_total += float(block.squares().sum())
            low, high = np.searchsorted(self.numbers, (span.start, span.stop))
            own = block[self.numbers[low:high] - span.start]
            self.rows[low:high] = self._send(own.flat())
        self.squares = (self.rows * self.rows).sum(dim=1)
        self.front_rows, self.n_tried = FRONT_ROWS, RUN_PICKS
        self.is_open = torch.ones(n_rows, dtype=torch.bool, device=device)

    def _run(self, on_picks: Callable[[int], object] | None) -> None:
        while self.done < self.n_picks:
            n_kept = self._pick_some()
            if on_picks is not None:
                on_picks(n_kept)

    def _pick_some(self) -> int:
        """Make some picks, at least one; give how many."""
        import torch

        gains = self.factor * (self.rows @ self._send(self.sum))
        gains += self.tilt(self.done) * self.squares
        gains[~self.is_open] = -torch.inf
        front = gains.topk(min(self.front_rows, len(gains))).indices.sort().values
        places, squares = front.cpu().numpy(), self.squares[front].cpu().numpy()
        table = Table(self, self.numbers[places], squares, DeviceRows(self.rows[front]))
        n_most = min(self.n_tried, self.n_picks - self.done)
        way = table.pick(n_most, gains[front].cpu().numpy())
        n_kept = self._count_safe(way, gains, front)
        table.roll_back(n_kept)
        self.n_tried = min(2 * n_kept + 1, RUN_PICKS)
        if 2 * n_kept < len(way):
            self.front_rows = min(2 * self.front_rows, MAX_FRONT_ROWS)
        if not n_kept:  # more rows may tie than the front holds
            tied = (gains >= gains.max() - self.tie).nonzero()[:, 0]
            at = int(self.numbers[tied.cpu().numpy()].argmin())
            front, n_kept = tied[at : at + 1], 1
            places, squares = front.cpu().numpy(), self.squares[front].cpu().numpy()
            table = Table(self, self.numbers[places], squares, DeviceRows(self.rows[front]))
            table.pick(1, gains[front].cpu().numpy())
        table.keep()
        self.numbers[places] = table.numbers
        self.is_open[front] = self._send(table.numbers >= 0)
        return n_kept

    def _count_safe(self, way: Way, gains: "Tensor", places: "Tensor") -> int:
        """Count the picks before the first at which a row outside the front reaches the line."""
        import torch

        outside = gains.clone()
        outside[places] = -torch.inf
        sums, lines = self._send(way.sums[:-1]), self._send(way.lines)
        rises = (0.0 if self.is_cosine else 2.0) * torch.arange(len(way), device=lines.device)
        is_over = torch.zeros(len(way), dtype=torch.bool, device=lines.device)
        step = max(1, SWEPT_VALUES // len(way))
        for start in range(0, len(outside), step):
            part = slice(start, start + step)
            after = self.factor * (self.rows[part] @ sums.T) + outside[part, None]
            after += self.squares[part, None] * rises
            is_over |= (after >= lines).any(dim=0)
        over = is_over.nonzero()
        return int(over[0]) if len(over) else len(way)

    def _send(self, values: Shaped[ndarray, "..."]) -> "Tensor":
        """Give values on the device."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(self.rows.device)


class DeviceRows(PlainRows):
    """Some rows, whose pairs are multiplied out on their device."""

    def __init__(self, rows: "Tensor") -> None:
        super().__init__(rows.cpu().numpy())
        self.on_device = rows

    def narrow(self) -> PlainRows:
        """Give the rows; their pairs are rounded when they are multiplied out."""
        return self

    def pairs(self, others: Any = None) -> Float[ndarray, "n n"]:
        """Give the inner products among themselves, in float32; of a front, never with others."""
        assert others is None
        return (self.on_device @ self.on_device.T).float().cpu().numpy()


def fits_device(n_rows: int, n_columns: int, device: str) -> bool:
    """Tell whether the rows of a stratum have room on a device."""
    import torch

    if not device.startswith("cuda"):
        return True
    free = torch.cuda.mem_get_info(device)[0]
    n_swept = min(SWEPT_VALUES, n_rows * RUN_PICKS)
    return 8 * (n_rows * (n_columns + 8) + 4 * n_swept) <= DEVICE_SHARE * free
