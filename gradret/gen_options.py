"""The options of `gradret gen`, their types, and which engine they are for."""

import json

import click

from gradret.errors import GradretError
from gradret.options import POSITIVE, options
from gradret.queries import parse_shard
from gradret.settings import GenSettings

DEFAULTS = GenSettings()
MODEL_ONLY = ("sequences", "context", "gpu_layers", "threads")
OWN_FIELDS = ("model", "messages", "stream", "n", "seed", "temperature", "top_p", "logprobs", "top_logprobs")
ENDPOINT_ONLY = ("concurrency", "timeout", "retries", "request_options")


class Length(click.ParamType):
    """MIN:MAX, whole numbers."""

    name = "length"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        low, colon, high = value.partition(":")
        if not (colon and low.isdecimal() and high.isdecimal()):
            self.fail(f"'{value}' is not two whole numbers joined by ':', such as 100:1000", param, ctx)
        return int(low), int(high)


class Shard(click.ParamType):
    """i/n with 1 <= i <= n."""

    name = "shard"

    def convert(self, value, param, ctx):
        try:
            return value if isinstance(value, tuple) else parse_shard(value)
        except GradretError as error:
            self.fail(str(error), param, ctx)


class JsonObject(click.ParamType):
    """A JSON object."""

    name = "json"

    def convert(self, value, param, ctx):
        try:
            found = value if isinstance(value, dict) else json.loads(value)
        except ValueError as error:
            self.fail(f"'{value}' is not JSON ({error})", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"'{value}' is not a JSON object", param, ctx)
        if own := [name for name in OWN_FIELDS if name in found]:
            self.fail(f"'{own[0]}' is set by gradret itself; leave it out", param, ctx)
        return found


PROMPT_OPTIONS = options(
    click.option(
        "--scale", type=click.Path(), help="JSON file {GRADE: definition}. [default: TREC Deep Learning, 3 to 0]"
    ),
    click.option("--separate", is_flag=True, help="One request a grade, instead of one for all, best first."),
    click.option("--variety", is_flag=True, help="Each query draws a length, a genre and a reading level."),
    click.option("--examples", type=click.Path(), help="Ranking lists to show. [default: one of the bundled sample]"),
    click.option(
        "--shots", default=DEFAULTS.shots, show_default=True, type=click.IntRange(min=0), help="How many of them."
    ),
    click.option("--language", help="ISO 639-1 code that passages must be in. [default: the query's, unchecked]"),
    click.option(
        "--length",
        default=f"{DEFAULTS.min_chars}:{DEFAULTS.max_chars}",
        show_default=True,
        type=Length(),
        metavar="MIN:MAX",
        help="Characters of a passage.",
    ),
    click.option("--temperature", default=DEFAULTS.temperature, show_default=True, type=click.FloatRange(min=0)),
    click.option("--top-p", default=DEFAULTS.top_p, show_default=True, type=click.FloatRange(0, 1, min_open=True)),
    click.option("--max-tokens", type=POSITIVE, help="Of a reply. [default: enough for passages of the full length]"),
    click.option("--seed", default=DEFAULTS.seed, show_default=True, type=click.IntRange(min=0)),
    click.option(
        "--attempts", default=DEFAULTS.attempts, show_default=True, type=POSITIVE, help="Replies before a reject."
    ),
    click.option("--judge", is_flag=True, help="The model then grades each passage blind; stored as 'judged'."),
)
GPU_LAYERS = click.option(
    "--gpu-layers", default=-1, show_default=True, type=click.IntRange(min=-1), help="-1 for all."
)
THREADS = click.option("--threads", type=POSITIVE, help="[default: the processor's cores]")
LLAMA_OPTIONS = options(
    click.option("--sequences", default=16, show_default=True, type=POSITIVE, help="Replies written at once."),
    click.option("--context", type=POSITIVE, help="Tokens of a prompt and its reply. [default: what they need]"),
    GPU_LAYERS,
    THREADS,
)
ENDPOINT_OPTIONS = options(
    click.option(
        "--concurrency",
        default=32,
        show_default=True,
        type=POSITIVE,
        help="Requests at once; fewer for a server that answers one after the other.",
    ),
    click.option(
        "--timeout",
        default=600.0,
        show_default=True,
        type=click.FloatRange(0, 86_400, min_open=True),
        help="Seconds a reply may take, its waiting in the server's queue included.",
    ),
    click.option("--retries", default=6, show_default=True, type=click.IntRange(min=0), help="On 429, 5xx, no answer."),
    click.option("--request-options", type=JsonObject(), metavar="JSON", help="More fields for each request's body."),
)


def check_engine_options(ctx: click.Context, model: str | None, endpoint: str | None) -> None:
    """Refuse options of the engine that is not used. Raises: click.UsageError."""
    if not model and not endpoint:
        raise click.UsageError("name a model: --model FILE.gguf, --model HUB_REPO or --endpoint URL")
    for name in MODEL_ONLY if endpoint else ENDPOINT_ONLY:
        if ctx.get_parameter_source(name).name == "COMMANDLINE":
            flag, need = name.replace("_", "-"), "--model without --endpoint" if endpoint else "--endpoint"
            raise click.UsageError(f"--{flag} is for {need}")
