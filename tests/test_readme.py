"""The README's commands parse."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [
        line
        for line in lines
        if re.match(r"(python|torchrun)\b.*(\w+\.py| -m (bench|experiments))", line)
    ]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_parse(command):
    words = shlex.split(command)
    if words[1] == "-m":  # python -m bench wm, python -m experiments policy
        name, rest = words[2], words[3:]
        if name == "experiments":
            name, rest = f"experiments.{rest[0]}", rest[1:]
        module = importlib.import_module("bench.__main__" if name == "bench" else name)
    else:
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        module = importlib.import_module(words[place].removesuffix(".py").replace("/", "."))
        rest = words[place + 1 :]
    module.parse_args(rest)


def test_the_readme_has_commands():
    assert len(readme_commands()) >= 10
