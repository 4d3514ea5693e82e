"""Which files the rows of a dataset may name, and how their bytes get into a run."""

import hashlib
import io
import json
import os
import threading
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import nasty_images
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import (
    Audio,
    Dataset,
    Features,
    Image,
    LargeList,
    List,
    Pdf,
    Value,
    Video,
    load_dataset,
    load_from_disk,
)
from fake_hub import FakeHub
from forging import seal

from dq_multimodal import Run, compress, resample
from dq_multimodal.config import InputError
from dq_multimodal.data.row_files import read_card, widen
from dq_multimodal.verification import verify

SECRET = b"a secret of this machine"
PLAIN = {"bytes": Value("binary"), "path": Value("string")}
KINDS = {
    "image": (Image(), lambda v: v),
    "audio": (Audio(), lambda v: v),
    "video": (Video(), lambda v: v),
    "pdf": (Pdf(), lambda v: v),
    "plain": (PLAIN, lambda v: v),
    "list": (List(Image()), lambda v: [v, None]),
    "fixed": (List(Image(), length=2), lambda v: [None, v]),
    "large": (LargeList(PLAIN), lambda v: [v]),
    "deep": (List({"a": List(Image()), "n": Value("int32")}), lambda v: [{"a": [v], "n": 1}]),
}


def picture(seed, kind="PNG"):
    return nasty_images.save(nasty_images.picture((16, 16), seed), kind)


def zipped(n):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for k in range(n):
            archive.writestr(f"a/{k:02d}.png", picture(k))
    return file.getvalue()


def table(values, kind):
    features = Features({"image": kind, "text": Value("string")})
    column = pa.array(values, features.arrow_schema.field("image").type)
    texts = [f"text {k}" for k in range(len(values))]
    return pa.table({"image": column, "text": texts}).cast(features.arrow_schema)


def write(path, values, kind=None):
    pq.write_table(table(values, kind or Image()), path)
    return str(path)


def rows(path, n=8):
    """Rows with a picture each, but for number 5, which names a file."""
    inside = [{"bytes": picture(k), "path": "x.png"} for k in range(n)]
    return [*inside[:5], {"bytes": None, "path": str(path)}, *inside[6:]]


def run(source, folder, **options):
    options = {"method": "random", "keep_ratio": 1.0, "report": False, **options}
    options.setdefault("keep_unreadable", True)
    return compress(source, output_dir=folder, **options)


def stored(run_folder):
    return pq.read_table(sorted(Path(run_folder).glob("subset/*.parquet"))).to_pylist()


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret.png").write_bytes(SECRET)
    return tmp_path / "secret.png"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for k in range(8):
        (folder / "sub" / f"{k}.png").write_bytes(picture(50 + k))
    return folder


@pytest.fixture
def hub():
    with FakeHub() as fake:
        yield fake


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_a_table_name_files_of_the_given_folder_only(secret, pictures, tmp_path, name):
    kind, wrap = KINDS[name]
    path = write(tmp_path / "d.parquet", [wrap(v) for v in rows(secret)], kind)
    for source, streaming in ((path, False), (path, True), (Dataset.from_parquet(path), False)):
        with pytest.raises(InputError, match=r"row 5 of .+secret.png.+--image-folder"):
            run(source, tmp_path / "run", streaming=streaming)
    assert not (tmp_path / "run").exists()

    values = [wrap(v) for v in rows("sub/3.png")]
    values[2] = wrap({"bytes": None, "path": str(pictures / "sub" / "4.png")})
    values[3] = wrap({"bytes": b"inside", "path": str(secret)})
    values[4], values[6] = None, wrap({"bytes": None, "path": "gone.png"})
    path = write(tmp_path / "d.parquet", values, kind)
    wanted = [*values]
    for k, data, file in ((2, 54, "4.png"), (5, 53, "3.png")):
        wanted[k] = wrap({"bytes": picture(data), "path": file})
    wanted[3] = wrap({"bytes": b"inside", "path": "secret.png"})
    wanted[6] = wrap({"bytes": b"", "path": "gone.png"})
    for streaming in (False, True):
        made = run(path, tmp_path / f"run-{streaming}", image_folder=pictures, streaming=streaming)
        assert [row["image"] for row in stored(made.path)] == wanted
        assert verify(made)[2].result == "passed"
    (pictures / "sub" / "3.png").write_bytes(b"another")
    check = verify(made)[2]
    assert (check.result, "content has changed" in check.detail) == ("skipped", True)


