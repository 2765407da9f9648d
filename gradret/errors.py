"""The exceptions that end a command with a single line."""


class GradretError(Exception):
    """Bad input or a failed operation that the user can mend: one line, exit code 1, no traceback.

    The message says where, what was expected, what came and what to do.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # one line, whatever is quoted in it


class Interrupted(GradretError):
    """A run ended by SIGINT or SIGTERM after it was saved."""


class ToldElsewhere(GradretError):
    """This process ends with another one, whose line tells why: exit code 1, nothing printed."""


class ProcessLost(GradretError):
    """Another of the processes that share the work has ended."""
