"""Pages, citation and workflow say what is true of this repository. `pytest tests/test_project.py`"""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    rooms = "lib|extras|experiments|bench|tests|docs"
    for name in re.findall(
        rf"`((?:{rooms})/[a-z\d_./-]+\.(?:py|md|html|cff|yml))`", page.read_text()
    ):
        assert (ROOT / name).exists(), name


def test_the_citation_names_every_paper_that_the_readme_does():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    cited = {reference["url"].split("/")[-1] for reference in citation["references"]}
    assert cited >= set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "README.md").read_text()))
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_the_workflow_runs_what_ci_runs_on_every_python():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]
    oldest = re.search(r'target-version = "py3(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    pythons = job["strategy"]["matrix"]["python"]
    assert pythons[0] == f"3.{oldest}" and len(pythons) == 3
    assert job["steps"][-1]["run"] == ".ci/run"
