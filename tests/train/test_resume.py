"""Interruptions: SIGKILL, SIGINT and SIGTERM in real processes, full disks, directories that are taken."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_tiny_encoder
from filelock import FileLock
from forked import ForkedPython, run_forked

from gradret.cli import main
from gradret.console import GradretError
from gradret.settings import DEFAULT_LOSS, FitSettings
from gradret.train import loop, run_directory
from gradret.train.loop import Trainer, check_alike, fit
from gradret.train.run_directory import RunDirectory

STEPS = 12


def command(model: Path, out: Path, *more: str) -> list[str]:
    line = f"-m gradret fit --data sample?queries=odd --model {model} --out {out} --max-steps {STEPS} --epochs 9"
    line += " --batch-lists 8 --precision float32 --set checkpoint_every=5 --dev sample?queries=even --dev-every 4"
    return [*line.split(), "--learning-rate", "1e-3", *more]


def test_a_signal_while_the_model_is_saved_lets_it_be_saved(tiny_encoder, tmp_path, monkeypatch):
    def write_card(*arguments, **facts):
        os.kill(os.getpid(), signal.SIGTERM)
        return card(*arguments, **facts)

    card = loop.write_card
    monkeypatch.setattr(loop, "write_card", write_card)
    settings = FitSettings(data=("sample?queries=odd",), model=str(tiny_encoder), max_steps=1, batch_lists=8)
    assert fit(settings, tmp_path / "out", progress=False).steps == 1
    assert fit(settings, tmp_path / "out", resume=True, progress=False).was_finished


def stop_at(arguments: list[str], out: Path, step: int, number: int) -> subprocess.CompletedProcess:
    """Start a run and send it a signal once its metrics reach a step."""
    process = ForkedPython(arguments)
    deadline = time.monotonic() + 120
    while process.poll() is None and steps_done(out) < step and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, "the run ended before the signal"
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tiny_encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    result = run_forked(command(tiny_encoder, out))
    assert result.returncode == 0, result.stderr
    return out


def losses(out: Path) -> list:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "step_ms"} for r in records]


def assert_same_run(out: Path, expected: Path) -> None:
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert losses(out) == losses(expected)
    assert (out / "dev.jsonl").read_text() == (expected / "dev.jsonl").read_text()
    assert not (out / "checkpoints").exists()


NIGHTLY_STEPS = [pytest.param(step, marks=pytest.mark.nightly) for step in (1, 8, 11)]


@pytest.mark.parametrize("step", [4, 6, *NIGHTLY_STEPS])  # before the first checkpoint but for dev's, and after it
def test_a_killed_run_resumes_to_the_same_bits(tiny_encoder, tmp_path, uninterrupted, step):
    out = tmp_path / "out"
    killed = stop_at(command(tiny_encoder, out), out, step, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    resumed = run_forked(["-m", "gradret", "fit", "--out", str(out), "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(out, uninterrupted)


@pytest.mark.nightly
def test_killed_again_and_again(tiny_encoder, tmp_path, uninterrupted):
    out = tmp_path / "out"
    for step, more in ((2, ()), (5, ("--resume",)), (9, ("--resume",))):
        stop_at(command(tiny_encoder, out, *more), out, step, signal.SIGKILL)
    assert run_forked(command(tiny_encoder, out, "--resume")).returncode == 0
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGTERM])
def test_a_signal_checkpoints_and_says_how_to_go_on(tiny_encoder, tmp_path, uninterrupted, number):
    out = tmp_path / "out"
    stopped = stop_at(command(tiny_encoder, out), out, 6, number)
    assert stopped.returncode == 1
    last = stopped.stderr.splitlines()[-1]
    done = json.loads(next((out / "checkpoints").glob("step-*/state.json")).read_text())["step"]
    assert done >= 6
    assert last == (
        f"Error: stopped by {signal.Signals(number).name} after step {done} of {STEPS}, all saved; "
        f"continue with: gradret fit --out {out} --resume"
    )
    resumed = run_forked(["-m", "gradret", "fit", "--out", str(out), "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(out, uninterrupted)


SMALL = {"batch_lists": 4, "max_steps": 6, "checkpoint_every": 2, "precision": "float32"}


def cut_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let a run end by an error before the step after this one."""
    train_step = Trainer.train_step

    def cut(self, bar):
        if self.state.step == step:
            raise GradretError("cut")
        train_step(self, bar)

    patch.setattr(Trainer, "train_step", cut)


