"""What a long command shows and hears: lines on stderr, and requests to stop."""

import signal
import sys
import threading
from contextlib import contextmanager

from tqdm import tqdm


def say(line: str) -> None:
    """A line for the user, on stderr, above any progress bar."""
    tqdm.write(line, file=sys.stderr)


class StopRequest:
    """Notes SIGINT and SIGTERM while it is entered, so that a loop can end between two steps.

    A second signal interrupts at once, as does the first inside `at_once()`.

    Attributes:
        signal: the signal's number, None while there was none.
    """

    def __init__(self):
        self.signal: int | None = None
        self._at_once = False
        self._previous: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        hurry = self._at_once or self.signal is not None
        self.signal = number
        if hurry:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self):
        """A stretch that a signal cuts short, because nothing is lost but its own time; look at `signal` after it."""
        self._at_once = True
        try:
            yield
        except KeyboardInterrupt:
            if self.signal is None:
                raise
        finally:
            self._at_once = False
