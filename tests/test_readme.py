"""The README says what is there: its tables, commands, files and links."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from eval_scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def test_tables_are_those_of_the_results_files():
    module = load_script("readme")
    assert module.render(README) == README, "run python eval/readme.py"
    kinds = re.findall(r"<!-- (\w+): ", README)
    assert set(kinds) == set(module.TABLES)
    assert len(kinds) == 19


def help_of(command):
    done = subprocess.run(
        [sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dq-multimodal")])
def test_flags_of_the_command_line_exist(command):
    words = command.split()
    known = help_of(["-m", "dq_multimodal.cli", words[1]])
    for flag in re.findall(r"--[a-z-]+", command):
        assert flag in known


SCRIPTS = sorted({s for c in COMMANDS for s in re.findall(r"(?:recipes|eval)/\w+\.py", c)})


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_the_scripts_exist(script):
    known = help_of([script])
    for command in (c for c in COMMANDS if script in c):
        for flag in re.findall(r"--\w+", command.split(script)[1]):
            assert flag in known
        for path in re.findall(r"recipes/configs/\S+\.yaml", command):
            assert (ROOT / path).is_file()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_map_names_every_module():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    for path in (ROOT / "dq_multimodal").iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            assert path.name in tree


def test_python_examples_use_names_that_exist():
    import dq_multimodal

    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")
        for names in re.findall(r"from dq_multimodal import (.*)", block):
            for name in names.split(", "):
                assert hasattr(dq_multimodal, name)
        for name in re.findall(r"\brun\.(\w+)", block):
            assert hasattr(dq_multimodal.Run, name)
    assert all(hasattr(dq_multimodal, name) for name in dq_multimodal.__all__)
