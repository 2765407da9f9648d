"""Options that several commands share; their defaults are those of FitSettings."""

import click

from gradret.settings import (
    DEFAULT_MEASURES,
    POOLINGS,
    PRECISIONS,
    SCHEDULES,
    SIMILARITIES,
    TARGETS,
    FitSettings,
)

DEFAULTS = FitSettings()
POSITIVE = click.IntRange(min=1)
ABOVE_ZERO = click.FloatRange(min=0, min_open=True)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
DEVICE = click.option("--device", help="cuda, cuda:1, mps or cpu; by default the first of them that is there.")
MEASURES = click.option(
    "--measures",
    default=",".join(DEFAULT_MEASURES),
    show_default=True,
    help="ir_measures names, separated by commas.",
)


def options(*decorators):
    """Several option decorators as one, in the order they are shown."""

    def decorate(function):
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def option(name: str, **kwargs):
    """An option of FitSettings: its default, shown."""
    field = name.split("/")[0].lstrip("-").replace("-", "_")
    return click.option(name, default=getattr(DEFAULTS, field), show_default=True, **kwargs)


ENCODER_OPTIONS = options(
    option(
        "--model",
        metavar="ENCODER",
        help="Directory or hub repository of a transformers or sentence-transformers encoder.",
    ),
    option("--pooling", type=click.Choice(POOLINGS), help="Instead of the encoder's own."),
    option("--normalize/--no-normalize", help="Whether embeddings have length 1; by default as the encoder says."),
    option("--similarity", type=click.Choice(SIMILARITIES), help="Instead of the encoder's own."),
    option("--query-prefix", help="Put before every query."),
    option("--document-prefix", help="Put before every document."),
    option("--query-max-length", type=POSITIVE, help="Tokens of a query that are read."),
    option("--document-max-length", type=POSITIVE, help="Tokens of a document that are read."),
    option("--trust-remote-code", is_flag=True, help="Run model code that the repository brings along."),
)
BUDGET_OPTIONS = options(
    option("--order", type=click.IntRange(1, 2), help="The p of wasserstein's W_p^p."),
    option("--temperature", type=ABOVE_ZERO, help="Scores are divided by it before the softmax."),
    option("--targets", type=click.Choice(TARGETS), help="Where relevance belongs: 2^grade - 1, or exp(grade)."),
    option("--in-batch/--no-in-batch", help="Whether the other lists' passages join each list."),
    option("--in-batch-grade", type=float, help="Their grade. [default: the scale's lowest, 0 or below]"),
    option("--epochs", type=ABOVE_ZERO, help="Passes over the lists."),
    option("--max-steps", type=POSITIVE, help="End sooner."),
    option("--batch-lists", type=POSITIVE, help="Lists whose passages share a batch."),
    option("--accumulate", type=POSITIVE, help="Batches an optimizer step."),
    option("--learning-rate", type=ABOVE_ZERO, help="Its peak, of AdamW."),
    option("--weight-decay", type=click.FloatRange(min=0), help="Of matrices; biases and norms have none."),
    option("--warmup", type=click.FloatRange(0, 1), help="Share of the steps in which the learning rate rises."),
    option("--schedule", type=click.Choice(SCHEDULES), help="How it falls after that."),
    option("--clip", type=click.FloatRange(min=0), help="Highest gradient norm; 0 for no limit."),
    option("--precision", type=click.Choice(PRECISIONS), help="auto is bfloat16 where the device computes in it."),
)


def make_settings(given: dict) -> FitSettings:
    """FitSettings from options. Raises: click.UsageError."""
    try:
        return FitSettings(**given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
