"""Texture levels against Eq. 3 written pixel by pixel and token by token."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_multimodal.core.texture import image_texture, token_texture


def mirror(k, n):
    return 0 if n == 1 else abs(k) if k < n else 2 * (n - 1) - k


def naive_image(luma, patch):
    height, width = luma.shape
    levels = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            total, count = 0.0, 0
            for i in range(top, min(top + patch, height)):
                for j in range(left, min(left + patch, width)):

                    def at(a, b, i=i, j=j):
                        return luma[mirror(i + a, height), mirror(j + b, width)]

                    gx = sum(w * (at(a, 1) - at(a, -1)) for a, w in ((-1, 1), (0, 2), (1, 1)))
                    gy = sum(w * (at(1, b) - at(-1, b)) for b, w in ((-1, 1), (0, 2), (1, 1)))
                    total += 0.5 * abs(gx) + 0.5 * abs(gy)
                    count += 1
            levels.append(total / count)
    return np.mean(levels), len(levels)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 6), st.integers(0, 99))
def test_images_are_as_the_formula_says(height, width, patch, seed):
    luma = np.random.default_rng(seed).random((2, height, width))
    levels, counts = image_texture(luma, patch)
    for k in range(2):
        level, count = naive_image(luma[k], patch)
        assert levels[k] == pytest.approx(level, abs=1e-5)
        assert counts[k] == count


def naive_tokens(tokens, is_token, window):
    positions = np.flatnonzero(is_token)
    levels = []
    for start in range(0, len(positions), window):
        part = positions[start : start + window]
        steps = [np.linalg.norm(tokens[b] - tokens[a]) for a, b in pairwise(part) if b == a + 1]
        if steps:
            levels.append(np.mean(steps))
    return (np.mean(levels) if levels else 0.0), len(levels)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 99))
def test_tokens_are_as_the_formula_says(n_tokens, window, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(3, n_tokens, 4)).astype(np.float32)
    is_token = rng.random((3, n_tokens)) < 0.8
    levels, counts = token_texture(torch.from_numpy(tokens), torch.from_numpy(is_token), window)
    for k in range(3):
        level, count = naive_tokens(tokens[k], is_token[k], window)
        assert float(levels[k]) == pytest.approx(level, rel=1e-5)
        assert int(counts[k]) == count
