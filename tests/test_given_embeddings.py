"""Ready embeddings: what is read as them, and what is refused in one line."""

import io
import pickle

import numpy as np
import pytest
from datasets import Dataset

from dq_multimodal import InputError, compress

N_ROWS = 40
VALUES = np.random.default_rng(0).normal(size=(N_ROWS, 3)).astype(np.float32)
WANTED = r"e must be a \.npy file of an \(n, d\) array of float16, float32 or float64, got "
ONE_EACH = r"e must hold one vector for each of the 40 rows, got shape "


def saved(values, save=np.save):
    file = io.BytesIO()
    save(file, values)
    return file.getvalue()


def with_value(value):
    values = VALUES.astype(np.float64)
    values[5, 1] = value
    return saved(values)


def head(**facts):
    file = io.BytesIO()
    facts = {"descr": "<f4", "fortran_order": False, "shape": (N_ROWS, 3), **facts}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue()


WRONG = [
    (saved(VALUES, np.savez), WANTED + r"an archive \(\.npz\)"),
    (b"PK\3\4 no archive", WANTED + r"an archive \(\.npz\)"),
    (b"", WANTED + "an empty file"),
    (pickle.dumps(VALUES), WANTED + "another file"),
    (b"0.1,0.2\n", WANTED + "another file"),
    (saved(np.full((N_ROWS, 3), None)), WANTED + "an array of Python objects"),
    (saved(VALUES)[:-9], WANTED + "another file"),
    (saved(VALUES)[:40], WANTED + "another file"),
    (head(shape=(N_ROWS, 10**17)), WANTED + "another file"),
    (head(shape=(N_ROWS, -3)), WANTED + "another file"),
    (b"\x93NUMPY\1\0\x10\0" + 16 * b"(", WANTED + "another file"),
    (b"\x93NUMPY\2\0\x30\x75\0\0" + b"{" + 29_999 * b" ", WANTED + "another file"),
    (saved(VALUES[:, 0]), WANTED + r"float32 of shape \(40,\)"),
    (saved(VALUES[:, :, None]), WANTED + r"float32 of shape \(40, 3, 1\)"),
    (saved(np.float32(1)), WANTED + r"float32 of shape \(\)"),
    (saved(VALUES.astype(int)), WANTED + r"int64 of shape \(40, 3\)"),
    (saved(VALUES.astype(complex)), WANTED + r"complex128 of shape"),
    (saved(VALUES.astype(str)), WANTED + r"<U\d+ of shape"),
    (saved(np.zeros(N_ROWS, "f4,f4")), WANTED + r"\[\('f0', '<f4'\), .* of shape \(40,\)"),
    (saved(VALUES[:0]), ONE_EACH + r"\(0, 3\)"),
    (saved(VALUES[:, :0]), ONE_EACH + r"\(40, 0\)"),
    (saved(VALUES[:-1]), ONE_EACH + r"\(39, 3\)"),
    (with_value(np.nan), "e must be finite in float32, row 5 holds NaN or infinity"),
    (with_value(1e300), "e must be finite in float32, row 5 holds NaN or infinity"),
]


@pytest.fixture
def request_of(tmp_path):
    """Flags of a run with the embeddings in the file e."""
    rows = Dataset.from_dict({"text": [f"row {k}" for k in range(N_ROWS)]})
    options = {
        "method": "dq",
        "n_bins": 4,
        "report": False,
        "ready_embeddings": str(tmp_path / "e"),
    }
    return rows, options


@pytest.mark.parametrize(("file", "message"), WRONG, ids=range(len(WRONG)))
@pytest.mark.filterwarnings("error")
def test_what_is_no_file_of_embeddings_is_refused_in_one_line(tmp_path, request_of, file, message):
    (tmp_path / "e").write_bytes(file)
    with pytest.raises(InputError, match=message) as error:
        compress(request_of[0], output_dir=tmp_path / "run", **request_of[1])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8", "F"])
def test_any_file_of_floats_is_read(tmp_path, request_of, kind):
    values = np.asfortranarray(VALUES) if kind == "F" else VALUES.astype(kind)
    with (tmp_path / "e").open("wb") as file:
        np.save(file, values)
    run = compress(request_of[0], output_dir=tmp_path / "run", **request_of[1])
    np.testing.assert_array_equal(np.load(run.path / "embeddings.npy"), VALUES)
