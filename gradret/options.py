"""Options that several commands share; their defaults are those of FitSettings."""

import click

from gradret.console import be_quiet
from gradret.settings import (
    AUTO,
    DEFAULT_MEASURES,
    GROUNDS,
    POOLINGS,
    PRECISIONS,
    SCHEDULES,
    SIMILARITIES,
    TARGETS,
    WEIGHTS,
    FitSettings,
)

DEFAULTS = FitSettings()
POSITIVE = click.IntRange(min=1)
ABOVE_ZERO = click.FloatRange(min=0, min_open=True)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
QUIET = click.option(
    "--quiet",
    "-q",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, param, given: be_quiet(given),
    help="Only results and errors: no progress, no notes.",
)
DEVICE = click.option("--device", help="cuda, cuda:1, mps or cpu; by default the first of them that is there.")
MEASURES = click.option(
    "--measures",
    default=",".join(DEFAULT_MEASURES),
    show_default=True,
    help="ir_measures names, separated by commas.",
)


class ChunkType(click.ParamType):
    """Passages at once, or auto."""

    name = f"passages|{AUTO}"

    def convert(self, value, param, ctx):
        if value == AUTO or isinstance(value, int):
            return value
        if not value.isdecimal() or int(value) < 1:
            self.fail(f"'{value}' is neither a whole number above 0 nor {AUTO}", param, ctx)
        return int(value)


class NamesType(click.ParamType):
    """Names separated by commas, as a tuple."""

    name = "names"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        names = tuple(filter(None, map(str.strip, value.split(","))))
        if not names:
            self.fail(f"'{value}' holds no name", param, ctx)
        return names


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
    option("--layers", type=POSITIVE, help="Keep the encoder's first layers alone, so many: weaker, and faster."),
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
    option(
        "--targets",
        type=click.Choice(TARGETS),
        help="How much relevance belongs to a grade: 2^grade - 1, exp(grade) or the grade's root.",
    ),
    option(
        "--ground",
        type=click.Choice(GROUNDS),
        help="How far wasserstein's mass is moved between two grades: their difference, that of 2^grade or of roots.",
    ),
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
    option(
        "--interpolate",
        type=click.FloatRange(0, 1, min_open=True),
        help="Share of the way from the encoder's own weights to the trained ones that is saved; 1 is all of it.",
    ),
    option("--precision", type=click.Choice(PRECISIONS), help="auto is bfloat16 where the device computes in it."),
    option(
        "--chunk",
        type=ChunkType(),
        metavar=f"PASSAGES|{AUTO}",
        help="Gradient caching: so many passages in memory at once, however large the batch; auto: as many as fit.",
    ),
    option(
        "--kl-share",
        type=click.FloatRange(0, 1),
        help="Share of the listwise cross-entropy in the wasserstein loss.",
    ),
    option(
        "--contrast-share",
        type=click.FloatRange(0, 1),
        help="Share of the contrast in the wasserstein loss: each document with a grade above 0 against those without.",
    ),
    option(
        "--mine",
        metavar="k=K,grade=G[,...]",
        help="Add K mined passages a list at grade G; also from=SOURCE, by=encoder|bm25, skip=S, every=EPOCHS.",
    ),
    option("--lora", type=click.IntRange(min=0), help="Train adapters of this rank instead of the weights."),
    option("--lora-alpha", type=ABOVE_ZERO, help="Their scale, times the rank."),
    option("--lora-dropout", type=click.FloatRange(0, 1, max_open=True), help="Dropout before them."),
    option("--lora-targets", type=NamesType(), metavar="NAME,...", help="Linear layers that get them. [default: all]"),
    option("--weights", type=click.Choice(WEIGHTS), help="Type of the weights that --lora leaves as they are."),
    option("--gradient-checkpointing", is_flag=True, help="Less memory: activations are computed again in backward."),
)


def make_settings(given: dict) -> FitSettings:
    """FitSettings from options. Raises: click.UsageError."""
    try:
        return FitSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except ValueError as error:
        raise click.UsageError(str(error)) from None
