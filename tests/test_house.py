"""The house: the core runs without its extras, and what may import what. `pytest tests/test_house.py`"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    "data world_model policy rewards train_wm train_sft train_rl evaluate experiments.demo".split()
)
CORE = [ROOT / f"{name}.py" for name in STAGES if "." not in name] + sorted(ROOT.glob("lib/*.py"))
EXTRA_PACKAGES = ("matplotlib", "pyarrow", "cv2")


@pytest.fixture(scope="module")
def core_alone(tmp_path_factory):
    """A copy of the project without extras/ and the tests of extras."""
    copy = tmp_path_factory.mktemp("core")
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, copy)
    tests_of_all = ("house", "readme", "one_step", "project")
    skip = shutil.ignore_patterns(
        "__pycache__", "extras", *(f"test_{name}.py" for name in tests_of_all)
    )
    for folder in ("lib", "experiments", "bench", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    return copy


def run(folder, *command, seconds=300):
    """A command of Python in a folder -> its output; an assertion with its end if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_core_imports_with_its_eight_packages_alone(core_alone):
    """matplotlib, pyarrow and OpenCV are extras, like all of extras/."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in EXTRA_PACKAGES)
    modules = [*STAGES, *(f"lib.{file.stem}" for file in sorted(ROOT.glob("lib/*.py")))]
    run(core_alone, "-c", f"import sys; {blocked}import {', '.join(modules)}")


@pytest.mark.slow
def test_the_cores_tests_pass_without_extras(core_alone):
    output = run(core_alone, "-m", "pytest", "-q", "-x", "-m", "not slow", "tests")
    assert " passed" in output


@pytest.mark.slow
def test_a_flag_of_extras_is_a_sentence_without_them(core_alone):
    command = [sys.executable, "world_model.py", "--interactive", "--model", "."]
    done = subprocess.run(command, cwd=core_alone, capture_output=True, text=True, timeout=300)
    assert done.returncode and "needs extras/" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_short_demo_runs_to_its_table_without_extras(core_alone):
    output = run(core_alone, "-m", "experiments", "demo", "--quick")
    assert "agentic" in output and (core_alone / "out" / "demo" / "results.json").exists()


def imports_of(path):
    """(module, inside a function) of every import of a file."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, inside))
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            visit(child, inside or function)

    visit(ast.parse(path.read_text()), False)
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_files_name_extras_only_inside_functions(path):
    for module, inside in imports_of(path):
        top = module.split(".")[0]
        assert top not in ("experiments", "bench", "tests"), module
        assert inside or top != "extras", module


@pytest.mark.parametrize("path", sorted(ROOT.glob("lib/*.py")), ids=lambda path: path.name)
def test_lib_imports_no_stage(path):
    for module, inside in imports_of(path):
        assert inside or module.split(".")[0] not in STAGES, module


def test_lib_is_flat_and_its_modules_are_small():
    files = sorted(ROOT.glob("lib/**/*.py"))
    assert len(files) <= 20 and all(file.parent.name == "lib" for file in files)
    for file in files:
        assert file.name == "bagel.py" or len(file.read_text().splitlines()) <= 300, file.name


def test_whatever_there_is_is_caught_in_two_places_only():
    """By the decoder of pictures, and where tokenizers are read, which raise bare Exceptions.

    Elsewhere a slip would pass for a broken file, or in silence.
    """
    found = []
    for folder in (".", "lib", "extras", "experiments", "bench"):
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py"):
            broad = re.findall(r"except(?:\s*:|.*\b(?:Base)?Exception\b)", path.read_text())
            found += [path.name] * len(broad)
    assert sorted(found) == ["bagel_files.py", "images.py"]


def test_nothing_outside_the_tests_imports_them():
    names = {file.stem for file in (ROOT / "tests").glob("*.py")} | {"tests"}
    for folder in (".", "lib", "extras", "experiments", "bench"):
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py"):
            for module, _ in imports_of(path):
                assert module.split(".")[0] not in names, (path, module)


def test_one_module_opens_pictures():
    for folder in (".", "lib", "extras", "experiments"):
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py"):
            text = path.read_text()
            if path.name != "images.py":
                for way in ("Image.open(", "imread(", "imageio", "VideoCapture("):
                    assert way not in text, (path, way)
