"""The command line: parse, call one function, print. Heavy imports stay inside the commands."""

import json
import re
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from gradret.console import (
    GradretError,
    Interrupted,
    StopRequest,
    ToldElsewhere,
    be_quiet,
    command_line,
    count_processes,
    require_one,
    say,
    show_wait,
)
from gradret.data.export import FORMS
from gradret.files import check_writable, open_folder, read_object, write_json
from gradret.generate.queries import parse_shard
from gradret.settings import (
    AUTO,
    DEFAULT_LOSS,
    DEFAULT_MEASURES,
    GROUNDS,
    LOSSES,
    POOLINGS,
    PRECISIONS,
    SCHEDULES,
    SIMILARITIES,
    TARGETS,
    WEIGHTS,
    FitSettings,
    GenSettings,
    find_takers,
    parse_loss,
    spell_loss,
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


class LossType(click.ParamType):
    """The name of a loss, or names with weights; in one spelling."""

    name = "loss"

    def convert(self, value, param, ctx):
        try:
            return spell_loss(parse_loss(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx, param, incomplete):
        return [CompletionItem(name) for name in LOSSES if name.startswith(incomplete)]


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


GEN_DEFAULTS = GenSettings()
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
        "--shots", default=GEN_DEFAULTS.shots, show_default=True, type=click.IntRange(min=0), help="How many of them."
    ),
    click.option("--language", help="ISO 639-1 code that passages must be in. [default: the query's, unchecked]"),
    click.option(
        "--length",
        default=f"{GEN_DEFAULTS.min_chars}:{GEN_DEFAULTS.max_chars}",
        show_default=True,
        type=Length(),
        metavar="MIN:MAX",
        help="Characters of a passage.",
    ),
    click.option("--temperature", default=GEN_DEFAULTS.temperature, show_default=True, type=click.FloatRange(min=0)),
    click.option("--top-p", default=GEN_DEFAULTS.top_p, show_default=True, type=click.FloatRange(0, 1, min_open=True)),
    click.option("--max-tokens", type=POSITIVE, help="Of a reply. [default: enough for passages of the full length]"),
    click.option("--seed", default=GEN_DEFAULTS.seed, show_default=True, type=click.IntRange(min=0)),
    click.option(
        "--attempts", default=GEN_DEFAULTS.attempts, show_default=True, type=POSITIVE, help="Replies before a reject."
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


@click.command()
@click.option(
    "--data", multiple=True, metavar="SOURCE", help="Training lists; again to merge several. [default: sample]"
)
@click.option(
    "--out", default="gradret-model", show_default=True, type=click.Path(), help="Where the encoder and its run go."
)
@click.option("--resume", is_flag=True, help="Continue the unfinished run in --out, with its settings.")
@option(
    "--loss",
    type=LossType(),
    metavar="NAME[:WEIGHT+...]",
    help=f"The loss over a list, or several whose weights sum to 1: {', '.join(LOSSES)}.",
)
@option("--positive-from", type=float, help="Lowest grade positive to infonce. [default: each list's highest]")
@ENCODER_OPTIONS
@BUDGET_OPTIONS
@click.option(
    "--exclude",
    multiple=True,
    metavar="SOURCE",
    help="A collection to be measured later: its queries are not trained on.",
)
@option("--seed", type=int, help="Of the lists' order, of sampling and of dropout.")
@option("--dev", metavar="SOURCE", help="A collection to measure while training; the best model is kept.")
@option("--dev-every", type=POSITIVE, help="Steps between dev measurements.")
@option("--dev-measure", help="An ir_measures name.")
@option("--patience", type=POSITIVE, help="End after so many dev measurements without a new best.")
@option("--checkpoint-every", type=POSITIVE, help="Steps between checkpoints.")
@click.option("--tensorboard", is_flag=True, help="Write the run's curves for TensorBoard, too, to OUT/tensorboard.")
@DEVICE
@QUIET
@JSON
@click.pass_context
def fit(ctx, out, resume, tensorboard, device, as_json, **given):
    """Fine-tune an encoder on graded lists and save it as a sentence-transformers directory.

    SOURCE is a JSONL file of ranking lists, a BEIR directory (DIR or DIR:SPLIT), an ir_datasets id, or `sample`, the
    bundled lists. After a '?' come options joined by '&': grades=1:3,0 (use these grades, 1 as 3), sample=K (at most
    K passages a query), queries=even|odd|FILE, labels=judged|agreed (of lists that gen --judge wrote). Without any
    option it trains on the bundled sample.

    \b
    gradret fit --data lists.jsonl --out model
    gradret fit --data lists.jsonl --data 'beir/scifact/train?grades=1:3&sample=2' --dev mine/dev.jsonl
    """
    given["data"] = given["data"] or DEFAULTS.data
    named = {name for name in given if ctx.get_parameter_source(name).name == "COMMANDLINE"}
    if not resume:
        settings = _choose_settings(given, named)  # what is wrong is told before the wait for imports
    with show_wait("loading PyTorch"):
        from gradret.distributed import join_processes
        from gradret.train.loop import train

    with join_processes(device) as (processes, device):
        if resume:  # settings come from the run, which the first process alone need have
            with processes.agree():
                stored = _read_settings(out) if processes.is_first else None
            stored = processes.broadcast(stored)
            # What was spelled out must agree with the run.
            given |= {k: v for k, v in stored.items() if k in given and k not in named}
            settings = _choose_settings(given, named)
        result = train(settings, Path(out), processes, device, resume=resume, tensorboard=tensorboard)
    if not processes.is_first:
        return
    document = {
        "out": str(result.out),
        "steps": result.steps,
        "loss": result.loss,
        "dev": None if result.dev is None else {settings.dev_measure: result.dev, "step": result.dev_step},
        "seconds": round(result.seconds, 1),
    }
    if as_json:
        click.echo(json.dumps(document))
    elif result.was_finished:
        click.echo(f"{result.out}: already finished, {result.steps} steps")
    else:
        best = f", {settings.dev_measure} {result.dev:.4f} at step {result.dev_step}" if result.dev is not None else ""
        click.echo(f"{result.out}: {result.steps} steps, last loss {result.loss:.4f}{best}, {result.seconds:.0f} s")


def _choose_settings(given: dict, named: set[str]) -> FitSettings:
    """The run's settings. Refuses options that were named and that the loss has no use for."""
    settings = make_settings(given | {name: tuple(given[name]) for name in ("data", "exclude")})
    for name in sorted(named):
        if not settings.takes(name):
            option, takers = f"--{name.replace('_', '-')}", find_takers(name)
            losses = ", ".join(loss for loss in LOSSES if loss in takers)
            raise click.UsageError(f"{option} is for --loss {losses}, not {settings.loss}; leave it out")
    return settings


def _read_settings(out: str) -> dict:
    stored = read_object(Path(out, "gradret.json")).get("settings")
    if not isinstance(stored, dict):
        raise GradretError(f"{out}: holds no run to resume; check --out, or start one without --resume")
    return stored


@click.command()
@click.argument("queries")
@click.option("--model", metavar="FILE|HUB_REPO[:FILE]", help="GGUF model; with --endpoint, the name it is served by.")
@click.option("--endpoint", metavar="URL", help="An OpenAI-compatible server's, such as http://localhost:8000/v1.")
@click.option("--out", default="lists.jsonl", show_default=True, type=click.Path(), help="Where the lists go.")
@click.option("--rejects", type=click.Path(), help="Where queries without a list go. [default: OUT's .rejects.jsonl]")
@click.option("--retry-rejects", is_flag=True, help="Try queries again that were rejected before.")
@click.option("--mix-settings", is_flag=True, help="Append to lists that were written with other settings.")
@click.option("--shard", type=Shard(), metavar="i/n", help="Only the i-th of n equal parts of the queries.")
@PROMPT_OPTIONS
@LLAMA_OPTIONS
@ENDPOINT_OPTIONS
@click.option("--show-prompt", is_flag=True, help="Print the first query's prompt, and stop.")
@QUIET
@JSON
@click.pass_context
def gen(ctx, queries, model, endpoint, out, rejects, retry_rejects, mix_settings, shard, show_prompt, as_json, **given):
    """An LLM writes, for every query, a passage at each relevance grade.

    QUERIES is a JSONL file (query_id and query, or BEIR's _id and text), a TSV file (id, query), a text file with a
    query a line, a BEIR directory, an ir_datasets id, or - for standard input.

    Lists are appended to --out one by one; the same command goes on where it was stopped. What fails the checks is
    tried again with another seed, then recorded beside --out with the reason. A key for --endpoint is read from
    OPENAI_API_KEY.

    \b
    gradret gen queries.tsv --model qwen2.5-7b-instruct-q4_k_m.gguf --out lists.jsonl
    gradret gen beir/scifact/train --endpoint http://localhost:8000/v1 --shard 1/4 --out lists-1.jsonl
    """
    require_one("gen", "; --shard i/n shares the queries out")
    from gradret.generate.journal import Journal
    from gradret.generate.prompts import TREC_DL, Prompts, read_examples, read_scale
    from gradret.generate.queries import Query, read_queries, take_shard
    from gradret.generate.replies import Checks
    from gradret.generate.run import NO_REPLY, format_summary, generate, open_engine, settings_record

    check_engine_options(ctx, model, endpoint)
    given["min_chars"], given["max_chars"] = given.pop("length")
    try:
        settings = GenSettings(**{k: given[k] for k in vars(GEN_DEFAULTS)})
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    scale = read_scale(given["scale"]) if given["scale"] else TREC_DL
    examples = read_examples(given["examples"], scale, settings)
    if len(examples) < settings.shots and ctx.get_parameter_source("shots").name == "COMMANDLINE":
        raise click.UsageError(
            "--shots needs --examples here: the bundled ones do not fit the scale, language or length"
        )
    prompts = Prompts(settings, scale, examples)
    checks = Checks(settings, prompts.instructions, examples)
    wanted = read_queries(queries)
    wanted = take_shard(wanted, shard) if shard else wanted
    if show_prompt:
        query = next((q for q in wanted if q.text.strip()), Query("", ""))
        for message in prompts.write(query)[0].messages:
            click.echo(f"[{message['role']}]\n{message['content']}\n")
        return
    with ExitStack() as stack:
        # First the files: a model is not loaded for nothing.
        journal = stack.enter_context(Journal(Path(out), rejects and Path(rejects)))
        options = {name: given[name] for name in (ENDPOINT_ONLY if endpoint else MODEL_ONLY)}
        with StopRequest() as stop:
            engine = stack.enter_context(closing(open_engine(prompts.kinds(), settings, model, endpoint, **options)))
        if stop.signal is not None:
            raise Interrupted("stopped before anything was asked for")
        record = settings_record(prompts, engine.identity, given["request_options"])
        journal.resume(record, mix=mix_settings, retry_rejects=retry_rejects)
        journal.check_queries(wanted)
        say(f"gen: {len(wanted)} queries, {engine.describe()}")
        summary = generate(wanted, engine, prompts, checks, journal)
    document = {"out": out, "rejects": str(journal.rejects), **summary.as_dict()}
    click.echo(json.dumps(document) if as_json else format_summary(document))
    if unanswered := summary.rejected[NO_REPLY]:
        raise GradretError(
            f"{unanswered} queries got no reply (last: {summary.last_error}); "
            "run the same command again to ask for them"
        )


@click.command()
@click.argument("source")
@click.option("--format", "form", required=True, type=click.Choice(FORMS))
@click.option("--out", required=True, type=click.Path(), help="Folder; for tevatron and lists, file.")
@click.option("--positive-from", type=float, help="tevatron: the lowest positive grade. [default: each list's highest]")
@QUIET
@JSON
def export(source, form, out, positive_from, as_json):
    """Write ranking lists in a neighbour's format, or what a neighbour has as ranking lists.

    SOURCE is what fit --data takes: a ranking-list file, Tevatron's JSONL, a directory in BEIR's, Trove's or TREC's
    layout, an ir_datasets id.

    \b
    gradret export lists.jsonl --format beir --out lists-beir
    gradret export lists-trove --format lists --out lists.jsonl
    """
    require_one("export")
    from gradret.data.export import export_lists

    if positive_from is not None and form != "tevatron":
        raise click.UsageError("--positive-from is for --format tevatron; the other formats keep the grades")
    counts = export_lists(source, form, Path(out), positive_from=positive_from)
    click.echo(
        json.dumps({"out": out, **counts}) if as_json else f"{out}: " + ", ".join(f"{v} {k}" for k, v in counts.items())
    )


DTYPES = ("float32", "bfloat16", "float16")


class Shape(click.ParamType):
    """Whole numbers joined by x, as a tuple: two for lists x documents, three for queries x documents x dimensions."""

    name = "shape"

    def __init__(self, form: str, example: str):
        self.form, self.example = form, example

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        numbers = [int(n) for n in value.split("x") if re.fullmatch("[0-9]{1,9}", n)]
        if len(numbers) != len(self.form.split("x")) or len(numbers) != value.count("x") + 1:
            self.fail(f"'{value}' is not {self.form} in whole numbers, such as {self.example}", param, ctx)
        if min(numbers) < 1 or numbers[1] < 2:
            self.fail(f"'{value}' has too little: two documents and one of everything else at least", param, ctx)
        return tuple(numbers)


class Shapes(Shape):
    """Several, separated by commas."""

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        shapes = tuple(super(Shapes, self).convert(part, param, ctx) for part in value.split(","))
        if len(set(shapes)) < len(shapes):
            self.fail(f"'{value}': the same shape stands there twice", param, ctx)
        return shapes


class ShapeOrNone(Shape):
    """One, or `none`."""

    def convert(self, value, param, ctx):
        return () if value == "none" else super().convert(value, param, ctx)


@click.command()
@click.option(
    "--shapes",
    type=Shapes("BxN", "128x1024"),
    metavar="BxN,...",
    help="Lists x documents a list. [default: 16x64,128x1024,512x4096; on CUDA 512x4096,8192x1024,4096x65536]",
)
@click.option(
    "--retrieval",
    default="2048x16384x384",
    show_default=True,
    type=ShapeOrNone("BxNxD", "2048x16384x384"),
    metavar="BxNxD|none",
    help="Queries x documents x dimensions, to score and compare from embeddings.",
)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(DTYPES), help="Of the scores.")
@click.option(
    "--order", default="both", show_default=True, type=click.Choice(["1", "2", "both"]), help="The p of W_p^p."
)
@click.option("--repeats", default=30, show_default=True, type=POSITIVE, help="Samples a row; slow rows take fewer.")
@click.option(
    "--out", default="gradret-bench", show_default=True, type=click.Path(), help="Where loss.json and loss.png go."
)
@DEVICE
@QUIET
@JSON
def loss(shapes, retrieval, dtype, order, repeats, out, device, as_json):
    """Time losses side by side, forward and backward, and measure their peak memory.

    The exact Wasserstein losses of orders 1 and 2: gradret's, with grades prepared once and raw, and in plain PyTorch.
    Beside them the default loss, gradret's Gaussian loss, InfoNCE with one positive a list, and F.cross_entropy alone.
    From embeddings: scoring fused with the loss against a matrix of all scores.

    Every row is first checked against float64. The rows take turns within one process, so compare within one run only.
    Stopped before the end, it leaves the shapes that it has done in loss.part.json.

    \b
    gradret bench loss
    gradret bench loss --shapes 512x4096 --order 2 --retrieval none
    """
    require_one("bench loss")
    from gradret.bench.report import draw_speed, format_speed, require_bench_extra

    require_bench_extra()
    with show_wait("loading PyTorch"):
        from gradret.encoder.load import choose_device
    from gradret.bench.loss import measure_speed
    from gradret.loss.kernels import describe_backend

    where = choose_device(device)
    open_folder(out, "loss.json", "loss.part.json", "loss.png")
    (say if as_json else click.echo)(f"path: {describe_backend(where)}")
    part, command = Path(out, "loss.part.json"), {"command": command_line()}
    result = command | measure_speed(
        shapes,
        device=where,
        dtype=dtype,
        orders=(1, 2) if order == "both" else (int(order),),
        repeats=repeats,
        retrieval=retrieval or None,
        keep=lambda result: write_json(part, command | result),
    )
    write_json(Path(out, "loss.json"), result)
    part.unlink()
    draw_speed(result, Path(out, "loss.png"))
    click.echo(json.dumps(result) if as_json else format_speed(result))
    say(f"written: {out}/loss.json, {out}/loss.png")


class Bench(click.Group):
    """A group that runs `quality` when no command is named."""

    def parse_args(self, ctx, args):
        named = bool(args) and (not args[0].startswith("-") or args[0] in ctx.help_option_names)
        if not named and not ctx.resilient_parsing:  # a shell that completes asks for the commands
            args = ["quality", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Bench)
def bench():
    """Measure retrieval quality, or the speed of losses. Without a command: quality, on the bundled sample."""


@bench.command()
@click.option(
    "--data", multiple=True, metavar="SOURCE", help="Training lists, as of fit. [default: sample?queries=odd]"
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="SOURCE",
    help="Collections to measure on. [default: sample?queries=even]",
)
@click.option(
    "--losses",
    default=f"infonce,{DEFAULT_LOSS}",
    show_default=True,
    help="Rows, separated by commas, each spelled as --loss of fit.",
)
@click.option("--seeds", default=3, show_default=True, type=POSITIVE, help="Runs a loss.")
@MEASURES
@click.option(
    "--out",
    default="gradret-bench",
    show_default=True,
    type=click.Path(),
    help="Where rows.jsonl, quality.json and quality.png go.",
)
@click.option("--fresh", is_flag=True, help="Do the runs again that are in --out already.")
@ENCODER_OPTIONS
@BUDGET_OPTIONS
@DEVICE
@QUIET
@JSON
def quality(data, datasets, losses, seeds, measures, out, fresh, device, as_json, **given):
    """Train each loss on the same lists, seeds and budget; compare with InfoNCE and the untrained encoder.

    By default on the bundled sample: trains on its odd-numbered queries, measures on the even-numbered ones among all
    its passages. A dataset is a BEIR directory, an ir_datasets id or a ranking-list file; after a '?' come
    queries=even|odd|FILE, grades=OLD:NEW,... (others stay) and drop_self=yes|no.

    Every finished run is a line of rows.jsonl in --out: stopped at any moment, the same command does the rest.

    \b
    gradret bench quality --data lists.jsonl --dataset beir/scifact/test --losses infonce,wasserstein
    """
    require_one("bench quality")
    from gradret.bench.report import require_bench_extra

    given["data"] = data or ("sample?queries=odd",)
    systems = {name: make_settings(given | {"loss": name}) for name in losses.split(",")}
    require_bench_extra()
    open_folder(out, "quality.json", "quality.png")
    with show_wait("loading PyTorch"):
        from gradret.bench.quality import format_quality, measure_quality

    document, error = measure_quality(
        systems,
        datasets=datasets or ("sample?queries=even",),
        seeds=seeds,
        measures=_split_measures(measures),
        out=out,
        device=device,
        fresh=fresh,
    )
    click.echo(json.dumps(document) if as_json else format_quality(document))
    say(f"written: {out}/quality.json, {out}/quality.png")
    if error is not None:
        raise GradretError(error)


def _split_measures(text: str) -> list[str]:
    from gradret.evaluation.measures import split_measures

    return split_measures(text)


@bench.command("eval")
@ENCODER_OPTIONS
@click.option(
    "--dataset",
    default="sample",
    show_default=True,
    metavar="SOURCE",
    help="BEIR directory, ir_datasets id or ranking-list file.",
)
@click.option("--queries", metavar="even|odd|FILE", help="Only these queries; FILE holds an id a line.")
@click.option("--grade-map", metavar="OLD=NEW,...", help="Other values for some grades of the qrels.")
@click.option(
    "--drop-self/--keep-self",
    default=None,
    help="Leave out a document whose id is the query's. [default: for ArguAna and Quora]",
)
@MEASURES
@click.option("--depth", default=1000, show_default=True, type=POSITIVE, help="Documents ranked for each query.")
@click.option("--run", "run_file", type=click.Path(), help="Write the ranking as a TREC run.")
@click.option(
    "--cache", type=click.Path(), help="Folder of corpus embeddings. [default: $GRADRET_CACHE or ~/.cache/gradret]"
)
@click.option("--batch-size", default=32, show_default=True, type=POSITIVE, help="Texts encoded at once.")
@click.option("--precision", default="float32", show_default=True, type=click.Choice(PRECISIONS), help="Of encoding.")
@DEVICE
@QUIET
@JSON
def evaluate_command(
    model,
    dataset,
    queries,
    grade_map,
    drop_self,
    measures,
    depth,
    run_file,
    cache,
    batch_size,
    precision,
    device,
    as_json,
    **encoder_options,
):
    """Measure one encoder on one collection: exact search, ir_measures.

    \b
    gradret bench eval --model model --dataset beir/scifact/test
    gradret bench eval --model model --dataset cranfield --queries even --grade-map=-1=4,1=4,2=3,3=2,4=1
    """
    from dataclasses import replace

    with show_wait("loading PyTorch"):
        from gradret.encoder.load import choose_precision, load_encoder
    from gradret.bench.report import format_table
    from gradret.data.sources import open_collection, parse_grade_map, parse_source
    from gradret.distributed import join_processes
    from gradret.evaluation.measures import evaluate, parse_measures, split_measures
    from gradret.evaluation.search import default_cache, write_run
    from gradret.files import versions

    flags = {"queries": queries, "drop_self": drop_self}
    with join_processes(device) as (processes, where):
        with processes.agree():
            names = list(parse_measures(split_measures(measures), depth))
            if run_file and processes.is_first:
                check_writable(run_file)
            flags["grades"] = parse_grade_map(grade_map) if grade_map else None
            source = replace(parse_source(dataset), **{k: v for k, v in flags.items() if v is not None})
            collection = open_collection(source)
            encoder = load_encoder(model, device=where, **encoder_options)
            precision = choose_precision(precision, encoder.device)
        if processes.is_first:
            size = f"{len(collection.queries)} queries, {collection.document_count} documents"
            shared = f", {processes.size} processes" if processes.size > 1 else ""
            say(f"eval: {model} on {dataset}, {size}{shared}")
        result = evaluate(
            encoder,
            collection,
            measures=names,
            depth=depth,
            cache=Path(cache) if cache else default_cache(),
            batch_size=batch_size,
            precision=precision,
            processes=processes,
        )
    if not processes.is_first:
        return
    document = {
        "command": command_line(),
        "model": model,
        "dataset": dataset,
        "queries": len(collection.queries),
        "documents": collection.document_count,
        "selection": {"queries": source.queries, "grades": source.grades, "drop_self": collection.drop_self},
        "depth": depth,
        "precision": precision,
        "measures": result.measures,
        "versions": versions(),
    }
    click.echo(
        json.dumps(document)
        if as_json
        else format_table([dataset, *result.measures], [[model, *(f"{v:.4f}" for v in result.measures.values())]])
    )
    if run_file:
        write_run(run_file, result.run)


class Commands(click.Group):
    """A group whose commands end with one line and exit code 1 on a GradretError."""

    def main(self, *arguments, **options):
        try:
            return super().main(*arguments, **options)
        except SystemExit as end:
            if "gradret.distributed" in sys.modules and count_processes() > 1:
                from gradret.distributed import end_process

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
@click.version_option(package_name="gradret", prog_name="gradret")
def main():
    """Dense retrievers without labels: an LLM writes graded lists, a list-wise Wasserstein loss trains on them."""


bench.add_command(loss)
for command in (gen, fit, export, bench):
    main.add_command(command)
