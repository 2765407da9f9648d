"""The linter's and formatter's word, and what the documents promise."""

import fnmatch
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_ruff(arguments):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "."], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_modules_stay_small():
    long = {p.name: n for p in (REPOSITORY / "gradret").rglob("*.py") if (n := len(p.read_text().splitlines())) > 300}
    assert long == {}


def test_the_map_of_modules_is_whole():
    rows = [line for line in (REPOSITORY / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`([a-z0-9_*]+)`", row.split("|")[2])]
    modules = {p.stem for p in (REPOSITORY / "gradret").glob("*.py")} - {"__init__", "__main__"}
    assert [name for name in named if not fnmatch.filter(modules, name)] == []
    assert [module for module in modules if not any(fnmatch.fnmatch(module, name) for name in named)] == []


def test_the_readme_opens_with_its_two_commands():
    blocks = (REPOSITORY / "README.md").read_text().split("```")[1::2]
    assert blocks[0].startswith("sh\n") and "gradret bench" in blocks[0]
    assert blocks[1].startswith("sh\n") and "pytest" in blocks[1]


@pytest.mark.parametrize(
    ("script", "results", "lines", "page"),
    [
        (["loss"], "loss-cpu", 30, "docs/loss.md"),
        (["gen"], "gen-cpu", 5, "docs/generate.md"),
        (["fit"], "fit-cpu", 14, "docs/training.md"),
        (["quality"], "quality/quality", 55, "README.md"),
        (["quality", "R@100"], "quality/quality", 33, "benchmarks/README.md"),
        (["quality", "RR@10"], "quality/quality", 33, "benchmarks/README.md"),
        (["ablations"], "quality/quality", 66, "benchmarks/README.md"),
    ],
)
def test_the_tables_of_the_documents_are_the_results(script, results, lines, page):
    benchmarks = REPOSITORY / "benchmarks"
    name, *measure = script
    command = [sys.executable, benchmarks / f"{name}_table.py", benchmarks / "results" / f"{results}.json", *measure]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert len(table.splitlines()) == lines
    text = (REPOSITORY / page).read_text()
    assert [part for part in table.split("\n\n") if part not in text] == []
