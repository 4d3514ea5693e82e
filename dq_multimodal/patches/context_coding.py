"""Lossless coding of the kept pixels of images with holes; the mask is known to both sides.

A pixel is predicted by a blend of small linear predictors, each weighted by how well it did at
the neighbours coded before (Meyer and Tischer, TMW 1997 and GLICBAWLS 2001; Seemann and Tischer
1997). The residual is coded as a Student t whose scale follows from the errors around it. Nothing
is trained and nothing but residuals is stored: a 32 x 32 image has no room for tables. The
weights and constants below are round numbers set by hand.

Encoder and decoder run the same float32 and float64 operations, all of them correctly rounded
and in a fixed order, or sums of multiples of 1/16 that are exact in any order. So the same bytes
decode on every machine.

Pixel (x, y) of a plane is coded at step x + 2y (+ a lag for the later planes), when its
neighbours to the left and above are known. All pixels of a step, of all planes and of all images
of a call, are one numpy operation.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped, UInt8
from numpy import ndarray

from dq_multimodal.patches import lanes

VERSION = 1

LAG = 3
"""Steps by which a plane follows the last one: enough to know its right and lower neighbour."""

TOP = 2
"""Rows above the image that neighbours may reach into."""

RING = 8
"""Steps that are remembered: two lags, or four steps back, and two ahead."""

VALUE, ERROR, SIGNED, HOLE = range(4)
"""What is known of a pixel: value, size of its error, error of the first expert, if dropped."""

PLANES = {1: [0], 3: [1, 0, 2]}
"""Channels in coding order: green first; red and blue are then coded less green."""

NEIGHBOURS = ((-1, 0), (0, -1), (-1, -1), (1, -1), (-2, 0), (0, -2))
"""To the left, above, above left, above right, two to the left, two above."""

N_EXPERTS = 10

N_LEVELS = 24
"""Half octaves of activity whose scale is learnt apart."""


class _Model:
    """What is known of the pixels so far, and what it says of those of the next step."""

    def __init__(self, height: int, width: int, n_planes: int, n_images: int):
        if n_planes not in PLANES:
            raise ValueError(f"images have 1 or 3 channels, got {n_planes}")
        self.height, self.width, self.n_planes = height, width, n_planes
        shape = (n_planes, TOP + height + 1, n_images)
        self.fields = np.zeros((RING, 4, *shape), dtype=np.float32)
        self.fields[:, VALUE, 0] = 128
        self.fields[:, ERROR] = 8
        self.squares = np.full((RING, N_EXPERTS, *shape), 50, dtype=np.float32)
        # Sums of the errors and of the activities that announced them, by plane, image, and
        # level for each number of holes at the left and above. They start as if some were seen.
        self.error_sum = np.full((n_planes, 3 * N_LEVELS, n_images), 50.0)
        self.error_sum[:, N_LEVELS : 2 * N_LEVELS] = 64
        self.error_sum[:, 2 * N_LEVELS :] = 80
        self.activity_sum = np.full((n_planes, 3 * N_LEVELS, n_images), 50.0)
        self.plane_error = np.full((n_planes, n_images), 50.0)

    def predict(
        self, step: int, rows: slice
    ) -> tuple[Int[ndarray, "planes rows b"], Int[ndarray, "planes rows b"]]:
        """Give table and centre of the residuals of the pixels of a step."""
        rows = slice(rows.start + TOP, rows.stop + TOP)
        around = [_near(self.fields, step, rows, *offset) for offset in NEIGHBOURS]
        w, n, nw, ne, ww, nn = (field[VALUE] for field in around)
        nne = _near(self.fields, step, rows, 1, -2)[VALUE]
        experts = np.empty((N_EXPERTS, *w.shape), dtype=np.float32)
        smooth = 0.75 * w + 0.55 * n - 0.35 * nw + 0.15 * ne - 0.05 * (ww + nn)
        experts[0] = smooth
        experts[1] = smooth + 0.5 * (around[0][SIGNED] + around[1][SIGNED])
        experts[2], experts[3] = w + n - nw, w + ne - n
        experts[4], experts[5] = w, 2 * w - ww
        experts[6], experts[7] = n, 2 * n - nn
        experts[8], experts[9] = n + ne - nne, ne

        squares = [_near(self.squares, step, rows, *offset) for offset in NEIGHBOURS]
        recent = squares[0] + squares[1]
        recent *= 2
        for square in squares[2:]:
            recent += square
        trust = 1 / (recent + 2)
        part = np.sqrt(trust)
        trust *= part
        trust[0] *= 2
        # Experts that look into a hole get little say.
        w_hole, n_hole, ne_hole = (around[k][HOLE] for k in (0, 1, 3))
        trust[:6] *= 1 - 0.9 * w_hole
        trust[:4] *= 1 - 0.9 * n_hole
        trust[6:9] *= 1 - 0.9 * n_hole
        trust[8:] *= 1 - 0.9 * ne_hole
        all_trust = sum(trust)
        mean = sum(np.multiply(trust, experts, out=part)) / all_trust
        np.subtract(experts, mean, out=part)
        part *= part
        part *= trust
        spread = np.sqrt(sum(part) / all_trust)

        e = [field[ERROR] for field in around]
        calm = (2 * (e[0] + e[1]) + (e[2] + e[3] + e[4] + e[5])) / 8
        activity = calm + 0.4 * spread
        if self.n_planes > 1:
            before = self.fields[:, ERROR, :-1]
            known = 2 * _near(before, step - LAG, rows, 0, 0)
            known += _near(before, step - LAG, rows, 1, 0)
            known += _near(before, step - LAG, rows, 0, 1)
            ratio = (self.plane_error[1:] / self.plane_error[:-1]).astype(np.float32)[:, None]
            activity[1:] = 0.7 * activity[1:] + 0.075 * (ratio * known)
        gain = (self.error_sum / self.activity_sum).astype(np.float32)
        spot = lanes.log_bin(activity, 2, -3, N_LEVELS)
        spot += (w_hole + n_hole).astype(np.int64) * N_LEVELS
        spot += np.arange(self.n_planes)[:, None, None] * (3 * N_LEVELS)
        spot = spot * mean.shape[2] + np.arange(mean.shape[2])
        scale = 0.92 * gain.take(spot) * activity + 0.05
        level = lanes.log_bin(scale, lanes.PER_OCTAVE, lanes.LOWEST_OCTAVE, lanes.N_SCALES)

        base = np.zeros_like(mean)
        for plane in range(1, self.n_planes):
            base[plane] = self.fields[(step - plane * LAG) % RING, VALUE, 0, rows]
        if self.n_planes > 2:
            # Red less green follows mostly Cr, blue less green Cb and some Cr: this takes it out.
            base[2] += 0.25 * self.fields[(step - LAG) % RING, VALUE, 1, rows]
        eighths = np.clip(np.floor((mean + base) * 8 + 0.5), 0, 255 * 8)
        self._last = (w, n, ne, smooth, experts, recent, calm, activity, spot, base, eighths)
        place = eighths.astype(np.int64)
        return level * lanes.PHASES + (place & 7), place >> 3

    def update(
        self,
        step: int,
        rows: slice,
        pixels: Int[ndarray, "planes rows b"] | UInt8[ndarray, "planes rows b"],
        kept: Bool[ndarray, "planes rows b"],
    ) -> None:
        """Take in the pixels of the step that was predicted last."""
        rows = slice(rows.start + TOP, rows.stop + TOP)
        w, n, ne, smooth, experts, recent, calm, activity, spot, base, eighths = self._last
        mean = eighths / 8 - base
        value = pixels.astype(np.float32) - base
        error = np.abs(value - mean) * kept
        # A hole is filled with its prediction, held inside its neighbours lest it run away.
        low, high = np.minimum(np.minimum(w, n), ne), np.maximum(np.maximum(w, n), ne)
        fill = np.clip(np.floor(mean + 0.5), low, high)
        now = self.fields[step % RING]
        now[VALUE, :, rows] = np.where(kept, value, fill)
        now[ERROR, :, rows] = np.where(kept, error, calm)
        now[SIGNED, :, rows] = (value - smooth) * kept
        now[HOLE, :, rows] = ~kept
        squares = np.subtract(value, experts, out=experts)
        squares *= squares
        recent /= 8
        np.copyto(squares, recent, where=~kept)
        self.squares[step % RING, :, :, rows] = squares
        self.plane_error += error.sum(axis=1, dtype=np.float64)
        told = np.floor(activity * 16) / 16 * kept
        size, shape = self.error_sum.size, self.error_sum.shape
        spot = spot.ravel()
        self.error_sum += np.bincount(spot, error.ravel(), size).reshape(shape)
        self.activity_sum += np.bincount(spot, told.ravel(), size).reshape(shape)
        for ring in (self.fields, self.squares):
            self._fill_edges(ring, step)

    def _fill_edges(self, ring: Float32[ndarray, "ring k planes rows b"], step: int) -> None:
        """Continue what is known beyond the image's edges, where neighbours will be looked up."""
        t = [(step + k) % RING for k in range(-3, 3)]
        for plane in range(self.n_planes):
            u = step - plane * LAG
            # The two pixels left of a row are the one above right of them, the one right of it
            # is the last; the rows above the first repeat its latest pixel.
            y = (u + 1) // 2
            if u % 2 and 0 <= y < self.height:
                ring[t[3], :, plane, TOP + y] = ring[t[2], :, plane, TOP + y - 1]
                ring[t[2], :, plane, TOP + y] = ring[t[2], :, plane, TOP + y - 1]
            y = (u - self.width) // 2
            if (u - self.width) % 2 == 0 and 0 <= y < self.height:
                ring[t[3], :, plane, TOP + y] = ring[t[2], :, plane, TOP + y]
            if 0 <= u < self.width:
                for k in t[:4]:
                    ring[k, :, plane, :TOP] = ring[t[3], :, plane, TOP : TOP + 1]
            bottom = TOP + self.height
            if 0 <= u - 2 * (self.height - 1) < self.width:
                ring[t[5], :, plane, bottom] = ring[t[3], :, plane, bottom - 1]


