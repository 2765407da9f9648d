"""`python -m benchmarks.speed.gen` on a tiny model."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_tiny_gguf

from benchmarks.speed.gen import main
from benchmarks.speed.random_gguf import Size, make_vocabulary

pytest.importorskip("llama_cpp")
FEW = ["--queries", "5", "--loop-queries", "1", "--repeats", "2", "--max-tokens", "12", "--sequences", "3"]


def run(tmp_path, *arguments):
    result = CliRunner().invoke(main, ["--out", str(tmp_path), "--threads", "2", *arguments])
    assert result.exit_code == 0, result.output
    return result


def list_rounds(speeds: dict[str, float]) -> tuple[float, float]:
    """The slower and the faster of two rounds; percentiles lie between the two in proportion."""
    return (4 * speeds["p20"] - speeds["p80"]) / 3, (4 * speeds["p80"] - speeds["p20"]) / 3


def test_both_sides_are_measured_under_each_condition(tmp_path, tiny_gguf):
    result = run(tmp_path, "--model", str(tiny_gguf), *FEW)
    found = json.loads((tmp_path / "gen.json").read_text())
    conditions = ["without grammar", "with grammar", "beside a busy process"]
    assert [(row["system"], row["condition"]) for row in found["rows"]] == [
        (system, name) for name in conditions for system in ("create_chat_completion loop", "gradret")
    ]
    assert all(0 < row["tokens_per_s"]["p20"] <= row["tokens_per_s"]["p80"] for row in found["rows"])
    loop, ours = (np.array(list_rounds(row["tokens_per_s"])) for row in found["rows"][2:4])
    medians = [np.mean(ours / loop), np.mean(ours[::-1] / loop)]  # which speed was which round's is not told
    assert any(
        found["ratios"]["with grammar"]["median"] == pytest.approx(median, rel=0.01, abs=0.01) for median in medians
    )
    assert list(found["ratios"]) == conditions
    assert (found["sequences"], found["threads"], found["max_tokens"], found["repeats"]) == (3, 2, 12, 2)
    assert found["model"].startswith("random weights, 2 layers of 64") and found["prompt_tokens"]["plan"] > 100
    assert "torch" in found["versions"] and "llama_cpp_python" in found["versions"]
    assert "gradret / loop" in result.stdout
    assert result.stderr.count("round 2 of 2") == 6


def test_without_a_model_one_with_random_weights_is_written(tmp_path, monkeypatch):
    tiny = make_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("benchmarks.speed.gen.write_random_gguf", lambda path, words: shutil.copy(tiny, path))
    assert json.loads(run(tmp_path, *FEW, "--json").stdout)["model"].startswith("random weights, 2 layers of 64")


def test_a_vocabulary_of_qwens_size():
    tokens, merges = make_vocabulary(Size().vocabulary, ["cat", "car"])
    assert len(tokens) == len(set(tokens)) == 151_936
    assert {"Ġcat", "Ġcar", "Ġca", "abcd", "<|im_end|>"} <= set(tokens)
    assert merges[:4] == ["Ġ c", "Ġc a", "Ġca t", "Ġca r"]
    with pytest.raises(ValueError, match="a vocabulary of 300 has no room for 30 words"):
        make_vocabulary(300, [f"{a}word" for a in "abcdefghijklmnopqrstuvwxyzabcd"])
