"""Arrays in, arrays out: bins, scores, and the order of the rows. No files, no network."""

from dq_multimodal.core.bins import Bins as Bins
from dq_multimodal.core.bins import make_bins as make_bins
from dq_multimodal.core.hashing import row_hash as row_hash
from dq_multimodal.core.importance import Scores as Scores
from dq_multimodal.core.importance import adaptive_weights as adaptive_weights
from dq_multimodal.core.importance import bin_importance as bin_importance
from dq_multimodal.core.order import one_bin as one_bin
from dq_multimodal.core.order import order_rows as order_rows
from dq_multimodal.core.order import put_one_of_each_first as put_one_of_each_first
from dq_multimodal.core.partition import partition_rows as partition_rows
