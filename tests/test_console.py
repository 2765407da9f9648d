"""What a terminal is shown while a command works, and what is left of it with --quiet."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from click.testing import CliRunner

from gradret import console
from gradret.cli import main
from gradret.console import BAR_DELAY_S, GivenUp, StopRequest, be_quiet, say, show_bar
from gradret.evaluation.measures import evaluate


def run_in_a_terminal(*arguments) -> tuple[str, str]:
    """The command's standard output, and what a terminal on its standard error was sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [sys.executable, "-m", "gradret", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end has been closed
                break
            if not part:
                break
            shown += part
        printed = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return printed, shown.decode()


@pytest.fixture(scope="module")
def commands(tiny_encoder, tmp_path_factory):
    """A command and whether its work has a bar."""
    folder = tmp_path_factory.mktemp("quiet")
    return (
        ("fit", "--model", tiny_encoder, "--max-steps", "2", "--out", folder / "{}", "| 2/2 ["),
        ("bench", "eval", "--model", tiny_encoder, "--cache", folder / "{}", "embedding documents:"),
    )


@pytest.mark.nightly
def test_progress_on_a_terminal_and_none_with_quiet(commands):
    for *command, bar in commands:
        loud, shown = run_in_a_terminal(*(str(part).format("loud") for part in command))
        assert bar in shown
        quiet, nothing = run_in_a_terminal(*(str(part).format("quiet") for part in command), "--quiet")
        assert nothing == ""
        assert len(quiet.splitlines()) == len(loud.splitlines()) > 0


@pytest.mark.parametrize("command", ["fit", "gen", "export", "bench quality", "bench eval", "bench loss"])
def test_every_command_can_be_quiet(command):
    assert "--quiet" in CliRunner().invoke(main, [*command.split(), "--help"]).stdout


@pytest.mark.nightly
def test_what_is_waited_for_is_named_and_goes_away(commands):
    (*command, _), _ = commands
    _, shown = run_in_a_terminal(*(str(part).format("waited") for part in command))
    assert shown.startswith("\rloading PyTorch ...")
    assert "loading " + str(command[2]) in shown
    assert "loading" not in shown.split("fit: ", 1)[1]


@pytest.mark.nightly
@pytest.mark.slow
def test_others_are_quiet_on_a_terminal(tiny_gguf, tiny_encoder, tmp_path):
    (tmp_path / "queries.tsv").write_text("q1\twhy do cats purr\n")
    for command in (
        f"gen {tmp_path}/queries.tsv --model {tiny_gguf} --length 30:90 --out {tmp_path}/lists.jsonl",
        f"export sample --format beir --out {tmp_path}/beir",
        f"bench loss --shapes 4x8 --repeats 3 --out {tmp_path}/bench",
        f"bench quality --model {tiny_encoder} --max-steps 1 --seeds 1 --out {tmp_path}/bench",
    ):
        printed, shown = run_in_a_terminal(*command.split(), "--quiet")
        assert (shown, bool(printed)) == ("", True), command


def test_slow_queries_are_seen_at_once(monkeypatch, capsys):
    """A bar stands there before the first query is embedded."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    seen = []

    def embed(texts, kind):
        if kind == "query":
            seen.append(capsys.readouterr().err)
        return np.ones((len(texts), 2))

    evaluate(embed, "sample?queries=even")
    assert "embedding queries:   0%" in seen[-1]


def test_an_error_is_told_all_the_same(tmp_path):
    result = CliRunner().invoke(main, ["export", str(tmp_path / "no.jsonl"), "--format", "beir", "--out", "x", "-q"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "no such file" in result.stderr


def test_the_next_command_is_not_quiet(capsys):
    """Several commands in one process, as in tests and notebooks."""
    CliRunner().invoke(main, ["fit", "--quiet", "--model", "/no/such/model"])
    assert console._quiet
    CliRunner().invoke(main, ["fit", "--model", "/no/such/model"])
    say("heard")
    assert capsys.readouterr().err == "heard\n"


def test_a_bar_is_hidden_when_asked_for_or_quiet(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "_quiet", False)
    assert not show_bar(range(3), delay=BAR_DELAY_S).disable
    assert show_bar(range(3), shown=False).disable
    be_quiet(True)
    assert show_bar(range(3)).disable
    be_quiet(False)
    assert not show_bar(range(3), delay=BAR_DELAY_S).disable


def test_bars_of_libraries_are_hidden_too_and_nothing_of_theirs_is_replaced():
    code = (
        "import sys; from gradret.console import be_quiet; assert 'tqdm' not in sys.modules; be_quiet(True)\n"
        "import gradret.cli, tqdm, tqdm.auto, huggingface_hub.utils, transformers.utils.logging as logging\n"
        "assert tqdm.tqdm.__init__.__module__ != 'gradret.console'\n"
        "assert tqdm.tqdm(range(3)).disable and tqdm.auto.tqdm(range(3)).disable\n"
        "assert huggingface_hub.utils.are_progress_bars_disabled() and not logging.is_progress_bar_enabled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("grace_s", [0.0, 0.05])
@pytest.mark.parametrize("comes", ["before", "within"])
def test_a_stretch_is_given_up_some_time_after_a_signal_and_nothing_else_is(comes, grace_s):
    with StopRequest() as stop:
        if comes == "before":
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(GivenUp), stop.give_up(grace_s):
            if comes == "within":
                signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        assert stop.signal == signal.SIGTERM and stop.waited_s >= grace_s
        with stop.uninterrupted():
            pass
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_a_stretch_that_ends_in_time_is_kept():
    with StopRequest() as stop:
        with stop.give_up(60.0):
            signal.raise_signal(signal.SIGINT)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