@pytest.fixture
def full_disk(monkeypatch):
    """From the second checkpoint on there is no space left, halfway through the file."""
    save, calls = run_directory.save_file, []

    def fail(tensors, path, metadata):
        calls.append(path)
        if len(calls) > 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(run_directory, "save_file", fail)
    yield
    monkeypatch.setattr(run_directory, "save_file", save)


def test_a_full_disk_leaves_the_previous_checkpoint(tiny_encoder, tmp_path, full_disk, monkeypatch):
    settings, out = FitSettings(model=str(tiny_encoder), **SMALL), tmp_path / "out"
    with pytest.raises(GradretError) as error:
        fit(settings, out)
    assert str(error.value) == (
        f"{out}: could not be written (No space left on device); the last checkpoint, step-000000002, is intact: "
        "make room and run again with --resume"
    )
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000000002"]
    monkeypatch.undo()
    assert fit(settings, out, resume=True).steps == 6


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root to mount a small file system")
def test_a_disk_that_is_really_full(tiny_encoder, tmp_path):
    size_kib = sum(f.stat().st_size for f in tiny_encoder.iterdir()) // 1024
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib * 5}k", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount here")
    try:
        with pytest.raises(GradretError, match="No space left on device.*step-000000002, is intact"):
            fit(FitSettings(model=str(tiny_encoder), **SMALL), tmp_path / "disk" / "out")
        assert [p.name for p in (tmp_path / "disk" / "out" / "checkpoints").iterdir()] == ["step-000000002"]
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_directory_that_is_taken(tiny_encoder, tmp_path):
    settings, out = FitSettings(model=str(tiny_encoder), **{**SMALL, "max_steps": 1}), tmp_path / "out"
    fit(settings, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(GradretError) as error:
        fit(settings, out)
    assert str(error.value) == f"{out}: holds a finished run with these settings; choose another --out"
    other = FitSettings(model=str(tiny_encoder), **{**SMALL, "max_steps": 1}, loss="infonce")
    for resume in (False, True):
        with pytest.raises(GradretError) as error:
            fit(other, out, resume=resume)
        assert str(error.value) == (
            f'{out}: holds another run, with loss="{DEFAULT_LOSS}" where "infonce" is asked for; choose another --out'
        )
    assert fit(settings, out, resume=True).was_finished
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "file").touch()
    with pytest.raises(GradretError, match="things: is not empty and holds no gradret run; choose another --out"):
        fit(settings, tmp_path / "things")


