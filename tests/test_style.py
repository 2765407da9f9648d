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
