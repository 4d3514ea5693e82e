"""Several processes share one plan: same files as one alone, whatever stops and goes on.

Here the processes are threads on a store in memory, and the encoder is a formula.
"""

import pickle
import random
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, TCPStore

from dq_multimodal.adapters.base import Embedded
from dq_multimodal.config import InputError
from dq_multimodal.core import make_bins
from dq_multimodal.distributed.assisting import embed_share
from dq_multimodal.distributed.launch import _meet
from dq_multimodal.distributed.messages import pack, unpack
from dq_multimodal.distributed.shares import bin_share, deal_strata, make_bins_together
from dq_multimodal.distributed.world import ALONE, World
from dq_multimodal.folder import check_folder, share_folder
from dq_multimodal.models.locate import own_device
from dq_multimodal.stages import embedding

N_ROWS = 157


class Killed(BaseException):
    """Stands for a kill."""


class Rows:
    """An adapter whose embedding is a formula; it counts what it embeds, and may be stopped."""

    is_scored = True
    chunk_rows = None
    dimension, middle_dimension = 3, 2

    def __init__(self, seen, n_batches=10**9):
        self.notes, self.problems = [], {}
        self.seen, self.n_batches = seen, n_batches

    def describe(self):
        return {"rows": "formula"}

    def describe_model(self):
        return {"model": "formula"}

    def lengths(self):
        return np.random.default_rng(0).integers(1, 50, size=N_ROWS)

    def load(self, rows, view=None):
        problems = {}
        for row in rows.tolist():
            if row % 11 == 3:
                problems.setdefault("an odd number", []).append(row)
            if row % 13 == 5:
                problems.setdefault("another", []).append(row)
        return rows, problems

    def embed(self, rows):
        if self.n_batches <= 0:
            raise Killed
        self.n_batches -= 1
        self.seen.extend(rows.tolist())
        values = np.sin(rows[:, None] * np.array([1.0, 2.0, 3.0]) + 1).astype(np.float32)
        return Embedded(values, values[:, :2] * 1e6, np.stack([rows, rows + 1], axis=1))


def together(size, lead, follow):
    """Run rank 0 here and the others in threads; give what rank 0 gives."""
    store = HashStore()
    worlds = [World(store, rank, size) for rank in range(size)] if size > 1 else [ALONE]
    threads = [threading.Thread(target=follow, args=(world,)) for world in worlds[1:]]
    for thread in threads:
        thread.start()
    try:
        return lead(worlds[0])
    finally:
        worlds[0].end(0, None)
        for thread in threads:
            thread.join()


def embed(folder, size, seen, stops=(10**9,) * 8, **options):
    """Embed by so many processes, each stopped after its number of batches."""
    adapters = [Rows(seen, n_batches) for n_batches in stops]

    def follow(world):
        for _, asked in world.tasks():
            try:
                embed_share(adapters[world.rank], 8, world, **asked)
            except (Killed, InputError):
                world.send(None)
                return

    def lead(world):
        stop_when_left_alone(world)
        embedding.embed_rows(adapters[0], folder, 8, world=world, **options)

    together(size, lead, follow)
    return adapters[0].problems


def stop_when_left_alone(world):
    """Stop rank 0 when it would wait for one that is lost (None stands for that)."""
    receive, lost = world.receive, []

    def patient(*, wait=False):
        if wait and lost:
            raise Killed
        found = receive(wait=wait)
        lost.extend(rank for rank, message in found if message is None)
        return [(rank, message) for rank, message in found if message is not None]

    world.receive = patient


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    """What one process makes."""
    (tmp_path / "one").mkdir()
    problems = embed(tmp_path / "one", 1, [])
    assert set(problems) == {"an odd number", "another"}
    return files(tmp_path / "one"), problems