def test_what_ended_before_its_first_step_is_claimed_anew(tiny_encoder, tmp_path, monkeypatch):
    """As after a chunk that does not fit: the same command with another one, or another loss, simply runs."""
    out, settings = tmp_path / "out", {**SMALL, "max_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "agree_on_chunk", lambda self: (_ for _ in ()).throw(GradretError("too large")))
        with pytest.raises(GradretError, match="too large"):
            fit(FitSettings(model=str(tiny_encoder), chunk=4, mine="k=1,grade=1", **settings), out)
    (out / "mined-0.npy").write_bytes(b"")
    assert fit(FitSettings(model=str(tiny_encoder), loss="infonce", **settings), out).steps == 1
    assert json.loads((out / "gradret.json").read_text())["settings"]["loss"] == "infonce"
    assert not list(out.glob("mined*"))


@pytest.mark.parametrize("changed", [{"mine": "k=2,grade=1"}, {"seed": 1}, {"pooling": "cls"}])
def test_what_another_run_mined_is_not_used(tiny_encoder, tmp_path, monkeypatch, changed):
    """The first one is killed between mining and its first step."""
    settings = {"model": str(tiny_encoder), "mine": "k=1,grade=1", **SMALL}

    def mine_and_end(self, bar):
        raise GradretError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", mine_and_end)
        for more in ({}, {"chunk": 8}):  # the same run again uses it, with another chunk, too
            with pytest.raises(GradretError, match="killed"):
                fit(FitSettings(**settings | more), tmp_path / "out", progress=False)
            if not more:
                mined = (tmp_path / "out" / "mined-0.npy").stat().st_mtime_ns
        assert (tmp_path / "out" / "mined-0.npy").stat().st_mtime_ns == mined
        with pytest.raises(GradretError, match="killed"):
            fit(FitSettings(**settings | changed), tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "mined-0.npy").stat().st_mtime_ns != mined


@pytest.mark.parametrize("every", ["", ",every=0.05"])
def test_mined_passages_that_are_gone_after_steps_are_not_mined_from_another_encoder(
    tiny_encoder, tmp_path, monkeypatch, every
):
    settings = FitSettings(model=str(tiny_encoder), mine=f"k=1,grade=1{every}", **SMALL)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_at(4, patch)  # after a checkpoint; 4 lists a step, a round every 4.8 lists
        with pytest.raises(GradretError, match="cut"):
            fit(settings, out, progress=False)
    last = max(out.glob("mined-*.npy"))
    last.unlink()
    if every:  # the round begins with this very step: nothing is amiss
        assert fit(settings, out, resume=True, progress=False).steps == 6
        return
    with pytest.raises(GradretError) as error:
        fit(settings, out, resume=True, progress=False)
    assert str(error.value) == (
        f"{out}/mined-0.npy: is missing or damaged, and the encoder that mined it has been trained since: put it back "
        "from a copy, or start again in another --out"
    )


def test_mined_passages_that_were_cut_off_are_mined_again(tiny_encoder, tmp_path):
    run = RunDirectory(tmp_path / "out", FitSettings(), {"data": "x"}, resume=False)
    run.write_array("mined-0.npy", np.arange(6).reshape(3, 2))
    assert run.read_array("mined-0.npy").tolist() == [[0, 1], [2, 3], [4, 5]]
    whole = (tmp_path / "out" / "mined-0.npy").read_bytes()
    for size in (0, 50, len(whole) - 1):
        (tmp_path / "out" / "mined-0.npy").write_bytes(whole[:size])
        assert run.read_array("mined-0.npy") is None
    assert run.read_array("mined-1.npy") is None
    run.close()


def test_a_checkpoint_or_an_encoder_of_another_run_is_refused(tiny_encoder, tmp_path, monkeypatch):
    """Of another loss: its tensors would fit. The encoder to start from changed in place."""
    model = make_tiny_encoder(tmp_path / "model")
    step = Trainer.train_step

    def cut(self, bar):
        if self.state.step == 2:
            raise GradretError("cut")
        step(self, bar)

    settings = {
        loss: FitSettings(model=str(model), loss=loss, **SMALL | {"max_steps": 3, "checkpoint_every": 1})
        for loss in ("wasserstein", "infonce")
    }
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", cut)
        for loss, chosen in settings.items():
            with pytest.raises(GradretError, match="cut"):
                fit(chosen, tmp_path / loss)
    ours, theirs = (tmp_path / loss / "checkpoints" / "step-000000002" for loss in settings)
    shutil.copytree(ours, tmp_path / "kept")

    def refused() -> str:
        with pytest.raises(GradretError) as error:
            fit(settings["wasserstein"], tmp_path / "wasserstein", resume=True)
        shutil.rmtree(ours)
        shutil.copytree(tmp_path / "kept", ours)
        return str(error.value)

    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        shutil.copy(theirs / name, ours / name)
        assert refused() == (
            f"{ours / name}: is missing, or belongs to a run with another model, loss, data or other settings; put "
            "this run's own checkpoint back, or remove its directory to start from the beginning"
        )
        (ours / name).write_bytes((ours / name).read_bytes()[:100])
        assert re.match(rf"{ours}(: is damaged \(|/state.json: not valid JSON)", refused())
        (ours / name).unlink()
        assert re.match(rf"{ours}(: is damaged \(|/state.json: is missing, or bel)", refused())
    assert fit(settings["wasserstein"], tmp_path / "wasserstein", resume=True).steps == 3
    shutil.copytree(make_tiny_encoder(tmp_path / "other", dropout=0.0), model, dirs_exist_ok=True)
    with pytest.raises(GradretError, match="infonce: the encoder to start from has changed since this run began"):
        fit(settings["infonce"], tmp_path / "infonce", resume=True)


@pytest.fixture(scope="module")
def cut_run(tiny_encoder, tmp_path_factory) -> tuple[FitSettings, Path]:
    """A run that was cut off after its second step."""
    settings, out = FitSettings(model=str(tiny_encoder), **SMALL), tmp_path_factory.mktemp("cut") / "out"
    with pytest.MonkeyPatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(GradretError, match="cut"):
            fit(settings, out, progress=False)
    return settings, out


def test_a_resumed_run_interpolates_from_where_it_began(tiny_encoder, tmp_path, monkeypatch):
    more = {"interpolate": 0.25, "dev": "sample?queries=even", "learning_rate": 1e-3}
    settings = FitSettings(model=str(tiny_encoder), **SMALL | more)
    fit(settings, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(GradretError, match="cut"):
            fit(settings, tmp_path / "out", progress=False)
    fit(settings, tmp_path / "out", resume=True, progress=False)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 1000)])
