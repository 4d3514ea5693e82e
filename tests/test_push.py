"""A push adds to a repository and takes nothing from it: cards, foreign files, pushes at once."""

import json
import time
from email.utils import formatdate

import numpy as np
import pytest
import yaml
from datasets import Dataset
from fake_hub import read_card as read_matter
from forging import seal
from markdown_it import MarkdownIt
from nasty_images import picture, save

from dq_multimodal import InputError, Run, verify
from dq_multimodal import compress as dq_compress
from dq_multimodal.card import read_card
from dq_multimodal.hub import push_model

DRAW = ("--method", "random", "--no-report")


@pytest.fixture
def push(tmp_path):
    """Push run folders to repositories; gives the addresses or the errors."""

    def push(*given):
        found = []
        for folder, repo_id in given:
            try:
                found.append(Run(tmp_path / folder).push_to_hub(repo_id))
            except InputError as error:
                found.append(f"error: {error}")
        return found

    return push


def compress(cli, tmp_path, name, *given, rows=50, **options):
    Dataset.from_dict({"text": [f"{k}" for k in range(rows)]}).to_parquet(tmp_path / "d.parquet")
    return cli("compress", "d.parquet", *DRAW, "--output-dir", name, *given, **options)


def card_of(hub, repo_id):
    text = hub.files(repo_id)["README.md"].decode()
    return text, read_matter(text.encode())


def test_repositories_of_others_are_left_alone(hub, cli, push, tmp_path):
    compress(cli, tmp_path, "a")
    theirs = {
        "me/config": {"config.yaml": b"model: x"},
        "me/subset": {"README.md": b"# mine", "subset/part-00000.parquet": b"PAR1"},
        "me/figures": {"figures/map.png": b"mine"},
        "me/app": {
            "manifest.json": b'{"name": "app", "versions": {"app": 1}}',
            "config.yaml": b"x",
        },
        "me/list": {"manifest.json": b"[1]", "config.yaml": b"request: 1"},
        "me/broken": {"manifest.json": b"\xff{", "selection.parquet": b"PAR1"},
    }
    for name, files in theirs.items():
        hub.add_repo(name, files)
    older = b'{"format": "dq-multimodal run 1"}'
    kept = {"subset/mine.txt": b"x", "figures/mine.png": b"x", "LICENSE": b"x"}
    old = {"subset/part-00003.parquet": b"x", "figures/map.png": b"x"}
    hub.add_repo("me/older", {"manifest.json": older, "config.yaml": b"x: 1", **kept, **old})
    found = push(*[("a", name) for name in theirs], ("a", "me/older"))
    for name, error in zip(theirs, found, strict=False):
        assert error.startswith(f"error: {name} holds other things than a run"), error
        assert hub.files(name) == theirs[name]
        assert len(hub.repos[name].commits) == 1
    files = hub.files("me/older")
    assert kept.items() <= files.items()
    assert not old.keys() & files.keys()
    assert json.loads(files["manifest.json"])["format"] == "dq-multimodal run 1"


