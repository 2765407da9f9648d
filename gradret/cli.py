"""The command line: parse, call one function, print. Heavy imports stay inside the commands."""

import sys

import click

from gradret import __version__
from gradret.cli_bench import bench
from gradret.cli_bench_fit import fit as bench_fit
from gradret.cli_fit import fit
from gradret.cli_gen import bench_gen, export, gen
from gradret.cli_loss import loss
from gradret.errors import GradretError, ToldElsewhere
from gradret.launch import count_processes


class Commands(click.Group):
    """A group whose commands end with one line and exit code 1 on a GradretError."""

    def main(self, *arguments, **options):
        try:
            return super().main(*arguments, **options)
        except SystemExit as end:
            if "gradret.processes" in sys.modules and count_processes() > 1:
                from gradret.processes import end_process

                end_process(end.code if isinstance(end.code, int) else int(end.code is not None))
            raise

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except ToldElsewhere:
            ctx.exit(1)
        except GradretError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="gradret")
def main():
    """Dense retrievers without labels: an LLM writes graded lists, a list-wise Wasserstein loss trains on them."""


bench.add_command(loss)
bench.add_command(bench_gen)
bench.add_command(bench_fit)
for command in (gen, fit, export, bench):
    main.add_command(command)
