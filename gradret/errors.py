"""The one exception that ends a command with a single line."""


class GradretError(Exception):
    """Bad input or a failed operation that the user can mend: one line, exit code 1, no traceback.

    The message says where, what was expected, what came and what to do.
    """