def test_no_address_device_or_way_out_of_the_folder_is_followed(secret, pictures, tmp_path):
    met = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            met.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/x"
    os.mkfifo(pictures / "fifo")
    (pictures / "link.png").symlink_to(secret)
    (pictures / "out").symlink_to(tmp_path)
    outside = [
        *(secret, url, "hf://datasets/a/b/x.png", f"file://{secret}", "/dev/zero"),
        *(pictures / "fifo", "link.png", "out/secret.png", "../secret.png", "sub/../../secret.png"),
        *(f"zip://x::{url}", f"{secret}::x", pictures),
    ]
    for path in map(str, outside):
        source = write(tmp_path / "d.parquet", rows(path))
        for streaming in (False, True):
            with pytest.raises(InputError, match="row 5 of"):
                run(source, tmp_path / "run", image_folder=pictures, streaming=streaming)
    for path in (url, "hf://datasets/a/b/x.png", "/dev/zero", str(pictures / "fifo")):
        loaded = Dataset.from_dict({"image": [path] * 3}, features=Features({"image": Image()}))
        with pytest.raises(InputError, match="row 0 of dataset names a file"):
            run(loaded, tmp_path / "run")
    server.shutdown()
    server.server_close()
    assert not met


def test_a_folder_made_by_save_to_disk_names_no_files(secret, tmp_path):
    Dataset.from_dict({"text": ["a"] * 8}).save_to_disk(tmp_path / "saved")
    info = tmp_path / "saved" / "dataset_info.json"
    made = table(rows(secret), Image())
    features = Features.from_arrow_schema(made.schema)
    info.write_text(json.dumps({**json.loads(info.read_text()), "features": features.to_dict()}))
    with pa.ipc.new_stream(next(tmp_path.glob("saved/*.arrow")), made.schema) as writer:
        writer.write_table(made)
    for source in (str(tmp_path / "saved"), load_from_disk(tmp_path / "saved")):
        with pytest.raises(InputError, match="row 5 of"):
            run(source, tmp_path / "run")
    picked = load_from_disk(tmp_path / "saved").select([7, 5, 0])
    with pytest.raises(InputError, match="row 1 of"):
        run(picked, tmp_path / "run")
    run(picked.select([0, 2]), tmp_path / "run")


