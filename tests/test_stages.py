"""What every stage promises: it imports with the core packages alone, and the README's commands parse."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    "data",
    "world_model",
    "policy",
    "rewards",
    "train_wm",
    "train_sft",
    "train_rl",
    "evaluate",
    "experiments.simulator",
    "experiments.policy",
    "experiments.world2vlm",
    "experiments.demo",
)


def test_every_stage_imports_with_the_core_packages_alone():
    """matplotlib and pyarrow are extras: with both blocked, all stages and all of lib/ import."""
    modules = [*STAGES, *(f"lib.{file.stem}" for file in sorted((ROOT / "lib").glob("*.py")))]
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['pyarrow'] = None; sys.path.insert(0, '.')\n"
        + "\n".join(f"import {name}" for name in modules)
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


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