def _near(
    ring: Float32[ndarray, "ring *k rows b"], step: int, rows: slice, dx: int, dy: int
) -> Float32[ndarray, "*k rows b"]:
    """Look up the neighbours that lie dx to the right of and dy below the pixels of a step."""
    return ring[(step + dx + 2 * dy) % RING][..., rows.start + dy : rows.stop + dy, :]


def encode_images(images: UInt8[ndarray, "b h w c"], keep: Bool[ndarray, "b h w"]) -> list[bytes]:
    """Code the kept pixels of images of one shape; the bytes of each stand alone.

    Args:
        images: Grey (c = 1) or RGB (c = 3).
        keep: Which pixels to keep. The caller stores it.
    """
    n_images, height, width, n_planes = images.shape
    if not keep.any():
        return [bytes([VERSION])] * n_images
    n_lanes = lanes.count_lanes(keep.sum(axis=(1, 2)) * n_planes)
    model = _Model(height, width, n_planes, n_images)
    pixels = _skew(images[..., PLANES[n_planes]])
    tables, symbols = [], []
    for step, rows, kept in _steps(keep, n_planes):
        table, centre = model.predict(step, rows)
        here = pixels[step, :, rows]
        plan = lanes.plan_rounds(kept, n_lanes)
        tables.append(np.append(table, lanes.CERTAIN).astype(np.int16)[plan])
        symbols.append(np.append((here - centre) & 255, 0).astype(np.uint8)[plan])
        model.update(step, rows, here, kept)
    coded = lanes.write_lanes(np.concatenate(tables), np.concatenate(symbols), n_lanes)
    return [bytes([VERSION]) + part for part in coded]