def test_rows_of_json_that_look_like_images(secret, pictures, cli, tmp_path, small_classifier):
    lines = [{"image": {"bytes": None, "path": f"sub/{k}.png"}} for k in range(8)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--method", "dq", "--n-bins", 2, "--embedding-model", small_classifier, "--no-report")
    for command in ("compress", "plan"):
        done = cli(command, "d.jsonl", *flags, code=2)
        assert "row 0 of d.jsonl" in done.stderr
        assert "Traceback" not in done.stderr
    cli("compress", "d.jsonl", *flags, "--image-folder", "pictures", "--output-dir", "run")
    assert "passed" in cli("verify", "run").stdout
    assert np.abs(np.load(tmp_path / "run" / "embeddings.npy")).sum(axis=1).all()
    cli("resample", "run", "--keep-ratio", 0.5, "--output-dir", "half")
    kept = [row["image"] for row in stored(tmp_path / "half")]
    assert len(kept) == 4
    assert all(value["bytes"] in {picture(50 + k) for k in range(8)} for value in kept)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_pictures_names_its_own(secret, pictures, tmp_path, streaming):
    lines = [{"file_name": f"sub/{k}.png", "t": "x"} for k in range(8)]
    lines.append({"file_name": "sub/gone.png", "t": "x"})
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = run(str(pictures), tmp_path / "run", streaming=streaming)
    values = [row["image"] for row in stored(made.path)]
    assert values[2] == {"bytes": picture(52), "path": "2.png"}
    assert values[8] == {"bytes": b"", "path": "gone.png"}
    assert verify(made)[2].result == "passed"

    (pictures / "metadata.jsonl").unlink()
    (pictures / ".hidden.png").write_bytes(SECRET)
    for path in (secret, pictures / ".hidden.png", pictures / ".." / "secret.png"):
        named = table([{"bytes": None, "path": str(path)}] * 8, Image())
        named = named.rename_columns(["other", "text"])
        named = named.append_column("file_name", pa.array(["sub/0.png"] * 8))
        pq.write_table(named, pictures / "metadata.parquet")
        with pytest.raises(InputError, match=r"row 0 of .+ in the column other"):
            run(str(pictures), tmp_path / "no", streaming=streaming)


def test_kept_files_are_listed_row_by_row(pictures, tmp_path):
    (pictures / "sub" / "3.png").rename(pictures / "two\nlines.png")
    made = run(str(pictures), tmp_path / "run", keep_ratio=0.75)
    for drawn in (made, *(made.resample(r, output_dir=tmp_path / f"{r}") for r in (0.5, 1.0))):
        names = (drawn.path / "subset" / "kept_files.txt").read_text().splitlines()
        files = [Path(json.loads(name) if name[0] == '"' else name) for name in names]
        wanted = [row["image"]["bytes"] for row in stored(drawn.path)]
        assert [file.read_bytes() for file in files] == wanted
        assert len(load_dataset(str(drawn.path), split="train")) == len(files)
    listed = made.path / "subset" / "kept_files.txt"
    assert verify(made)[-1].result == "passed"
    listed.write_text(listed.read_text()[1:])
    assert "subset/kept_files.txt has" in verify(made)[-1].detail
    listed.unlink()
    assert "subset/kept_files.txt is missing" in verify(made)[-1].detail
    assert run(str(pictures), tmp_path / "run", keep_ratio=0.75) and listed.is_file()
    manifest = json.loads((made.path / "manifest.json").read_text())
    del manifest["files"]["subset/kept_files.txt"]  # as in a run of before
    (made.path / "manifest.json").write_text(json.dumps(seal(manifest)))
    listed.write_text("")
    assert verify(made)[-1].result == "passed"
    inside = run(write(tmp_path / "d.parquet", rows("x")[:5]), tmp_path / "inside")
    assert not (inside.path / "subset" / "kept_files.txt").exists()


def test_pictures_in_zip_files_are_read_and_counted(cli, tmp_path, small_classifier):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "data.zip").write_bytes(zipped(12))
    flags = ("--method", "dq", "--n-bins", 2, "--embedding-model", small_classifier, "--no-report")
    flags += ("--keep-ratio", 0.5)
    for extra in ((), ("--streaming",)):
        cli("compress", "z", *flags, *extra, "--output-dir", "run", "--overwrite")
        assert np.abs(np.load(tmp_path / "run" / "embeddings.npy")).sum(axis=1).all()
        assert all(v["image"]["bytes"] == picture(v["dq_row"]) for v in stored(tmp_path / "run"))
        assert stored(tmp_path / "run")[0]["image"]["path"].endswith(".png")
        sizes = Run(tmp_path / "run").manifest["bytes"]
        n_bytes = sum(len(picture(k)) for k in range(12))
        assert sizes["source_data"] > n_bytes > sizes["subset_data"]
        assert {check.result for check in verify(tmp_path / "run")} == {"passed"}
    loaded = load_dataset(str(tmp_path / "z"), split="train")
    assert stored(run(loaded, tmp_path / "m").path)[3]["image"]["bytes"] == picture(3)