def test_any_number_goes_on_with_what_any_number_left(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(embedding, "SAVE_SECONDS", 0.0)
    rng = random.Random(0)
    for trial in range(12):
        folder, seen = tmp_path / str(trial), []
        folder.mkdir()
        for _ in range(3):
            size = rng.choice([1, 2, 3])
            with pytest.raises(Killed):  # 3 x 3 x 2 of 20 batches at most
                embed(folder, size, seen, [rng.randint(0, 2) for _ in range(size)])
        problems = embed(folder, rng.choice([1, 2, 4]), seen)
        made = files(folder)
        for file in embedding.FILES:
            assert made[file] == whole[0][file], f"{file} of trial {trial}"
        assert list(problems.items()) == list(whole[1].items())
        assert sorted(set(seen)) == list(range(N_ROWS))


def test_what_is_noted_is_never_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(Rows, "load", lambda *_, plain=Rows.load: time.sleep(0.01) or plain(*_))
    first, second = [], []
    with pytest.raises(Killed):
        embed(tmp_path, 2, first, (10**9, 1))
    embed(tmp_path, 4, second)
    assert first
    assert second
    assert sorted(first + second) == list(range(N_ROWS))


def test_another_plan_than_that_of_rank_0_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Rows, "load", lambda *_, plain=Rows.load: time.sleep(0.02) or plain(*_))
    refused = []

    def follow(world):
        other = Rows([])
        other.describe_model = lambda: {"model": "another"}
        for _, asked in world.tasks():
            try:
                embed_share(other, 8, world, **asked)
            except InputError as error:
                refused.append(str(error))
                world.send(None)

    def lead(world):
        stop_when_left_alone(world)
        embedding.embed_rows(Rows([]), tmp_path, 8, world=world)

    together(2, lead, follow)
    assert refused == ["rank 1 sees other rows or another model than rank 0"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=5, max_size=60), st.integers(2, 4), st.booleans())
def test_strata_are_binned_alike_by_any_number(labels, size, is_euclidean):
    strata = np.array(labels)
    rows = np.random.default_rng(1).normal(size=(len(strata), 4)).astype(np.float32)
    n_bins, similarity = min(4, len(strata)), "euclidean" if is_euclidean else "cosine"

    def follow(world):
        for _, asked in world.tasks():
            asked.pop("folder")
            bin_share(rows, world, **asked)

    def lead(world):
        return make_bins_together(
            rows, n_bins, similarity, strata, folder=embedding.Path("x"), world=world
        )

    ours, wanted = together(size, lead, follow), make_bins(rows, n_bins, similarity, strata)
    for name in ("bin", "rank", "gain", "stratum"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(wanted, name))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 5))
def test_strata_are_dealt_whole_and_evenly(labels, n_shares):
    codes = np.unique(labels, return_inverse=True)[1]
    shares = deal_strata(codes, n_shares)
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(len(codes)))
    owners = [set(codes[rows].tolist()) for rows in shares]
    assert sum(map(len, owners)) == len(set(labels))
    sizes = [len(rows) for rows in shares]
    assert max(sizes) - min(sizes) <= np.bincount(codes).max()


def test_messages_of_any_size_arrive_in_order():
    big = np.arange(700_000)

    def follow(world):
        for name, asked in world.tasks():
            world.send((name, asked["k"]))
            world.send(asked["array"] + world.rank)

    def lead(world):
        found = []
        for k in range(2):
            world.post("add", k=k, array=big)
        while len(found) < 8:
            found += world.receive(wait=True)
        return found

    found = together(3, lead, follow)
    for rank in (1, 2):
        mine = [message for sender, message in found if sender == rank]
        assert mine[0::2] == [("add", 0), ("add", 1)]
        for array in mine[1::2]:
            np.testing.assert_array_equal(array, big + rank)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(
    st.recursive(
        PLAIN,
        lambda inner: (
            st.lists(inner)
            | st.tuples(inner, inner)
            | st.dictionaries(st.integers() | st.text() | st.tuples(st.integers()), inner)
        ),
    )
)
def test_messages_survive_exactly(message):
    found = unpack(bytearray(pack(message)))
    assert repr(found) == repr(message)  # 1, 1.0 and True are equal