def decode_images(
    payloads: list[bytes], keep: Bool[ndarray, "b h w"], n_channels: int
) -> UInt8[ndarray, "b h w c"]:
    """Decode what `encode_images` made of images of one shape; dropped pixels become 0.

    Raises:
        ValueError: If a payload is of another version, damaged, or does not belong to its mask.
    """
    n_images, height, width = keep.shape
    if len(payloads) != n_images:
        raise ValueError(f"{len(payloads)} payloads for {n_images} masks")
    for i, payload in enumerate(payloads):
        if payload[:1] != bytes([VERSION]):
            raise ValueError(f"payload {i} is not of version {VERSION}: starts {payload[:1]!r}")
    n_lanes = lanes.count_lanes(keep.sum(axis=(1, 2)) * n_channels)
    reader = lanes.LaneReader([payload[1:] for payload in payloads], n_lanes)
    images = np.zeros((n_images, height, width, n_channels), dtype=np.uint8)
    if keep.any():
        pixels = _skew(images)
        model = _Model(height, width, n_channels, n_images)
        for step, rows, kept in _steps(keep, n_channels):
            table, centre = model.predict(step, rows)
            plan = lanes.plan_rounds(kept, n_lanes)
            symbol = np.zeros(table.size + 1, dtype=np.int64)
            symbol[plan] = reader.read(np.append(table, lanes.CERTAIN)[plan])
            here = ((centre + symbol[:-1].reshape(centre.shape)) & 255) * kept
            pixels[step, :, rows] = here
            model.update(step, rows, here, kept)
        images[..., PLANES[n_channels]] = _unskew(pixels, width)
    reader.finish()
    return images


def _steps(
    keep: Bool[ndarray, "b h w"], n_planes: int
) -> Iterator[tuple[int, slice, Bool[ndarray, "planes rows b"]]]:
    """Give every step, the rows it reaches, and which of their pixels are coded in it."""
    height, width = keep.shape[1:]
    skewed = _skew(np.repeat(keep[..., None], n_planes, axis=3))
    for step in range(len(skewed)):
        # One pixel beyond either side, for the edges.
        first = max(0, (step - (n_planes - 1) * LAG - width) // 2)
        rows = slice(first, min(height, (step + 1) // 2 + 1))
        yield step, rows, skewed[step, :, rows]


def _skew(images: Shaped[ndarray, "b h w c"]) -> Shaped[ndarray, "steps c h b"]:
    """Put every pixel at the step at which it is coded."""
    n_images, height, width, n_planes = images.shape
    n_steps = width + 2 * (height - 1) + LAG * (n_planes - 1)
    skewed = np.zeros((n_steps, n_planes, height, n_images), dtype=images.dtype)
    for plane, row, first in _starts(height, n_planes):
        skewed[first : first + width, plane, row] = images[:, row, :, plane].T
    return skewed


def _unskew(skewed: Shaped[ndarray, "steps c h b"], width: int) -> Shaped[ndarray, "b h w c"]:
    """Undo `_skew`."""
    _, n_planes, height, n_images = skewed.shape
    images = np.zeros((n_images, height, width, n_planes), dtype=skewed.dtype)
    for plane, row, first in _starts(height, n_planes):
        images[:, row, :, plane] = skewed[first : first + width, plane, row].T
    return images


def _starts(height: int, n_planes: int) -> list[tuple[int, int, int]]:
    """Give plane, row and first step of every row of every plane."""
    return [(p, y, 2 * y + LAG * p) for p in range(n_planes) for y in range(height)]