def test_the_best_weights_are_looked_for_before_the_run_goes_on(tiny_encoder, tmp_path, monkeypatch, damage):
    settings, out = FitSettings(model=str(tiny_encoder), dev="sample?queries=even", **SMALL), tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(GradretError, match="cut"):
            fit(settings, out, progress=False)
    damage(out / "checkpoints" / "step-000000002" / "best.safetensors")
    monkeypatch.setattr(Trainer, "train_step", None)
    with pytest.raises(GradretError, match="step-000000002: is damaged .*; put it back from a copy, or remove it to"):
        fit(settings, out, resume=True, progress=False)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("checkpoints/step-000000002/state.json", "null", "state.json: expected a JSON object, got null; put it back"),
    ("gradret.json", "[]", "gradret.json: expected a JSON object, got []; put it back"),
    ("gradret.json", '{"settings": {}, "content": {}}', "gradret.json: has no 'finished'; choose another --out"),
    ("gradret.json", '{"settings": {}, "finished": false}', "gradret.json: has no 'content'; choose another --out"),
    ("metrics.jsonl", '{"step": 1}\n{"loss": 1}\n', 'metrics.jsonl:2: expected a JSON object with a step, got {"loss'),
    ("metrics.jsonl", "3\n", "metrics.jsonl:1: expected a JSON object with a step, got 3; remove the line"),
])  # fmt: skip
def test_a_record_that_was_tampered_with_is_told_in_one_line(cut_run, tmp_path, file, content, message):
    settings, cut = cut_run
    shutil.copytree(cut, tmp_path / "out")
    (tmp_path / "out" / file).write_text(content)
    with pytest.raises(GradretError) as error:
        fit(settings, tmp_path / "out", resume=True, progress=False)
    assert f"{tmp_path / 'out'}/" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("content", ["[]", '{"settings": 3}', "{}"])
def test_no_settings_to_resume_with(tmp_path, content):
    (tmp_path / "gradret.json").write_text(content)
    result = CliRunner().invoke(main, ["fit", "--out", str(tmp_path), "--resume"])
    assert result.exit_code == 1
    assert re.match(
        rf"Error: {tmp_path}(/gradret.json: expected a JSON object|: holds no run to resume;)", result.output
    )


def test_what_lies_beside_the_checkpoints_is_left_alone(cut_run, tmp_path):
    settings, out = cut_run[0], shutil.copytree(cut_run[1], tmp_path / "out")
    for name in (".DS_Store", "notes.part", "step-000000009"):
        (out / "checkpoints" / name).write_text("")
    (out / "checkpoints" / "step-000000004.part").mkdir()
    assert fit(settings, out, resume=True, progress=False).steps == 6


