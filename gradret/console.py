"""What a long command shows and hears: lines on stderr, and requests to stop."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # imported when the first bar is shown: --quiet has to come before, see be_quiet
    from tqdm import tqdm


class GradretError(click.ClickException):
    """Bad input or a failed operation that the user can mend: one line, exit code 1, no traceback.

    The message says where, what was expected, what came and what to do.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # one line, whatever is quoted in it


class Interrupted(GradretError):
    """A run ended by SIGINT or SIGTERM after it was saved."""


class ToldElsewhere(GradretError):
    """This process ends with another one, whose line tells why: exit code 1, nothing printed."""

    def show(self, file: IO[Any] | None = None) -> None:
        pass


class ProcessLost(GradretError):
    """Another of the processes that share the work has ended."""


class GivenUp(BaseException):
    """A signal to end has cut a stretch of work short, see StopRequest.give_up.

    No Exception: it may come up anywhere, also where any error of a library is turned into a line of ours.
    """


def count_processes() -> int:
    """How many processes torchrun, or a launcher that sets the same variables, has started."""
    return _read_number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def is_first_process() -> bool:
    """Whether this is the process that shows and writes: the only one, or torchrun's first."""
    return _read_number("RANK", 0) == 0


def _read_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise GradretError(f"{variable} is '{text}'; expected a number, as torchrun sets it; else unset it")
    return int(text)


def count_of(number: int, one: str, many: str | None = None) -> str:
    """The number with its noun: "1 list", "2 lists"; `many` is a plural that is not `one` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def require_one(what: str, instead: str = "") -> None:
    """Refuse what has no use for several processes. Raises: GradretError."""
    if count_processes() > 1:
        raise GradretError(f"{what} runs in one process; start it without torchrun{instead}")


@contextmanager
def needing(what: str, package: str, extra: str, *modules: str) -> Iterator[None]:
    """Imports of a package that an extra of gradret brings.

    Args:
        what: needs it, as the user calls it.
        modules: those imported where they are not called as the package is.
    Raises: GradretError that says how to install it, but nothing of what the package itself may lack.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in (modules or (package,)):
            raise
        raise GradretError(f"{what} needs the package {package}: pip install 'gradret[{extra}]'") from None


SECOND_THOUGHT_S = 2.0
BAR_DELAY_S = 2  # work that is done sooner needs no progress bar

_quiet = False
# What libraries look at when they are imported: tqdm, which ir_datasets uses, the hub's client and transformers.
QUIET_VARIABLES = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def be_quiet(quiet: bool) -> None:
    """Whether from now on there are neither lines nor bars; results and errors are not written here.

    Bars of other libraries heed it where it is called before they are imported, as the command line does.
    """
    global _quiet
    if quiet:
        os.environ.update(QUIET_VARIABLES)
    elif _quiet:
        for name in QUIET_VARIABLES:
            os.environ.pop(name, None)
    _quiet = quiet


def say(line: str) -> None:
    """A line for the user, on stderr, above any progress bar."""
    if not _quiet:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)


def show_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> "tqdm[Any]":
    """A progress bar on stderr where that is a terminal, see tqdm for the options; hidden if not `shown`."""
    from tqdm import tqdm

    return tqdm(iterable, disable=None if shown and not _quiet else True, **options)


@contextmanager
def show_wait(what: str) -> Iterator[None]:
    """A line on a terminal while something is waited for that has no steps to count; it goes away afterwards."""
    with show_bar(shown=is_first_process(), desc=what, bar_format="{desc} ...", leave=False):
        yield


class StopRequest:
    """Notes SIGINT and SIGTERM while it is entered, so that a loop can end between two steps.

    A second one some seconds later interrupts at once, but not while `uninterrupted()`.

    Attributes:
        signal: the signal's number, None while there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._deaf = False
        self._heard_s = 0.0
        self._grace_s: float | None = None  # of the stretch that may be given up; None outside of one
        self._previous: dict[int, Any] = {}

    @property
    def waited_s(self) -> float:
        """Seconds since the first signal; 0 while there was none."""
        return 0.0 if self.signal is None else time.monotonic() - self._heard_s

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        # Supervisors send one signal to a process and to its group: what comes at once is no second thought.
        again = self.waited_s > SECOND_THOUGHT_S
        if self.signal is None:
            self._heard_s = time.monotonic()
        self.signal = number
        if again and not self._deaf:
            raise KeyboardInterrupt
        self._give_up_in_time()

    def _give_up_in_time(self) -> None:
        """End the stretch that may be given up if it has had its time; else have this called when it will have."""
        if self._grace_s is None or self.signal is None:
            return
        left_s = self._grace_s - self.waited_s
        if left_s <= 0:
            raise GivenUp
        if hasattr(signal, "SIGALRM"):  # not on Windows
            if signal.SIGALRM not in self._previous:  # only now: without a signal to end, alarms are left to others
                self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda *_: self._give_up_in_time())
            signal.setitimer(signal.ITIMER_REAL, max(left_s, 0.001))  # 0 would switch it off

    @contextmanager
    def give_up(self, grace_s: float) -> Iterator[None]:
        """A stretch that ends so long after a signal, because nothing is lost but its own time; 0: at once.

        Raises: GivenUp in it, or before it, between two lines of Python: a call into C++ ends first.
        """
        self._grace_s = grace_s
        try:
            self._give_up_in_time()  # for a signal that came before
            yield
        finally:
            self._grace_s = None
            if hasattr(signal, "SIGALRM") and signal.SIGALRM in self._previous:
                signal.setitimer(signal.ITIMER_REAL, 0)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """A stretch that no signal cuts short."""
        self._deaf = True
        try:
            yield
        finally:
            self._deaf = False


def command_line() -> str:
    """What was called, as a shell takes it."""
    return shlex.join(["gradret", *sys.argv[1:]])