def test_folders_in_zip_files_are_classes(tmp_path):
    (tmp_path / "z").mkdir()
    with zipfile.ZipFile(tmp_path / "z" / "data.zip", "w") as archive:
        for k in range(12):
            archive.writestr(f"top/{'cat' if k % 2 else 'dog'}/{k:02d}.png", picture(k))
            archive.writestr(f"__MACOSX/top/cat/._{k:02d}.png", b"no picture")
    made = run(str(tmp_path / "z"), tmp_path / "run")
    assert made.manifest["labels"] == ["cat", "dog"] and made.manifest["rows"] == 12
    for row in stored(made.path):
        k = int(row["image"]["path"][:2])
        assert row["image"]["bytes"] == picture(k) and row["label"] == 1 - k % 2


def test_files_in_lists_count_as_bytes_of_the_source(pictures, tmp_path):
    paths = [[str(pictures / "sub" / f"{k}.png")] * 3 for k in range(8)]
    loaded = Dataset.from_dict({"image": paths}, features=Features({"image": List(Image())}))
    made = run(loaded, tmp_path / "run", keep_ratio=0.5)
    assert made.manifest["bytes"]["source_data"] > 8 * 3 * len(picture(0))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "a"}\n' * 4)
    return tmp_path / "d"


PLACES = ["../secret.jsonl", "{folder}/secret.jsonl", "https://x.invalid/a.jsonl"]
PLACES += ["hf://datasets/a/b/c.jsonl", "zip://*::https://x.invalid/a.zip"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("file", "key", "fine"),
    [("README.md", "data_files", "a.jsonl"), (".huggingface.yaml", "data_dir", ".")],
)
def test_a_card_names_data_of_its_own_folder_only(folder, place, file, key, fine, tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')

    def describe(path):
        text = f"configs:\n- config_name: default\n  {key}: '{path}'\n"
        (folder / file).write_text(f"---\n{text}---\n" if file == "README.md" else text)

    describe(place.format(folder=tmp_path))
    with pytest.raises(InputError, match="names data outside it"):
        run(str(folder), tmp_path / "no")
    describe(fine)
    assert len(stored(run(str(folder), tmp_path / "run").path)) == 4


@pytest.mark.parametrize("text", ["- a\n", "a: !!int '-'\n", "a: [\n", "a: &a [x]\nb: *a\n"])
def test_settings_beside_a_card_that_are_none_are_one_line(folder, tmp_path, text):
    (folder / ".huggingface.yaml").write_text(text)
    with pytest.raises(InputError, match=r"^cannot read the card of [^\n]*$"):
        run(str(folder), tmp_path / "no")


def test_a_card_whose_aliases_multiply_is_one_line(folder, tmp_path):
    card = "---\nx0: &a0 [a.jsonl, a.jsonl]\n"
    for k in range(1, 10):
        card += f"x{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n"
    card += "configs:\n- config_name: default\n  data_files: *a9\n---\n"
    (folder / "README.md").write_text(card)
    with pytest.raises(InputError, match="more than 100,000 places"):
        run(str(folder), tmp_path / "no")


@pytest.mark.parametrize("text", ["&a [*a, *a]", "&a {x: *a, y: *a}"])
def test_a_card_that_refers_to_itself_is_one_line_and_little_memory(folder, text):
    text = text.replace(", *a]", ", *a" * 999 + "]")
    (folder / "README.md").write_text(f"---\nconfigs:\n- data_files: {text}\n---\n")
    tracemalloc.start()
    with pytest.raises(InputError, match=r"^the README.md of x names more than[^\n]*$"):
        read_card(folder, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


@pytest.mark.parametrize("kind", ["string", "large_string", "binary"])
def test_only_structs_are_widened_and_no_columns_that_are_named_like_their_fields(kind):
    columns = {"bytes": Value(kind), "path": Value("string")}
    assert widen(Features(columns)) == columns
    wide = {**columns, "bytes": Value("binary")}
    assert widen(Features({"a": columns, "b": List(columns)})) == {"a": wide, "b": List(wide)}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        pytest.param("images", ()),
        pytest.param("images", ("--streaming",), marks=slow),
        pytest.param("zip", (), marks=slow),
        pytest.param("zip", ("--streaming",), marks=slow),
    ],
)
def test_rows_from_the_hub_hold_their_files(hub, cli, tmp_path, name, extra):
    images = {f"{k}.png": picture(k) for k in range(6)}
    photo = picture(9, "JPEG")  # decoded and coded again, it would be another file
    others = {"8.png": b"no picture", "9.jpg": photo}
    files = {**images, **others} if name == "images" else {"train.zip": zipped(6)}
    hub.add_repo("o/d", {"README.md": b"# x\n", **files})
    flags = ("--method", "random", "--keep-ratio", 1, "--no-report", "--output-dir", "run", *extra)
    cli("compress", "o/d", *flags, env=hub.env(tmp_path))
    wanted = [*images.values(), *([photo] if name == "images" else [])]
    assert [v["image"]["bytes"] for v in stored(tmp_path / "run")] == wanted


