"""README.md and docs/*.md say what is there: their tables, commands, files and links."""

import re
from functools import cache
from pathlib import Path

import pytest
import readme
from launching import launch

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
ALL = "\n".join(PAGES.values())
RESULTS = PAGES[ROOT / "docs" / "results.md"]
BLOCKS = re.findall(r"```bash\n(.*?)```", ALL, re.DOTALL)
COMMANDS = [
    *(
        line.split("#")[0].strip()
        for block in BLOCKS
        for line in block.replace("\\\n", " ").splitlines()
    ),
    *(
        " ".join(text.split())
        for text in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", ALL, flags=re.DOTALL))
        if re.match(r"(python|accelerate launch|make|dq-multimodal) ", text)
    ),
]


def test_tables_are_those_of_the_results_files():
    assert set(readme.PAGES) == set(PAGES)
    for text in PAGES.values():
        assert readme.render(text) == text, "run python eval/readme.py"
    marks = re.findall(r"<!-- (\w+): (\S+) -->", ALL)
    assert {kind for kind, _ in marks} - {*readme.CONDENSED} == {*readme.TABLES, "bench"}
    assert ALL.count("<!-- end -->") == sum(kind == "bench" for kind, _ in marks)
    shown = {ROOT / file for _, file in marks}
    assert set((ROOT / "eval" / "results").glob("*.json")) <= shown


def test_a_number_that_is_not_of_its_file_is_found():
    for page, text in PAGES.items():
        first_cells = r"(<!-- \w+: \S+ -->\n(?:(?!<!--).*\n)*?\| --- .*\n\| )"
        changed = re.sub(first_cells, r"\g<1>7", text)
        has_tables = "| --- |" in text and "<!-- " in text
        assert (changed != text) == has_tables, page
        assert readme.render(changed) == text, page


@cache
def help_of(script, *command):
    return launch(script, *command, "--help").stdout


@pytest.mark.parametrize(
    "shown", sorted({c for c in COMMANDS if c.startswith("dq-multimodal ") and "--" in c})
)
def test_flags_of_the_command_line_exist(shown, command):
    name = shown.split()[1]
    known = command(ROOT, *([name] if name != "--help" else []), "--help").stdout
    for flag in re.findall(r"--[a-z-]+", shown):
        assert flag in known


SCRIPTS = sorted({s for c in COMMANDS for s in re.findall(r"(?:recipes|eval)/\w+\.py", c)})


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_the_scripts_exist(script):
    known = help_of(script)
    for command in (c for c in COMMANDS if script in c):
        rest = command.split(script)[1]
        if script == "eval/bench.py":
            known = help_of(script, rest.split()[0])
        for flag in re.findall(r"--[\w-]+", rest):
            assert flag in known
        for path in re.findall(r"recipes/configs/\S+\.yaml", command):
            assert (ROOT / path).is_file()


def test_suites_of_the_commands_exist():
    suites = re.findall(r"eval/bench\.py (?:prepare|run|table) (\S+)", " ".join(COMMANDS))
    assert suites
    for name in set(suites) - {"SUITE", "mine.yaml"}:
        assert (ROOT / "eval" / "suites" / f"{name}.yaml").is_file()


def test_the_table_of_suites_names_all_and_which_have_results():
    said = r"below|none yet|in \[.+\]\((\w+\.md)\)"
    shown = re.findall(rf"^\| `(\w+)` \| .* \| ({said}) \|$", RESULTS, re.MULTILINE)
    suites = {path.stem for path in (ROOT / "eval" / "suites").glob("*.yaml")}
    assert {name for name, *_ in shown} == suites and len(shown) == len(suites)
    for name, said, page in shown:
        text = (ROOT / "docs" / page).read_text() if page else RESULTS
        file = f"eval/results/{name}.jsonl"
        assert (said != "none yet") == (f": {file} -->" in text)
        assert said != "none yet" or not (ROOT / file).exists()


def test_differences_that_the_text_tells_are_in_a_table():
    text = "\n".join(line for line in RESULTS.splitlines() if line[:1] != "|")
    told = re.findall(r"(?<![\w.])[+-]\d+\.\d\d\b", text)
    assert len(told) >= 5
    for number in told:
        assert re.search(rf"^\|.* {re.escape(number)} [\[(]", RESULTS, re.MULTILINE), number


def test_the_suite_of_ones_own_has_keys_that_are_read(tmp_path):
    from harness.prepare import TASK
    from harness.selections import check_selections
    from harness.suite import read_suite
    from harness.texts import TEST_KEYS

    (example,) = re.findall(r"```yaml\n(decides:.*?)```", RESULTS, re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(example)
    suite = read_suite(str(path))
    tasks = {cell.task for cell in suite.cells}
    assert {suite.tasks[task]["kind"] for task in tasks} == {"image", "text"}
    for task in tasks:
        spec = suite.tasks[task]
        assert set(spec) <= TASK[spec["kind"]]
        assert all(set(test) <= TEST_KEYS for test in spec.get("tests", {}).values())
    check_selections(suite.selections)  # refuses strange options
    used = {"text": set(suite.tasks["dolly"]["models"]), "probe": {"logistic regression"}}
    for cell in suite.cells:
        trainer = suite.settings[cell.protocol]["trainer"]
        assert cell.net in used.get(trainer, {"resnet18"})
    assert {cell.selection for cell in suite.cells} == set(suite.selections)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
    assert targets >= {"demo", "demo-images", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not link.startswith("https://"):
            assert (page.parent / link).exists(), link


def test_files_that_are_named_exist():
    text = re.sub(r"runs/\S+", "", ALL)
    names = re.findall(r"`((?:eval|recipes|tests|docs|dq_multimodal)/[\w./-]+)", text)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name


def test_every_page_is_linked_from_the_index_and_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if page.parent != ROOT:
            assert page.stem == "index" or f"]({page.name})" in PAGES[ROOT / "docs" / "index.md"]
            assert f": {page.name}\n" in site


def test_the_map_names_every_module():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", ALL, re.DOTALL).group(1)
    for path in (ROOT / "dq_multimodal").iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            assert path.name in tree


def test_python_examples_use_names_that_exist():
    import dq_multimodal

    for block in re.findall(r"```python\n(.*?)```", ALL, re.DOTALL):
        compile(block, "README.md", "exec")
        for names in re.findall(r"from dq_multimodal import (.*)", block):
            for name in names.split(", "):
                assert hasattr(dq_multimodal, name)
        for name in re.findall(r"\brun\.(\w+)", block):
            assert hasattr(dq_multimodal.Run, name)
    assert all(hasattr(dq_multimodal, name) for name in dq_multimodal.__all__)
