"""What the scripts share: how they end, and how they tell what they were called with."""

import shlex
import sys
from pathlib import Path

import click

RESULTS = Path(__file__).with_name("results")


class Script(click.Command):
    """A command that ends with one line and exit code 1 where a package is missing."""

    def __init__(self, *arguments, **options):
        options.setdefault("context_settings", {"help_option_names": ["-h", "--help"], "max_content_width": 120})
        super().__init__(*arguments, **options)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] in ("gradret", "benchmarks"):
                raise  # a bug of ours
            name = error.name.split(".")[0]
            raise click.ClickException(f"{name} is not installed; install it: pip install '.[test]'") from error


def command_line(module: str) -> str:
    """What was called, as a shell takes it; `module` is the script's dotted name."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