def test_a_run_goes_on_in_the_precision_it_began_in(tiny_encoder, tmp_path, monkeypatch):
    """On another machine "auto" may be another."""
    out, settings = tmp_path / "out", {"model": str(tiny_encoder), **SMALL, "precision": "auto"}

    def resolve(precision: str) -> None:
        monkeypatch.setattr(loop, "choose_precision", lambda given, device: precision if given == "auto" else given)

    resolve("bfloat16")
    with monkeypatch.context() as patch:
        cut_at(2, patch)
        with pytest.raises(GradretError, match="cut"):
            fit(FitSettings(**settings), out, progress=False)
    resolve("float32")
    for precision in ("auto", "float32"):
        with pytest.raises(GradretError) as error:
            fit(FitSettings(**settings | {"precision": precision}), out, resume=True, progress=False)
        assert str(error.value) == (
            f'{out}: holds another run, with precision="bfloat16" where "float32" is asked for; choose another --out'
        )
    stored = json.loads((out / "gradret.json").read_text())["settings"]  # with which `fit --resume` goes on
    assert stored["precision"] == "bfloat16"
    assert fit(FitSettings(**settings | {"precision": "bfloat16"}), out, resume=True, progress=False).steps == 6


def test_processes_compute_in_one_precision():
    check_alike([({"data": "x"}, "float32")] * 2)
    with pytest.raises(GradretError, match="^--precision auto is bfloat16 and float32 in different processes; give "):
        check_alike([({"data": "x"}, "float32"), ({"data": "x"}, "bfloat16")])
    with pytest.raises(GradretError, match="^the processes found different data or encoders; give all"):
        check_alike([({"data": "x"}, "float32"), ({"data": "y"}, "float32")])


def test_changed_data_are_noticed(tiny_encoder, tmp_path):
    from conftest import SAMPLE_FILE

    data = tmp_path / "data.jsonl"
    data.write_bytes(SAMPLE_FILE.read_bytes())
    settings = FitSettings(data=(str(data),), model=str(tiny_encoder), **SMALL)
    fit(settings, tmp_path / "out")
    data.write_text(data.read_text().replace("bread", "rolls"))
    with pytest.raises(GradretError, match="the training data has changed since this run began"):
        fit(settings, tmp_path / "out", resume=True)


def test_two_runs_may_not_share_a_directory(tiny_encoder, tmp_path):
    settings, out = FitSettings(model=str(tiny_encoder), **SMALL), tmp_path / "out"
    out.mkdir()
    with FileLock(out / "gradret.lock"):
        with pytest.raises(GradretError, match="out: another process is training here; wait for it or stop it"):
            fit(settings, out)
    assert fit(settings, out).steps == 6
    assert not (out / "gradret.lock").exists()  # which no saved encoder needs


def test_what_another_run_writes_until_it_lets_go_is_seen(tiny_encoder, tmp_path, monkeypatch):
    """Two runs start at once in a new directory: the second must not put its name on what is the first's."""
    out, hold = tmp_path / "out", RunDirectory._hold
    theirs = FitSettings(model=str(tiny_encoder), **SMALL)

    def finish_first(self):
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "_hold", hold)
            fit(theirs, out)
        hold(self)

    monkeypatch.setattr(RunDirectory, "_hold", finish_first)
    with pytest.raises(GradretError, match="out: holds another run, with loss="):
        fit(FitSettings(model=str(tiny_encoder), loss="infonce", **SMALL), out)
    assert json.loads((out / "gradret.json").read_text())["settings"]["loss"] == DEFAULT_LOSS


def test_killed_while_claiming_the_directory(tiny_encoder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gradret.json.part").write_text("{")
    assert fit(FitSettings(model=str(tiny_encoder), **SMALL), tmp_path / "out").steps == 6


def test_a_changed_encoder_is_noticed(tiny_encoder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_encoder, model)
    settings = FitSettings(model=str(model), **SMALL)
    fit(settings, tmp_path / "out")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(GradretError, match="the encoder to start from has changed since this run began"):
        fit(settings, tmp_path / "out", resume=True)
