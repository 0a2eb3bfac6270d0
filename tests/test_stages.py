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
    "evidence",
    "evidence_policy",
    "evidence_world2vlm",
    "demo",
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
    return [line for line in lines if re.match(r"(python|torchrun)\b.*\w+\.py", line)]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_parse(command):
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[place].removesuffix(".py").replace("/", "."))
    module.parse_args(words[place + 1 :])


def test_the_readme_has_commands():
    assert len(readme_commands()) >= 10
