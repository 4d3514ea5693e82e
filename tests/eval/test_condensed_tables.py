"""Tables of condensed sets from results lines that are made here."""

import math
import re

import condensed_tables
import pytest
import readme

OPTIONS = {
    "random": {"method": "random"},
    "dm": {"condense": "dm"},
    "krr": {"condense": "krr", "learn_labels": True},
    "krr as hard": {"condense": "krr", "learn_labels": True, "use_soft": False},
    "random, bytes": {"method": "random", "same_bytes_as": "dm"},
    "dc": {"condense": "dc", "images_per_class": 10},
    "mdc": {"condense": "dc", "images_per_class": 10, "multisize": True},
}
ACCURACIES = {"random": 60, "dm": 80, "krr": 82, "krr as hard": 70, "random, bytes": 62}
ACCURACIES |= {"dc": 50, "mdc": 75}


def line(selection, keep, draw, value, rows=10, size=1000, net="convnet"):
    return {
        "task": "digits",
        "selection": selection,
        "options": OPTIONS[selection],
        "keep": keep,
        "rows": rows,
        "bytes": size,
        "labels": "soft" if selection == "krr" else "hard",
        "net": net,
        "draw": draw,
        "seed": 0,
        "metrics": {"test accuracy": {"last": value}},
        "device": {"type": "cpu", "name": "a CPU"},
    }


def lines():
    found = [line("random", 1.0, draw, 95 + draw) for draw in (0, 1)]
    for n_images in (1, 10):
        for name, value in ACCURACIES.items():
            sized = {"rows": 12 if "bytes" in name else 10, "size": 950 if "bytes" in name else 999}
            found += [
                line(name, f"{n_images} a class", draw, value + n_images + 2 * draw, **sized)
                for draw in (0, 1)
            ]
    found += [line(name, "2 a class", 0, ACCURACIES[name]) for name in ("random", "dc", "mdc")]
    return found


def cells(table):
    head, _, *rows = ([x.strip() for x in row.strip("|").split("|")] for row in table.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_accuracies_stand_beside_their_differences_to_random():
    rows = {row["selection"]: row for row in cells(condensed_tables.accuracies(lines()))}
    assert list(rows) == ["random", "dm", "krr", "krr as hard"]
    assert (
        rows["random"]["1 a class"].startswith("62.0 [")
        and not rows["random"]["1 a class, to random"]
    )
    assert rows["dm"]["10 a class, to random"].split()[0] == "+20.0"
    assert not any(key.startswith("2 a class") for key in rows["dm"])


def test_prefixes_are_compared_draw_by_draw():
    rows = {row["images a class"]: row for row in cells(condensed_tables.prefixes(lines()))}
    assert list(rows) == ["1", "2", "10", "mean"]
    assert {row["run"] for row in rows.values()} == {"dc"}
    assert rows["10"]["learnable - plain"] == "+25.0 [+25.0, +25.0]"
    assert rows["2"]["learnable - plain"] == "+25.0" and rows["2"]["random"] == "60.0"
    assert rows["mean"]["learnable"] == f"{(77 + 75 + 86) / 3:.1f}"


def test_stored_bytes_are_those_of_the_lines():
    rows = {row["selection"]: row for row in cells(condensed_tables.stored(lines()))}
    assert list(rows) == ["random", "dm", "krr", "krr as hard", "random, bytes"]
    own = rows["random, bytes"]
    assert (own["1 a class: images"], own["1 a class: bytes"]) == ("12", "950")
    assert own["10 a class: accuracy"].startswith("73.0 [")


def test_the_scores_are_those_of_the_paper():
    rows = cells(condensed_tables.scores(lines()))
    assert [(row["images a class"], row["selection"]) for row in rows] == [
        (n, name) for n in ("1", "10") for name in ("dm", "krr")
    ]
    of_krr = rows[1]  # 95.5 on all rows; by classes 71 and 73; by its labels 83, 85; random 61, 63
    assert of_krr["IOR"].startswith("22.0 [")
    each = [
        (math.exp(0.5 * 0.22 - 0.5 * hlr) - 1 / math.e) / (math.e - 1 / math.e)
        for hlr in (0.245, 0.225)
    ]
    assert of_krr["LRS"].startswith(f"{sum(each) / 2:.3f} [")


def test_the_scores_of_the_package_have_a_row_each():
    scores = [{"hlr": 6.0 + k, "ior": 4.0, "lrs": 0.25} for k in (0, 2)]
    lines = [{"selection": "dm", "images_per_class": 10, "scores": scores}]
    lines.append({"selection": "dc", "images_per_class": 10, "scores": scores[:1]})
    rows = cells(condensed_tables.package_scores({"lines": lines}))
    assert rows[0]["HLR"].startswith("7.0 [") and rows[0]["LRS"].startswith("0.250 [")
    assert rows[1] == {
        "images a class": "10",
        "selection": "dc",
        "HLR": "6.0",
        "IOR": "4.0",
        "LRS": "0.250",
    }


def test_later_lines_count_and_other_nets_stand_apart():
    again = [*lines(), line("dm", "1 a class", 0, 90), line("dm", "1 a class", 0, 70, net="resnet")]
    rows = cells(condensed_tables.accuracies(again))
    found = {(row["data, net"], row["selection"]): row["1 a class"] for row in rows}
    assert found["digits, convnet", "dm"].startswith("86.5 [")  # (90 + 83) / 2
    assert found["digits, resnet", "dm"] == "70.0"
    assert len([row for row in rows if row["data, net"] == "digits, resnet"]) == 1


@pytest.mark.parametrize("kind", ["condensed", "prefixes", "stored", "ranking"])
def test_marks_of_results_lines_are_filled(tmp_path, monkeypatch, kind):
    import json

    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines())))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "read_lines", lambda path: [*map(json.loads, path.open())])
    text = f"Before.\n\n<!-- {kind}: some.jsonl -->\n\nAfter.\n"
    made = readme.render(text)
    assert re.search(r"-->\n\n\| .*\n\| ---.*\n\| .*\n", made) and made.endswith("\n\nAfter.\n")
    assert readme.render(made) == made
