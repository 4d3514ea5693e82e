"""The second compression of images: which patches to keep, how to store them, how to fill holes."""

from dq_multimodal.patches.store import restore as restore
