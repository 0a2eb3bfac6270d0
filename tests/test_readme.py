"""The commands of the README and of docs/ parse, and those of the README that need nothing from outside run."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# what makes a command of the README a matter of seconds
SMALL = {
    "data": ["--rooms", "8"],
    "train_wm": ["--steps", "2", "--eval-contexts", "1"],
    "train_sft": ["--see-steps", "1", "--steps", "1"],
    "train_rl": "--steps 1 --questions 2 --group 2 --direct-rollouts 1 --eval-questions 2".split(),
    "evaluate": ["--limit", "4"],
    "world_model": [],
    "policy": ["--max-new-tokens", "8"],
}


def commands_of(page):
    """Every Python command in the code blocks of a page, its comment behind it."""
    blocks = re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(python|torchrun)\b", line)]


def module_and_flags(command):
    """The module that a command runs, and the flags that it is given."""
    words = shlex.split(command, comments=True)
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script is not None:
        return words[script].removesuffix(".py").replace("/", "."), words[script + 1 :]
    start = words.index("-m")
    name, flags = words[start + 1], words[start + 2 :]
    if name == "experiments":
        return f"experiments.{flags[0]}", flags[1:]
    return {"bench": "bench.__main__"}.get(name, name), flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    for command in commands_of(page):
        name, flags = module_and_flags(command)
        module = importlib.import_module(name)
        if hasattr(module, "parse_args"):  # tests/bagel_parity.py takes a folder and no flag
            module.parse_args(flags)


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in commands_of(PAGES[0]):
        if " needs " in command or "--interactive" in command:  # that one: tests/extras
            continue
        name, flags = module_and_flags(command)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, *SMALL[name]])
        if name in ("world_model", "policy"):
            pictures = sorted((tmp_path / "out/data").rglob("*.png"))
            for letter, picture in zip("abcd", pictures, strict=False):
                (tmp_path / f"{letter}.png").write_bytes(picture.read_bytes())
        importlib.import_module(name).main()
        ran.append(name)
    assert set(ran) == set(SMALL)
    for made in ("out/wm", "out/sft", "out/phase1", "out/phase2", "out/eval/rooms", "view.png"):
        assert (tmp_path / made).exists(), made
