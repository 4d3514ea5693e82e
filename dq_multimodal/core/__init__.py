"""Arrays in, arrays out: bins, their gains, and the order of the rows. No files, no network."""

from dq_multimodal.core.bins import Bins, make_bins
from dq_multimodal.core.order import one_bin, order_rows, row_hash

__all__ = ["Bins", "make_bins", "one_bin", "order_rows", "row_hash"]