def test_what_others_write_into_a_card_stays(hub, cli, push, tmp_path):
    compress(cli, tmp_path, "a")
    compress(cli, tmp_path, "b", "--keep-ratio", 0.5)
    local = tmp_path / "a" / "README.md"
    text = local.read_text().replace(
        "pretty_name:", "license: cc0-1.0  # ours to give\npretty_name:"
    )
    local.write_text(text + "\n## Thanks\n\nTo all who typed.\n")
    cli("report", "a")
    assert "To all who typed." in local.read_text()
    assert "license: cc0-1.0  # ours to give" in local.read_text()
    theirs = (
        b"---\nlanguage: [en]  # theirs\ntags:\n- mine\nversion: 1.10\n---\n# My card\n\nHello.\n"
    )
    hub.add_repo("me/d", {"README.md": theirs, "LICENSE": b"x"})
    push(("a", "me/d"))
    text, matter = card_of(hub, "me/d")
    for part in (
        "To all who typed.",
        "# My card\n\nHello.",
        "10 of the 50 rows",
        "1.10",
        "# theirs",
    ):
        assert part in text
    assert matter["license"] == "cc0-1.0"
    assert {"mine", "coreset"} <= {*matter["tags"]}
    assert {c["config_name"] for c in matter["configs"]} == {"default", "selection"}

    before, section, after = text.partition("<!-- dq-multimodal: begin -->")
    after = after.replace("Hello.", "Hello again.").replace("10 of the 50", "11 of the 50")
    before = before.replace("d, 20 % by random", "My set").replace("- mine", "- mine\n- more")
    edited = before + "Above.\n\n" + section + after + "\nBelow.\n"
    hub.add_repo("me/d", hub.files("me/d") | {"README.md": edited.encode()})
    push(("b", "me/d"))
    text, matter = card_of(hub, "me/d")
    for part in ("Above.", "Below.", "Hello again.", "To all who typed.", "25 of the 50 rows"):
        assert text.count(part) == 1
    assert "of the 50 rows**" in text
    assert "11 of the 50" not in text
    assert (matter["pretty_name"], matter["license"]) == ("My set", "cc0-1.0")
    assert {"mine", "more", "coreset"} <= {*matter["tags"]}
    assert text.count("<!-- dq-multimodal: end -->") == 1
    head = hub.repos["me/d"].at().sha
    push(("b", "me/d"))
    assert hub.repos["me/d"].at().sha == head  # said already

    hub.add_repo("me/e", {"README.md": b"---\r\nlicense: mit\r\n---\r\nMine.\r\n"})
    push(("a", "me/e"))
    text, matter = card_of(hub, "me/e")
    assert "Mine." in text
    assert "coreset" in matter["tags"]
    compress(cli, tmp_path, "c", "--keep-ratio", 0.5)
    with (tmp_path / "c" / "README.md").open("a") as card:
        card.write("My notes.\n")
    for ratio in (0.1, 0.3):
        compress(cli, tmp_path, "c", "--keep-ratio", ratio, "--overwrite")
        text = (tmp_path / "c" / "README.md").read_text()
        assert "My notes." in text
        assert text.count("of the 50 rows**") == 1
    (tmp_path / "c" / "README.md").write_text(
        "---\na: [\n---\n" + text.replace("<!-- dq-multimodal: end -->", "")
    )
    cli("report", "c")
    text = (tmp_path / "c" / "README.md").read_text()
    assert "My notes." in text
    assert "a: [" in text
    assert "coreset" in read_matter(text.encode())["tags"]
    (tmp_path / "c" / "README.md").write_bytes(b"\xff\xfe")
    assert "must be text in UTF-8" in cli("report", "c", code=2).stderr
    assert (tmp_path / "c" / "README.md").read_bytes() == b"\xff\xfe"


def test_a_server_error_leaves_one_whole_revision(hub, cli, tmp_path):
    compress(cli, tmp_path, "a")
    compress(cli, tmp_path, "b", "--seed", 1)
    cli("push", "a", "me/d")
    before = hub.files("me/d")
    n_commits = len(hub.repos["me/d"].commits)

    for pattern, status, times in (("/commit/", 500, 2), ("info/lfs/objects/batch", 403, 1)):
        hub.fail_next("POST", pattern, status, times, Retry_After="0")
        done = cli("push", "b", "me/d", code=2)
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.stderr
        assert hub.files("me/d") == before
    hub.fail_next("POST", "/commit/", status="drop")
    cli("push", "b", "me/d", code=2)
    assert hub.files("me/d") == before

    hub.fail_next("PUT", ".*", status=500, times=1, Retry_After="0")
    cli("push", "b", "me/d")
    assert len(hub.repos["me/d"].commits) == n_commits + 1
    after = hub.files("me/d")
    for name in ("selection.parquet", "subset/part-00000.parquet"):
        assert after[name] == (tmp_path / "b" / name).read_bytes()
    assert b"seed: 1" in after["config.yaml"]
    assert not [name for name, data in after.items() if str(tmp_path).encode() in data]
    assert json.loads(after["manifest.json"])["complete"]

    cli("resample", "me/d", "--keep-ratio", 0.1, "--output-dir", "c")
    cli("push", "c", "me/d")
    assert b"keep_ratio: 0.1" in hub.files("me/d")["config.yaml"]


