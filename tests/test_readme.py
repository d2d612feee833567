"""The README tells the truth: every command in it runs, and its tree is the tree."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from eaftflow.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ eaftflow (.*)$", README, re.MULTILINE)


def test_the_run_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in order, in one folder, on the bundled model and a few thousand tokens."""
    monkeypatch.chdir(tmp_path)
    stages = [shlex.split(command)[0] for command in COMMANDS]
    assert stages == ["capture", "rescore", "prune"]
    for command in COMMANDS:
        arguments = shlex.split(command)
        if arguments[0] == "capture":
            arguments += ["--tokens", "2000", "--seq-len", "512"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    [pruned] = Path("pruned").iterdir()
    assert (pruned / "model.safetensors").stat().st_size < 17_000_000


def test_every_option_in_the_readme_exists() -> None:
    known = {
        option for command in main.commands.values() for p in command.params for option in p.opts
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_the_tree_names_every_module() -> None:
    tree = README.partition("## The tree")[2]
    modules = {path.name for path in (ROOT / "eaftflow").glob("*.py")}
    assert set(re.findall(r"^ +(\w+\.py) ", tree, re.MULTILINE)) == {
        name for name in modules if not name.startswith("__")
    }
