"""The codec of kept pixels: exact for any input, standing alone, small, and safe when damaged."""

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from dq_multimodal.patches import grid, lanes
from dq_multimodal.patches.context_coding import VERSION, decode_images, encode_images


def assert_exact(images, keep):
    payloads = encode_images(images, keep)
    decoded = decode_images(payloads, keep, images.shape[3])
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, images * keep[..., None])
    return payloads


def drop_patches(n_images, height, width, patch_size, seed=0):
    n_patches = int(np.prod(grid.grid_shape(height, width, patch_size)))
    scores = np.random.default_rng(seed).random((n_images, n_patches))
    keep = grid.drop_lowest(scores, grid.count_dropped(n_patches, 0.25))
    return grid.keep_pixels(keep, height, width, patch_size)


def webp_size(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "webp", lossless=True, method=4, quality=100)
    return buffer.tell()


def picture(height=96, width=120, seed=0):
    """Smooth shading and an edge, with grain and texture on top."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 20
    light = 110 + 60 * np.sin(x / 2 + np.cos(y)) + 30 * (x + y / 2 > 4)
    light = light + 6 * np.sin(9 * x + 5 * y) + rng.normal(0, 2, (height, width))
    tint = np.stack([12 * np.cos(y), 0 * x, 20 * np.sin(x / 3)], axis=-1)
    noise = rng.normal(0, 0.5, (height, width, 3))
    return np.clip(light[..., None] + tint + noise, 0, 255).astype(np.uint8)


def awkward_images():
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:19, :23]
    board = ((x + y) % 2 * 255).astype(np.uint8)[..., None]
    noise = rng.integers(0, 256, (19, 23, 3), dtype=np.uint8)
    return {
        "noise": noise,
        "black and white noise": noise // 128 * 255,
        "constant": np.full((19, 23, 3), 77, np.uint8),
        "black": np.zeros((19, 23, 3), np.uint8),
        "white": np.full((19, 23, 3), 255, np.uint8),
        "checkerboard": np.repeat(board, 3, axis=2),
        "opposite checkerboards": np.concatenate([board, 255 - board, board], axis=2),
        "gradient": np.stack([x * 11, y * 13, x + y], axis=-1).astype(np.uint8),
        "grey": board,
        "grey as RGB": np.repeat(picture(19, 23)[..., :1], 3, axis=2),
        "1 x 1": noise[:1, :1],
        "1 x n": noise[:1],
        "n x 1": noise[:, :1],
        "2 x 2": noise[:2, :2],
        "1 x n grey": noise[:1, :, :1],
        "n x 1 grey": noise[:, :1, :1],
        "1 x 1 grey": noise[:1, :1, :1],
        "wide": picture(7, 130),
        "tall": picture(130, 7),
    }


@pytest.mark.parametrize("name", awkward_images())
def test_exact_with_and_without_holes(name):
    image = awkward_images()[name]
    height, width = image.shape[:2]
    one = np.zeros((height, width), bool)
    one[height // 2, width // 2] = True
    rng = np.random.default_rng(2)
    keep = np.stack(
        [
            np.ones((height, width), bool),
            np.zeros((height, width), bool),
            one,
            ~one,
            drop_patches(1, height, width, 4)[0],
            rng.random((height, width)) < 0.5,
        ]
    )
    payloads = assert_exact(np.repeat(image[None], len(keep), axis=0), keep)
    assert payloads[1] == bytes([VERSION])
    assert all(payload[0] == VERSION for payload in payloads)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_exact_on_any_images_and_masks(data):
    b, h, w = (data.draw(st.integers(1, top)) for top in (4, 12, 12))
    c = data.draw(st.sampled_from([1, 3]))
    levels = data.draw(st.sampled_from([st.integers(0, 255), st.sampled_from([0, 255])]))
    images = data.draw(hnp.arrays(np.uint8, (b, h, w, c), elements=levels))
    keep = data.draw(hnp.arrays(bool, (b, h, w)))
    assert_exact(images, keep)


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels"):
        encode_images(np.zeros((1, 4, 4, 2), np.uint8), np.ones((1, 4, 4), bool))


def test_no_images():
    assert encode_images(np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 8, 8), bool)) == []
    assert decode_images([], np.zeros((0, 8, 8), bool), 3).shape == (0, 8, 8, 3)


def test_dropped_pixels_leave_no_trace():
    images = np.stack([picture(32, 32, seed) for seed in range(3)])
    keep = drop_patches(3, 32, 32, 4)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    other = np.where(keep[..., None], images, noise)
    assert encode_images(images, keep) == encode_images(other, keep)


def test_payloads_stand_alone():
    images = np.stack([picture(40, 36, seed) for seed in range(5)])
    keep = drop_patches(5, 40, 36, 4)
    keep[3] = False
    keep[4, :30] = False
    together = encode_images(images, keep)
    for i in range(5):
        assert encode_images(images[i : i + 1], keep[i : i + 1]) == [together[i]]
        alone = decode_images([together[i]], keep[i : i + 1], 3)
        np.testing.assert_array_equal(alone[0], images[i] * keep[i][..., None])
    back = [4, 2, 0, 3, 1]
    decoded = decode_images([together[i] for i in back], keep[back], 3)
    np.testing.assert_array_equal(decoded, (images * keep[..., None])[back])


def test_input_is_left_as_it_was():
    images, keep = picture(20, 20)[None], drop_patches(1, 20, 20, 4)
    images.flags.writeable = keep.flags.writeable = False
    assert_exact(images, keep)


def test_tables_are_codes():
    counts = lanes.frequencies()
    assert (counts[:-1] >= 1).all() and (counts.sum(axis=1) == 1 << lanes.TOTAL_BITS).all()
    # The integers themselves, so that a machine that rounds otherwise is noticed.
    weights = np.arange(1, counts.size + 1).reshape(counts.shape) % 65521
    assert int((counts * weights).sum()) == 686973338296


def test_bytes_stay_the_same():
    """A change of these bytes makes older files unreadable: it needs a new VERSION."""
    y, x = np.mgrid[:40, :36]
    grain = (x * x * 7 + y * y * 13 + x * y * 5) % 31 // 3
    image = np.stack([3 * x + y + grain, 4 * y + grain, 200 - 2 * x + grain // 2], axis=-1)
    keep = (x // 4 * 5 + y // 4 * 3) % 4 != 0
    payload = encode_images(image.astype(np.uint8)[None], keep[None])[0]
    assert len(payload) == 1135
    assert hashlib.sha256(payload).hexdigest()[:16] == "759143ea5f42b969"


class TestDamage:
    images = np.stack([picture(32, 32, seed) for seed in range(2)])
    keep = drop_patches(2, 32, 32, 4)
    payloads = encode_images(images, keep)

    @pytest.mark.parametrize("cut", [0, 1, 2, 3, 9, 10, 100, 101, -1, -2])
    def test_truncated(self, cut):
        with pytest.raises(ValueError, match="payload 1"):
            decode_images([self.payloads[0], self.payloads[1][:cut]], self.keep, 3)

    @pytest.mark.parametrize("extra", [b"\0", b"\0\0", bytes(100)])
    def test_too_long(self, extra):
        with pytest.raises(ValueError, match="payload 0"):
            decode_images([self.payloads[0] + extra, self.payloads[1]], self.keep, 3)

    def test_other_version(self):
        with pytest.raises(ValueError, match="payload 0 is not of version"):
            decode_images([b"\xff" + self.payloads[0][1:], self.payloads[1]], self.keep, 3)

    def test_other_mask(self):
        with pytest.raises(ValueError, match="payload"):
            decode_images(self.payloads, self.keep[::-1], 3)

    def test_something_where_nothing_is_kept(self):
        with pytest.raises(ValueError, match="payload 0"):
            decode_images(self.payloads, np.zeros_like(self.keep), 3)

    def test_wrong_count(self):
        with pytest.raises(ValueError, match="2 payloads for 1"):
            decode_images(self.payloads, self.keep[:1], 3)

    def test_flipped_bytes_end_in_an_error(self):
        rng = np.random.default_rng(0)
        for at in rng.integers(1, len(self.payloads[0]) - 8, 20):
            bad = bytearray(self.payloads[0])
            bad[at] ^= int(rng.integers(1, 256))
            with pytest.raises(ValueError, match="payload 0"):
                decode_images([bytes(bad), self.payloads[1]], self.keep, 3)

    def test_noise_never_hangs(self):
        rng = np.random.default_rng(0)
        for size in (11, 301, 3001):
            bad = bytes([VERSION]) + rng.bytes(size - size % 2)
            with pytest.raises(ValueError, match="payload 0"):
                decode_images([bad], self.keep[:1], 3)


def test_noise_grows_little():
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    keep = np.ones((2, 64, 64), bool)
    assert max(map(len, encode_images(noise, keep))) <= 1.03 * noise[0].size
    assert max(map(len, encode_images(noise // 128 * 255, keep))) <= 1.03 * noise[0].size


def test_flat_images_cost_next_to_nothing():
    flat = np.full((1, 64, 64, 3), 9, np.uint8)
    assert len(encode_images(flat, np.ones((1, 64, 64), bool))[0]) <= 0.01 * flat.size


def test_smaller_than_webp_of_the_whole():
    image = picture()
    size = len(encode_images(image[None], drop_patches(1, *image.shape[:2], 16))[0])
    assert size <= 0.8 * webp_size(image)


def test_cifar_images(real_data):
    parquet = pytest.importorskip("pyarrow.parquet")
    files = sorted((real_data / "cifar10").glob("train-*.parquet"))
    if not files:
        pytest.skip("no CIFAR-10")
    rows = parquet.read_table(files[0], columns=["img"])["img"][:200].to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows])
    payloads = assert_exact(images, drop_patches(200, 32, 32, 4))
    assert sum(map(len, payloads)) <= 0.68 * sum(map(webp_size, images))