def test_a_lost_answer_is_made_good_by_trying_again(hub, cli, tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    arguments = ("compress", "d.parquet", "--method", "random", "--keep-ratio", 0.5)
    hub.fail_next("POST", "/commit/", status="lose")
    cli(*arguments, "--output-dir", "a", "--push-to-hub", "me/d", code=2)
    cli(*arguments, "--output-dir", "a", "--push-to-hub", "me/d")
    ours = [c for c in hub.repos["me/d"].commits if "config.yaml" in c.files]
    assert len(ours) == 1


def test_a_name_without_owner_is_the_users(hub, cli, tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    arguments = ("--method", "random", "--keep-ratio", 0.5, "--push-to-hub", "small")
    cli("compress", "d.parquet", *arguments)
    assert b'load_dataset("me/small"' in hub.files("me/small")["README.md"]


def test_two_pushes_at_once_do_not_mix(hub, cli, tmp_path):
    compress(cli, tmp_path, "a", "--push-to-hub", "me/d")
    other = hub.files("me/d") | {"config.yaml": b"other", "subset/part-00001.parquet": b"PAR1"}
    hub.fail_next("POST", "/commit/", lambda: hub.add_repo("me/d", other))
    done = compress(cli, tmp_path, "b", "--seed", 1, "--push-to-hub", "me/d", "--json", code=2)
    assert hub.files("me/d") == other
    assert "somebody wrote there at the same time" in done.stderr
    assert done.stderr.count("error: ") == 1
    said = json.loads(done.stdout)  # the run is there all the same
    assert (said["complete"], said["kept"], said["pushed"]) == (True, 10, None)


def test_a_busy_hub_is_asked_once_more_when_it_says(hub, cli, push, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dq_multimodal.hub.WAIT_SECONDS", 1)
    compress(cli, tmp_path, "a")
    for status, after, least in ((429, "2", 2), (503, "date", 1), (500, None, 1)):
        after = formatdate(time.time() + 3, usegmt=True) if after == "date" else after
        hub.fail_next("POST", "/commit/", status, **({"Retry_After": after} if after else {}))
        started = time.time()
        assert push(("a", f"me/d{status}"))[0].startswith("http")
        assert time.time() - started >= 0.9 * least
        assert f"the Hub failed ({status}): one more try in" in capsys.readouterr().err
        assert "config.yaml" in hub.files(f"me/d{status}")
    hub.fail_next("POST", "/commit/", 429, Retry_After="3600")
    hub.fail_next("POST", "/commit/", 503, times=2, Retry_After="0")
    hub.fail_next("POST", "validate-yaml", 400)
    unfit, long, twice = push(*[("a", name) for name in ("me/e", "me/e", "me/f")])
    assert unfit.startswith("error: cannot push to me/e: Invalid metadata")
    assert "asks to wait 3,600 s" in long
    assert "503" in twice
    hub.fail_next("POST", "/commit/", 503, times=2, Retry_After="0")
    done = cli("resample", "a", "--keep-ratio", 0.1, "--push-to-hub", "me/g", code=2)
    assert "kept     5 rows" in done.stdout
    assert "pushed" not in done.stdout
    assert done.stderr.count("error: ") == 1


def test_a_push_is_checked_before_the_work(hub, cli, push, tmp_path, monkeypatch):
    compress(cli, tmp_path, "a")
    hub.add_repo("me/theirs", {"data.csv": b"a"})
    hub.add_repo("me/public", {})
    hub.user = {
        "orgs": [{"name": "readers", "roleInOrg": "read"}, {"name": "team", "roleInOrg": "write"}]
    }
    refused = {
        "me/theirs": "holds other things",
        "a/b/c": "no Hub id OWNER/NAME",
        "not a name": "no Hub id OWNER/NAME",
        "stranger/d": "neither me",
        "readers/d": "only the role read",
    }
    for repo_id, message in [*refused.items()][:2]:
        for command in (("compress", "d.parquet", *DRAW), ("resample", "a", "--keep-ratio", 0.1)):
            given = ("--output-dir", "no", "--push-to-hub", repo_id)
            done = cli(*command, *given, code=2)
            assert message in done.stderr
            assert done.stdout == ""
            assert not (tmp_path / "no").exists()
    done = compress(cli, tmp_path, "no", "--push-to-hub", "me/public", "--private", code=2)
    assert "me/public is there already and public" in done.stderr
    for token, message in (
        ("read", "no right to write"),
        ("wrong", "401"),
        (None, "no token here"),
    ):
        given = ("no", "--push-to-hub", "me/d")
        hub.patch(monkeypatch, tmp_path, token)
        done = compress(cli, tmp_path, *given, code=2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    hub.patch(monkeypatch, tmp_path)
    assert not (tmp_path / "no").exists()
    assert set(hub.repos) == {"me/theirs", "me/public"}
    found = push(*[("a", repo_id) for repo_id in refused], ("a", "team/d"))
    for error, message in zip(found, refused.values(), strict=False):
        assert message in error
    assert "team/d/commit" in found[-1]
    scopes = [{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read"]}]
    rights = {"global": [], "scoped": scopes}
    token = {"accessToken": {"role": "fineGrained", "fineGrained": rights}}
    hub.user = {"auth": token}
    assert "no right to write" in push(("a", "me/new"))[0]
    scopes.append({"entity": {"type": "dataset", "name": "me/new"}, "permissions": ["repo.write"]})
    assert push(("a", "me/new"))[0].startswith("http")


@pytest.mark.parametrize(
    "stated",
    [
        {"license": "other", "license_name": "my-licence", "license_link": "LICENSE.md"},
        {"license": ["mit", "cc-by-4.0"]},
        {"license": "other", "license_name": "a|b [c]", "license_link": "https://x.y/z (1)"},
        {},
    ],
)
def test_the_licence_of_the_source_comes_whole(hub, cli, tmp_path, stated):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    source = f"---\n{yaml.safe_dump(stated)}---\n# Source\n".encode()
    data = (tmp_path / "d.parquet").read_bytes()
    commit = hub.add_repo("owner/src", {"README.md": source, "data/train-0.parquet": data})
    mine = b"---\nlicense: apache-2.0\nlicense_name: mine\n---\n"
    hub.add_repo("me/x", {"README.md": mine})
    given = (*DRAW, "--keep-ratio", 0.5, "--output-dir", "a", "--push-to-hub", "me/x")
    cli("compress", "owner/src", *given)
    text, matter = card_of(hub, "me/x")
    wanted = stated or {"license": "apache-2.0", "license_name": "mine"}
    assert {key: matter[key] for key in matter if key.startswith("license")} == wanted
    if stated.get("license_name") == "my-licence":
        assert f"/datasets/owner/src/blob/{commit}/LICENSE.md" in text


def test_names_are_escaped_and_no_path_of_this_machine_is_pushed(hub, cli, push, tmp_path):
    column = "a|b`c [x](http://e.v) <img src=x> *y* <!-- dq-multimodal: end -->\n# z"
    folder = tmp_path / "private place"
    folder.mkdir()
    name = "# - x: *y* [l](u) <b> | `c` $d$.parquet"
    labels = ["# one", "two|2", None, "two|2"] * 5
    Dataset.from_dict({column: labels, "text": ["t"] * 20}).to_parquet(folder / name)
    np.save(folder / "emb.npy", np.random.default_rng(0).normal(size=(20, 4)))
    given = (
        "--method",
        "dq",
        "--n-bins",
        2,
        "--ready-embeddings",
        folder / "emb.npy",
        "--output-dir",
        "a",
    )
    cli("compress", folder / name, "--label-column", column, *given)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["notes"] += [f"{folder}/m|odel does <b>not</b>\n# know", f"an empty {column}"]
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(seal(manifest)))
    push(("a", "me/d"))
    files = hub.files("me/d")
    for path, data in files.items():
        assert str(tmp_path).encode() not in data, path
        assert b"private place" not in data, path
    text, matter = card_of(hub, "me/d")
    assert matter["pretty_name"] == name.removesuffix(".parquet") + ", 20 % by dq"
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    heads = [tokens[k + 1].content for k, t in enumerate(tokens) if t.type == "heading_open"]
    assert len(heads) == len([h for h in body.splitlines() if h.startswith("#")])
    title = next(tokens[k + 1] for k, t in enumerate(tokens) if t.type == "heading_open")
    assert "".join(t.content for t in title.children) == matter["pretty_name"]
    assert {t.type for t in title.children} == {"text", "text_special"} & {
        t.type for t in title.children
    }
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert "<img" not in html.replace('<img src="figures/', "")
    assert "e.v" not in "".join(part.split('"')[0] for part in html.split('href="')[1:])
    assert html.count("dq-multimodal: end") == 3  # the marker, and the text of a cell and a note
    for row in (t for t in html.split("<tr>")[1:]):
        assert row.count("<t") in (2, 3, 4, 5, 6), row


def test_models_are_pushed_beside_nothing_else(hub, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    base = str(tmp_path / "private" / "base")
    config = json.dumps({"base_model_name_or_path": base})
    (model / "adapter_config.json").write_text(config)
    (model / "README.md").write_text(f"---\nbase_model: {base}\n---\n# Model of {base}\n")
    (model / "tokenizer_config.json").write_text(json.dumps({"name_or_path": base}))
    (model / "adapter_model.safetensors").write_bytes(b"weights")
    (model / "training_args.bin").write_bytes(b"pickle")
    hub.add_repo("models/me/card", {"README.md": b"# Mine"})
    hub.add_repo("models/me/model", {"config.json": b"{}", "README.md": b"# Mine"})
    for name in ("me/new", "me/new", "me/card"):
        assert "commit" in push_model(model, name)
    with pytest.raises(InputError, match="me/model holds other things than a model of dq-multim"):
        push_model(model, "me/model")
    files = hub.files("models/me/new")
    assert "training_args.bin" not in files
    assert files["adapter_model.safetensors"] == b"weights"
    assert "base_model: base\n" in files["README.md"].decode()
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    assert hub.files("models/me/card")["README.md"] == b"# Mine"
    assert set(hub.files("models/me/model")) == {"config.json", "README.md"}


@pytest.mark.parametrize(
    "head",
    [
        "\n".join(["a0: &a0 [x]", *(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 99))]),
        'n: !!int "-"\n',
        "when: 2001-99-99\n",
        "[" * 10_000,
        "- a\n- b\n",
    ],
)
def test_a_front_matter_that_does_harm_counts_as_text(head):
    card = read_card(f"---\n{head}\n---\nMine.\n")
    text = card.with_section({"license": "mit"}, "Ours.")
    assert text.startswith("---\nlicense: mit\n---\n") and "Mine." in text and head.strip() in text
    again = read_card(text)
    assert again.matter == {"license": "mit"} and again.with_section({}, "").count("Mine.") == 1
    left = again.without_section()
    assert head.strip() in left and "Mine." in left and "license" not in left


def test_a_pushed_folder_of_pictures_is_whole_wherever_it_is_put(hub, push, tmp_path):
    (tmp_path / "d").mkdir()
    for k in range(6):
        (tmp_path / "d" / f"{k}.png").write_bytes(save(picture((8, 8), seed=k)))
    run = dq_compress(tmp_path / "d", method="random", output_dir=tmp_path / "r", report=False)
    assert (run.path / "subset" / "kept_files.txt").is_file()
    push(("r", "me/pictures"))
    for name, data in hub.files("me/pictures").items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    assert verify(Run(tmp_path / "copy"))[-1].result == "passed"
