"""The linter's and formatter's word, and what the documents promise."""

import json
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from gradret.bench.quality import format_quality


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


def test_the_documents_name_what_is_there():
    """Links, anchors and paths of files in the repository."""
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "benchmarks" / "README.md"]
    missing = []
    for page in pages:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if path.startswith("http"):
                continue
            file = page.parent / path if path else page
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if anchor and file.is_file() else []
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            if not file.exists() or (anchor and anchor not in slugs):
                missing.append(f"{page.name}: {target}")
        for path in re.findall(r"`((?:tests|csrc|benchmarks|docs)/[\w/.-]+\.\w+)`", text):
            if not (REPOSITORY / path).exists():
                missing.append(f"{page.name}: {path}")
    assert missing == []


def test_the_readme_shows_the_committed_sample():
    document = json.loads((REPOSITORY / "benchmarks" / "results" / "sample-cpu.json").read_text())
    assert format_quality(document) in (REPOSITORY / "README.md").read_text()
