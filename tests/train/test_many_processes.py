"""`gradret fit` and `bench eval` in several processes: what is written, and how runs end and go on.

torchrun itself starts those of which one is lost, or which are stopped; the others are forked, in less time.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from conftest import make_tiny_encoder
from forked import ENVIRONMENT, ForkedPython, run_group, start_group
from safetensors.torch import load_file
from test_distributed import torchrun
from test_resume import steps_done

from gradret.cli import main
from gradret.data.sources import open_collection, parse_source
from gradret.encoder.load import load_encoder
from gradret.evaluation.measures import evaluate
from gradret.settings import FitSettings
from gradret.train.loop import fit

STEPS = 8


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    line = f"-m gradret fit --data sample?queries=odd --model {model} --out {out} --max-steps {STEPS} --epochs 9"
    line += " --batch-lists 6 --precision float32 --set checkpoint_every=3 --dev sample?queries=even --dev-every 4"
    return [*line.split(), "--learning-rate", "1e-3", *more]


def start_torchrun(*command: str) -> subprocess.Popen:
    """Two processes under torchrun, whose agent watches over them."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen([*torchrun(2), *command], env=environment, text=True, start_new_session=True, **pipes)


def wait_for_step(processes: list[subprocess.Popen | ForkedPython], out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while all(p.poll() is None for p in processes) and steps_done(out) < step and time.monotonic() < deadline:
        time.sleep(0.002)
    assert all(p.poll() is None for p in processes), "the run ended before the signal"


def read_losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tiny_encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pair") / "out"
    result = run_group(2, arguments(tiny_encoder, out))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"{out}: {STEPS} steps") == 1
    assert "6 lists per batch by 2 processes" in result.stderr
    assert "Warning" not in result.stderr
    return out


def test_two_processes_train_as_one_does(uninterrupted, tiny_encoder, tmp_path):
    settings = FitSettings(
        data=("sample?queries=odd",), model=str(tiny_encoder), max_steps=STEPS, epochs=9, batch_lists=6, dev_every=4,
        precision="float32", checkpoint_every=3, dev="sample?queries=even", learning_rate=1e-3,
    )  # fmt: skip
    fit(settings, tmp_path / "one", progress=False)
    assert read_losses(uninterrupted) == pytest.approx(read_losses(tmp_path / "one"), rel=1e-4)
    dev, alone = (
        [json.loads(line) for line in (out / "dev.jsonl").read_text().splitlines()]
        for out in (uninterrupted, tmp_path / "one")
    )
    assert [line["step"] for line in dev] == [line["step"] for line in alone] == [0, 4, 8]
    assert "2 processes, cpu, float32" in (uninterrupted / "README.md").read_text()


