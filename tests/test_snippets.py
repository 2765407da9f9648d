"""Every snippet of the README and of docs/ runs as it stands there, but for names: models and collections are tiny.

Blocks of a page run in their order in one folder, where the files are that the page speaks of. What does not run as
it stands: `sh` marks what sets gradret up, which .ci/run runs; of `pip install` the extra's name is checked;
llama_cpp.server stands in for vLLM; SMALL's options keep the rest short. Commands of gradret run in this process, for
time, and processes that share a fit are forked. `json` blocks are parsed; blocks without a language are text.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DEFINED_SCALE, REPOSITORY, SAMPLE_FILE, TINY_QUERY
from forked import run_group
from test_large_encoders import make_tiny_decoder

from gradret import load_encoder, read_lists, write_lists
from gradret.cli import main

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
EVEN, ODD = (list(read_lists(SAMPLE_FILE))[start::2] for start in (1, 0))  # by their numbers, which begin at 1
LANGUAGES = ("bash", "python", "sh", "json", "bibtex", "")
SMALL = {  # what is put behind a command, for time
    "gradret gen": f"--length 30:150 --max-tokens 600 --scale {DEFINED_SCALE}",
    # That server holds to no length.
    "gradret gen --endpoint": f"--length 1:4000 --max-tokens 600 --scale {DEFINED_SCALE} --shard 1/6",
    "gradret fit": "--max-steps 2 --query-max-length 16 --document-max-length 16",
    "gradret bench quality": "--max-steps 1 --query-max-length 16 --document-max-length 16",
}


def read_blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block; all fences stand at the beginning of a line."""
    text = page.read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert text.count("```") == 2 * len(blocks)
    return blocks


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    """What stands for the names in snippets."""
    folder = tmp_path_factory.mktemp("names")
    decoder = make_tiny_decoder(folder / "decoder", "qwen3")
    collection = folder / "collection"
    write_lists(folder / "measured.jsonl", EVEN)
    arguments = ["export", str(folder / "measured.jsonl"), "--format", "beir", "--out", str(collection)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    (qrels,) = (collection / "qrels").glob("*.tsv")
    for split in ("train", "test"):
        if qrels.stem != split:
            shutil.copyfile(qrels, qrels.with_name(f"{split}.tsv"))
    return {
        "Qwen/Qwen3-0.6B-Base": str(decoder),
        "beir/scifact/train": f"{collection}:train",
        "beir/scifact/test": f"{collection}:test",
        "--dataset cranfield": f"--dataset {collection}",
        "'cranfield?": f"'{collection}?",
    }


def translate(line: str, names: dict[str, str]) -> str:
    """A command as it can be run here; empty for one that installs or serves."""
    if line.startswith("pip install"):
        (extra,) = re.findall(r"'\.\[(\w+)\]'", line)
        assert extra in metadata.metadata("gradret").get_all("Provides-Extra")
        return ""
    if line.startswith("vllm serve"):  # llama_cpp.server serves in its place
        return ""
    for name, here in names.items():
        line = line.replace(name, here)
    line = line.replace("--nproc-per-node 4", "--nproc-per-node 2")
    command = re.search(r"gradret (gen|fit|bench quality)", line)
    if command is None:
        return line
    if "gradret gen" in line and "--model" not in line and "--endpoint" not in line:
        line += f" --model {names['qwen2.5-7b-instruct-q4_k_m.gguf']}"
    if "gradret fit" in line and "--model" not in line:
        line += " --model start"
    kind = command.group() + " --endpoint" * ("gradret gen" in line and "--endpoint" in line)
    return f"{line} {SMALL[kind]}"


def run_bash(block: str, names: dict[str, str], folder: Path) -> None:
    lines = block.replace("\\\n", " ").splitlines()
    # What the page's earlier blocks, or the fixture, have left where this one begins anew.
    for out in re.findall(r"gradret fit .*--out (\S+)", "\n".join(lines)):
        shutil.rmtree(folder / out, ignore_errors=True)
    if "gradret gen" in block:
        for stale in folder.glob("lists.*"):
            stale.unlink()
    for line in filter(None, (translate(line.strip(), names) for line in lines)):
        code, printed = run_line(line, folder)
        assert code == 0, f"{line}\n{printed}"


def run_line(line: str, folder: Path) -> tuple[int, str]:
    """Exit code of a line, and what it printed."""
    words, cache = shlex.split(line), {"GRADRET_CACHE": str(folder / "cache")}
    if words[0] == "gradret" and not set(line) & set("|<>;$`"):
        result = CliRunner().invoke(main, words[1:], env=cache)
        return result.exit_code, result.output
    if words[0] == "torchrun" and "fit" in words:
        result = run_group(2, words[words.index("-m") :])
        return result.returncode, result.stderr
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | cache | {"PATH": scripts + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], env=environment, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stderr


@pytest.fixture
def folder(tmp_path, tiny_encoder, monkeypatch):
    """Where a page's snippets run: the files they name, and `start`, a model to begin with."""
    write_lists(tmp_path / "lists.jsonl", ODD)
    write_lists(tmp_path / "dev.jsonl", EVEN[:8])
    (tmp_path / "queries.tsv").write_text("".join(f"{i}\t{TINY_QUERY.format(i)}\n" for i in range(6)))
    load_encoder(str(tiny_encoder)).save(tmp_path / "start")
    (tmp_path / "graded").mkdir()
    write_lists(tmp_path / "graded" / "cranfield.jsonl", ODD[:24])
    write_lists(tmp_path / "graded" / "scifact.jsonl", ODD[24:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_the_snippets_of_a_page_run(page, folder, names, request):
    blocks = read_blocks(page)
    assert blocks and {language for language, _ in blocks} <= {*LANGUAGES}
    text = "".join(block for language, block in blocks if language == "bash")
    if "gradret gen" in text:
        pytest.importorskip("llama_cpp.server.app")
        names = names | {"http://localhost:8000/v1": request.getfixturevalue("real_server") + "/v1"}
        names |= {"qwen2.5-7b-instruct-q4_k_m.gguf": str(request.getfixturevalue("tiny_gguf"))}
    for language, block in blocks:
        if language == "bash":
            if "python -m benchmarks." in block:  # which reads what is committed
                shutil.copytree(REPOSITORY / "benchmarks", "benchmarks", dirs_exist_ok=True)
            run_bash(block, names, folder)
        elif language == "json":
            json.loads(block)
        elif language == "python":
            code = block.replace("sentence-transformers/all-MiniLM-L6-v2", "start")
            code = code.replace("FitSettings(data", 'FitSettings(model="start", data')
            exec(compile(code, page.name, "exec"), {"__name__": "__main__"})
    if page.name == "sentence-transformers.md":  # what it trains has learned something
        before, after = (load_encoder(name).encode(["why do cats purr"]) for name in ("start", "model"))
        assert not np.allclose(before, after, atol=1e-4)
