"""The time of a step by parts: what is counted where, and what the command writes."""

import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from conftest import make_tiny_encoder

from benchmarks import tables
from benchmarks.speed import fit_rivals, step


def test_a_part_inside_another_is_counted_once(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(step.time, "perf_counter", lambda: clock.now)
    parts = step.Parts(torch.device("cpu"))

    def wait(seconds):
        clock.now += seconds

    score = parts.timed(wait, "score")

    def compute():
        score(2.0)
        wait(3.0)
        score(5.0)

    parts.timed(lambda: (parts.timed(compute, lambda: "loss")(), wait(1.0)), "backward")()
    assert parts.seconds == dict.fromkeys(step.PARTS, 0.0) | {"score": 7.0, "loss": 3.0, "backward": 1.0}


@pytest.mark.nightly
def test_the_command_writes_both_sides_and_the_parts(tmp_path, monkeypatch):
    for name in fit_rivals.PACKAGES:
        pytest.importorskip(name)
    for name, value in {"PASSAGES": 32, "ROUNDS": 1, "LARGEST_PLAIN": 4, "LARGEST_REPEATED": 4}.items():
        monkeypatch.setattr(step, name, value)
    model = make_tiny_encoder(tmp_path / "tiny", dropout=0.0)
    arguments = ["--lists", "4,8", "--model", str(model), "--layers", "1", "--chunk", "4", "--out", str(tmp_path)]
    result = CliRunner().invoke(step.main, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "step.json").read_text())
    sides = ["sentence-transformers, cached", "gradret, cached"]
    plain = ["sentence-transformers", "gradret"]
    assert [(row["lists"], row["row"]) for row in document["rows"]] == [
        *((4, name) for name in sides + plain),
        *((8, name) for name in sides),
    ]
    ours = [row for row in document["rows"] if row["row"].startswith("gradret")]
    assert all(min(row["parts_ms"].values()) > 0 and list(row["parts_ms"]) == [*step.PARTS] for row in ours)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert "4 lists" in "\n".join(tables.write_step(document))