@pytest.mark.parametrize("kind", ["?", "i1", "<i8", ">i4", "f2", "f4", ">f8", "u2"])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (2, 3)])
def test_arrays_survive_exactly(kind, shape):
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(kind)
    found = unpack(bytearray(pack({3: [array, array.T, "after"]})))[3]
    for ours, wanted in zip(found, (array, array.T), strict=False):
        assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(ours, wanted)
    assert found[2] == "after"


def message(text, behind=b""):
    return len(text).to_bytes(8, "big") + text.encode() + behind


NO_MESSAGES = [
    pickle.dumps(("bins", {})),
    b"",
    message("[1, 2"),
    message("[" * 100_000),
    message('{"code": "print()"}'),
    message('{"array": ["<f4", [3]]}', bytes(8)),
    message('{"array": ["<f4", [3]]}', bytes(16)),
    message('{"array": ["<f4", [-3]]}', bytes(12)),
    message('{"array": ["O", [1]]}', bytes(8)),
    message('{"array": ["<f4", [4611686018427387904]]}', bytes(8)),
    message('{"dict": [[[1], 2]]}'),
    message('{"dict": 7}'),
    message('["bins"]'),
]
NO_PARTS = ("many", "-1", "0", "10000000000", "2")


@pytest.mark.parametrize(
    ("blob", "n_parts"),
    [*((blob, "1") for blob in NO_MESSAGES), *((pack(("bins", {})), n) for n in NO_PARTS)],
    ids=range(len(NO_MESSAGES) + len(NO_PARTS)),
)
def test_a_message_that_is_none_is_refused_in_one_line(blob, n_parts):
    store = HashStore()
    store.set("task/0/0", blob)
    store.set("task/0", n_parts)
    with pytest.raises(InputError, match=r"^got a (message|task) of [^\n]*$"):
        next(World(store, 1, 2).tasks())


def test_objects_are_not_sent():
    for value in (object(), {1, 2}, np.array([None])):
        with pytest.raises(TypeError, match="a message cannot hold"):
            pack([value])


@pytest.mark.parametrize("address", [None, "localhost", "127.0.0.1", "::1"])
def test_the_store_of_one_machine_is_for_this_machine(monkeypatch, address):
    for name in ("LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    kind = socket.AF_INET6 if address == "::1" else socket.AF_INET
    with socket.socket(kind) as free:
        free.bind((address or "127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    for name, value in (flags | ({"MASTER_ADDR": address} if address else {})).items():
        monkeypatch.setenv(name, value)

    def wait_for_listener():
        while True:
            lines = [
                line.split()
                for table in ("tcp", "tcp6")
                for line in Path("/proc/net", table).read_text().splitlines()[1:]
            ]
            listening = [place for _, place, _, state, *_ in lines if state == "0A"]
            if found := [place for place in listening if place.endswith(f":{port:04X}")]:
                return found

    found = []

    def other():
        found.extend(wait_for_listener())
        host = "::1" if address == "::1" else "127.0.0.1"
        found.append(TCPStore(host, port, 2, False))

    thread = threading.Thread(target=other)
    thread.start()
    world = _meet()
    thread.join()
    assert world.size == 2
    assert [place.split(":")[0] for place in found[:-1]] == [
        "0" * 24 + "01000000" if address == "::1" else "0100007F"
    ]


def test_a_folder_of_another_machine_is_told_from_that_of_rank_0(tmp_path, monkeypatch):
    monkeypatch.setattr("dq_multimodal.folder.SHARED_SECONDS", 0.0)
    main, other = (World(store, rank, 2) for store in [HashStore()] for rank in (0, 1))
    share_folder(tmp_path, main)
    asked = next(other.tasks())[1]
    check_folder(**asked, rank=1)
    (tmp_path / "world.token").write_text("that of an earlier run")
    with pytest.raises(InputError, match=r"rank 1 does not see the output folder .* share"):
        check_folder(**asked, rank=1)


def test_a_rank_has_its_own_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert own_device() is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device() == "cuda:3"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert own_device() == "cpu"
