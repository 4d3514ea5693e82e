"""The patch store: kept patches and a bit mask, one small self-contained record an image.

A record is a struct column of the dataset, so plain `datasets` loads it:

| field | what it is |
| --- | --- |
| coding | "exact", "webp", or "original": the file of the source, untouched |
| height, width, channels | of the upright image, in pixels; 1 channel is grey |
| patch_size | side of a patch in pixels |
| mask | one bit a patch, row by row, 1 = kept |
| data | the kept pixels in that coding, or the file |
| icc_profile | the colour profile of the image, none for most; older stores lack it |
"""

from typing import Final, NotRequired, TypedDict

PROFILE: Final = "icc_profile"

FIELDS = {
    "coding": "string",
    "height": "int32",
    "width": "int32",
    "channels": "int8",
    "patch_size": "int16",
    "mask": "binary",
    "data": "binary",
    PROFILE: "binary",
}
"""Fields of a record and their types."""

ORIGINAL = "original"


class Record(TypedDict):
    """One image in the patch store; see the head of this module."""

    coding: str
    height: int
    width: int
    channels: int
    patch_size: int
    mask: bytes
    data: bytes
    icc_profile: NotRequired[bytes | None]