CARD = "---\nconfigs:\n- config_name: default\n  data_files: hf://datasets/o/private/*\n---\n"


@pytest.mark.parametrize(
    ("path", "card", "message"),
    [
        ("hf://datasets/o/private/x.png", "# x\n", "row 5 of o/evil"),
        pytest.param("{secret}", "# x\n", "row 5 of o/evil", marks=slow),
        pytest.param("hf://datasets/o/evil@main/0.png", "# x\n", "row 5 of o/evil", marks=slow),
        pytest.param("", CARD, "README.md of o/evil names data outside it", marks=slow),
    ],
    ids=["private", "local", "own", "card"],
)
def test_rows_from_the_hub_name_files_of_their_repository(
    hub, secret, cli, tmp_path, path, card, message
):
    hub.add_repo("o/private", {"x.png": SECRET}, private=True)
    data = Path(write(tmp_path / "d.parquet", rows(path.format(secret=secret)))).read_bytes()
    hub.add_repo("o/evil", {"README.md": card.encode(), "train.parquet": data, "0.png": picture(0)})
    flags = ("--method", "random", "--no-report", "--output-dir", "no")
    done = cli("compress", "o/evil", *flags, env=hub.env(tmp_path), code=2)
    assert message in done.stderr
    assert not [1 for _, url, _ in hub.requests if "private" in url]


def test_a_hostile_run_steals_nothing(hub, secret, pictures, cli, tmp_path):
    source = write(tmp_path / "d.parquet", rows("sub/1.png"))
    made = run(source, tmp_path / "run", keep_ratio=0.5, image_folder=str(pictures))
    cli("push", "run", "me/run", env=hub.env(tmp_path))
    config = hub.files("me/run")["config.yaml"].decode()
    assert str(tmp_path) not in config
    assert "image_folder: pictures" in config

    before = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    write(source, rows(secret))  # in a folder that the run asks for, not its user
    after = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    text = (made.path / "config.yaml").read_text()
    assert before in text
    text = text.replace(before, after).replace(str(pictures), str(tmp_path))
    (made.path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="content has changed"):
        resample(made.path, 1.0, output_dir=tmp_path / "no")

    part = next(made.path.glob("subset/*.parquet"))
    held = pq.read_table(part)
    values = [{"bytes": None, "path": str(secret)}] * len(held)
    at = held.column_names.index("image")
    evil = held.set_column(at, held.schema.field(at), pa.array(values, held.schema.field(at).type))
    pq.write_table(evil, part)
    hub.add_repo("me/run", {**hub.files("me/run"), f"subset/{part.name}": part.read_bytes()})
    flags = ("--keep-ratio", 0.25, "--output-dir", "no")
    done = cli("resample", "me/run", *flags, env=hub.env(tmp_path), code=2)
    assert "names a file that is none of its own" in done.stderr
    assert not (tmp_path / "no" / "subset").exists()
