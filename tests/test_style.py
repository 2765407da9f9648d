"""The linter's and formatter's word, and what the documents promise."""

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
