"""Arrays in, arrays out: bins, scores, and the order of the rows. No files, no network."""

from dq_multimodal.core.balance import balance_rows, draw_balanced
from dq_multimodal.core.bins import Bins, count_working_bytes, make_bins
from dq_multimodal.core.coverage import Coverage, cover_rows, weigh_by_nearest
from dq_multimodal.core.duplicates import find_duplicates
from dq_multimodal.core.hashing import row_hash
from dq_multimodal.core.importance import Scores, adaptive_weights, bin_importance
from dq_multimodal.core.order import one_bin, order_rows, put_one_of_each_first
from dq_multimodal.core.partition import partition_rows
from dq_multimodal.core.target import mix_orders, pick_for_targets

__all__ = [
    "Bins",
    "Coverage",
    "Scores",
    "adaptive_weights",
    "balance_rows",
    "bin_importance",
    "count_working_bytes",
    "cover_rows",
    "draw_balanced",
    "find_duplicates",
    "make_bins",
    "mix_orders",
    "one_bin",
    "order_rows",
    "partition_rows",
    "pick_for_targets",
    "put_one_of_each_first",
    "row_hash",
    "weigh_by_nearest",
]