def kill_one(launcher: subprocess.Popen, rank: int) -> None:
    """End one of torchrun's processes as the system does where memory is short."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            os.kill(int(child), signal.SIGKILL)
            return
    raise AssertionError(f"no process {rank}")


def find_errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("Error: ")]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("survivor", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_when_a_process_is_killed_the_other_ends_and_the_run_goes_on(uninterrupted, tiny_encoder, tmp_path, survivor):
    """Its exchange fails, and torchrun sends it a signal, in either order."""
    out = tmp_path / "out"
    launcher = start_torchrun(*arguments(tiny_encoder, out))
    wait_for_step([launcher], out, 5)
    kill_one(launcher, 1 - survivor)
    _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    (line,) = find_errors(stderr)
    assert line.startswith(f"Error: process {survivor} of 2: another process has ended (")
    assert "; look for its own message, if it left one; " in line
    step = steps_done(out)
    if survivor == 0:
        assert f"; all saved after step {step} of {STEPS}; " in line
        assert (out / "checkpoints" / f"step-{step:09d}").is_dir()
    else:
        assert "; the last checkpoint, if there is one yet, holds what was saved; " in line
        assert (out / "checkpoints" / "step-000000004").is_dir()
    command = line.split("continue with: ")[1]
    assert command == f"torchrun --nproc-per-node 2 -m gradret fit --out {out} --resume"
    result = run_group(2, arguments(tiny_encoder, out, "--resume"))
    assert result.returncode == 0, result.stderr
    assert same_bits(out, uninterrupted)
    assert read_losses(out) == read_losses(uninterrupted)


def slow_arguments(what: str, model: Path, folder: Path) -> list[str]:
    """Of a run whose first step, or first search, takes two minutes, and which makes folder / "reached" in it."""
    script = [str(Path(__file__).with_name("slow_fit.py")), str(folder / "reached"), what]
    more = ["--chunk", "1"] if what == "steps" else ["--mine", "k=1,grade=0"]
    return [*script, *arguments(model, folder / "out", *more)[2:]]


def wait_until_reached(processes: list[subprocess.Popen | ForkedPython], folder: Path) -> None:
    deadline = time.monotonic() + 100
    while not (folder / "reached").exists() and all(p.poll() is None for p in processes):
        if time.monotonic() > deadline:
            pytest.fail("neither process has reached the place")
        time.sleep(0.01)
    assert (folder / "reached").exists(), [p.communicate()[1] for p in processes if p.poll() is not None]


@pytest.mark.parametrize("what", ["steps", "search", pytest.param("mining", marks=pytest.mark.nightly)])
def test_a_long_step_or_search_is_given_up_for_a_signal(tiny_encoder, tmp_path, what):
    """Whoever stops all processes, as torchrun does, kills them half a minute later."""
    pair = start_group(2, slow_arguments(what, tiny_encoder, tmp_path))
    wait_until_reached(pair, tmp_path)
    for process in pair:
        process.terminate()
    first, second = (find_errors(process.communicate(timeout=60)[1]) for process in pair)
    assert [process.returncode for process in pair] == [1, 1]
    assert len(first) == len(second) == 1
    assert first[0].startswith(f"Error: stopped by SIGTERM after step 0 of {STEPS}, all saved; continue with: torchrun")
    # While the first one searches, the second one waits for it, where no signal is heard.
    told = "stopped by SIGTERM" if what == "steps" else "another process has ended ("
    assert second[0].startswith(f"Error: process 1 of 2: {told}")
    assert (tmp_path / "out" / "checkpoints" / "step-000000000").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_a_process_lost_in_a_long_search_ends_the_first_one_by_torchruns_signal(tiny_encoder, tmp_path):
    """Which makes no exchange meanwhile that could fail."""
    launcher = start_torchrun(*slow_arguments("search", tiny_encoder, tmp_path))
    wait_until_reached([launcher], tmp_path)
    kill_one(launcher, 1)
    _, stderr = launcher.communicate(timeout=60)
    (line,) = find_errors(stderr)
    assert line.startswith(f"Error: stopped by SIGTERM after step 0 of {STEPS}, all saved; continue with: torchrun")
    assert (tmp_path / "out" / "checkpoints" / "step-000000000").is_dir()


@pytest.mark.nightly
def test_only_the_first_process_needs_the_directory(uninterrupted, tiny_encoder, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    folders = tmp_path / "here", tmp_path / "there"
    for resume in ([], ["--resume"]):
        pair = start_group(2, arguments(tiny_encoder, Path("out"), *resume), folders)
        if not resume:
            wait_for_step(pair, folders[0] / "out", 5)
            for process in pair:
                process.terminate()
        for rank, process in enumerate(pair):
            stdout, stderr = process.communicate(timeout=100)
            assert process.returncode == (0 if resume else 1), stderr
            assert bool(stdout) == bool(resume and rank == 0)
    assert same_bits(folders[0] / "out", uninterrupted)
    assert not list(folders[1].iterdir())


def test_a_stopped_run_goes_on_with_another_number_of_processes(uninterrupted, tiny_encoder, tmp_path):
    out = tmp_path / "out"
    launcher = start_torchrun(*arguments(tiny_encoder, out))
    wait_for_step([launcher], out, 3)
    os.killpg(launcher.pid, signal.SIGTERM)
    _, stderr = launcher.communicate(timeout=60)
    step = steps_done(out)
    assert stderr.count(f"Error: stopped by SIGTERM after step {step} of {STEPS}, all saved; continue with: ") == 1
    shutil.copytree(out, tmp_path / "three")
    for processes, directory in ((1, out), (3, tmp_path / "three")):
        result = run_group(processes, arguments(tiny_encoder, directory, "--resume"))
        assert result.returncode == 0, result.stderr
        assert read_losses(directory)[:step] == read_losses(uninterrupted)[:step]
        assert read_losses(directory) == pytest.approx(read_losses(uninterrupted), rel=1e-3)


def test_bad_input_is_told_once(tiny_encoder, tmp_path):
    out = tmp_path / "out"
    result = run_group(2, arguments(tiny_encoder, out, "--batch-lists", "7"))
    expected = "Error: --batch-lists 7 is not a multiple of the 2 processes that share it; try --batch-lists 8"
    assert result.returncode == 1
    assert result.stderr.count(expected) == 1
    assert not list(out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("command", "instead"),
    [
        ("gen queries.tsv", "; --shard i/n shares the queries out"),
        ("export lists.jsonl --format beir --out beir", ""),
        *((f"bench {name}", "") for name in ("quality", "loss")),
    ],
)
def test_what_runs_in_one_process_says_so(command, instead, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(click.ClickException) as error:
        main(command.split(), standalone_mode=False)
    name = " ".join(word for word in command.split()[:2] if word.isalpha())
    assert error.value.message == f"{name} runs in one process; start it without torchrun{instead}"


def test_eval_is_shared_and_printed_once(tiny_encoder, tmp_path):
    command = ["-m", "gradret", "bench", "eval", "--model", str(tiny_encoder), "--dataset", "sample", "--json"]
    command += ["--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run"), "--device", "cpu"]
    result = run_group(2, command)
    assert result.returncode == 0, result.stderr
    expected = evaluate(load_encoder(str(tiny_encoder)), open_collection(parse_source("sample")), progress=False)
    assert json.loads(result.stdout)["measures"] == expected.measures
    assert len((tmp_path / "run").read_text().splitlines()) == sum(map(len, expected.run.values()))
    assert "96 queries, 384 documents, 2 processes" in result.stderr
    result = run_group(2, [*command, "--run", str(tmp_path / "no" / "run")])
    assert result.returncode == 1
    assert result.stderr.count(f"Error: {tmp_path}/no/run: cannot be written (No such file or directory)") == 1


@pytest.mark.nightly
def test_adapters_mining_and_caching_in_two_processes(tmp_path):
    """Resumed from one process's checkpoint: frozen weights, adapters and mined passages are the same everywhere."""
    pytest.importorskip("peft")
    model, out = make_tiny_encoder(tmp_path / "model"), tmp_path / "out"
    more = [
        "--lora",
        "2",
        "--mine",
        "k=1,grade=0,every=0.5",
        "--chunk",
        "4",
        "--patience",
        "9",
        "--set",
        "interpolate=0.5",
    ]
    assert run_group(2, arguments(model, out, *more)).returncode == 0
    one = tmp_path / "one"
    assert run_group(1, arguments(model, one, *more)).returncode == 0
    assert read_losses(out) == pytest.approx(read_losses(one), rel=1e-3)
    assert weights(out).keys() == weights(model).keys()
