"""The command line: parse, call one function, print. Heavy imports stay inside the commands."""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import click

from gradret.console import (
    GradretError,
    Interrupted,
    StopRequest,
    be_quiet,
    command_line,
    count_of,
    count_processes,
    require_one,
    say,
    show_wait,
)
from gradret.data.export import FORMS
from gradret.data.lists import quote
from gradret.data.sources import parse_count, parse_options
from gradret.files import check_writable, open_folder, read_object, write_json
from gradret.generate.queries import parse_shard
from gradret.options import (
    Command,
    Parsed,
    collect_settings,
    make_settings,
    option,
    options,
    set_option,
    setting_options,
)
from gradret.settings import (
    DATA,
    DEFAULT_ENCODER,
    DEFAULT_LOSS,
    DEFAULT_MEASURES,
    ENCODER,
    ENGINE,
    FIRST,
    MEDQUAD,
    MEMORY,
    PRECISIONS,
    QUERIES,
    SAMPLE,
    WRITTEN,
    FitSettings,
    GenSettings,
    find_unused,
    takes_setting,
)

AT_LEAST_1 = click.IntRange(min=1)
JSON = option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
QUIET = option(
    "--quiet",
    "-q",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, param, given: be_quiet(given),
    help="Only results and errors: no progress, no notes.",
)
DEVICE = option("--device", group=MEMORY, help="cuda, cuda:1, mps or cpu; by default the first of them that is there.")
MEASURES = option("--measures", default=",".join(DEFAULT_MEASURES), help="ir_measures names, separated by commas.")

MODEL_ONLY = ("sequences", "context", "gpu_layers", "threads")
OWN_FIELDS = ("stream", "n", "seed", "temperature", "top_p", "logprobs", "top_logprobs")
MEASURED_LISTS = 200  # whose order closes a run
ENDPOINT_ONLY = ("concurrency", "timeout", "retries", "request_options")


def parse_length(text):
    """MIN:MAX. Raises: ValueError."""
    low, colon, high = text.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal()):
        raise ValueError(f"'{text}' is not two whole numbers joined by ':', such as 100:1000")
    return int(low), int(high)


def parse_request_options(text):
    """A JSON object with fields of a request: those that gradret does not set itself, or null. Raises: ValueError."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"'{text}' is not a JSON object")
    if own := [name for name, value in found.items() if name in OWN_FIELDS and value is not None]:
        raise ValueError(f"'{own[0]}' is set by gradret itself; give null, and it is not sent")
    if needed := found.keys() & {"model", "messages"}:
        raise ValueError(f"'{min(needed)}' is set by gradret itself; leave it out")
    return found


engine_option = partial(option, group=ENGINE)
ENGINE_OPTIONS = options(
    engine_option(
        "--model",
        metavar="FILE|HUB_REPO[:FILE]",
        help="GGUF model; with --endpoint, the name it is served by. [default: Qwen2.5-1.5B-Instruct, 1.1 GB]",
    ),
    engine_option("--endpoint", metavar="URL", help="An OpenAI-compatible server's, such as http://localhost:8000/v1."),
    engine_option("--sequences", default=16, type=AT_LEAST_1, help="Replies written at once."),
    engine_option("--context", type=AT_LEAST_1, help="Tokens of a prompt and its reply. [default: what they need]"),
    engine_option("--gpu-layers", default=-1, type=click.IntRange(min=-1), help="-1 for all."),
    engine_option("--threads", type=AT_LEAST_1, help="[default: the processor's cores]"),
    engine_option(
        "--concurrency",
        default=32,
        type=AT_LEAST_1,
        help="Requests at once; fewer for a server that answers one after the other.",
    ),
    engine_option(
        "--timeout",
        default=600.0,
        type=click.FloatRange(0, 86_400, min_open=True),
        help="Seconds a reply may take, its waiting in the server's queue included.",
    ),
    engine_option("--retries", default=6, type=click.IntRange(min=0), help="On 429, 5xx, no answer."),
    engine_option(
        "--request-options",
        type=Parsed("json", parse_request_options),
        metavar="JSON",
        help="More fields for each request's body; null leaves a field out.",
    ),
)


def check_engine_options(ctx: click.Context, endpoint: str | None) -> None:
    """Refuse options of the engine that is not used. Raises: click.UsageError."""
    for name in MODEL_ONLY if endpoint else ENDPOINT_ONLY:
        if ctx.get_parameter_source(name).name == "COMMANDLINE":
            flag, need = name.replace("_", "-"), "runs without --endpoint" if endpoint else "--endpoint"
            raise click.UsageError(f"--{flag} is for {need}")


@click.command(cls=Command, short_help="Train an encoder on graded lists.")
@setting_options(FitSettings)
@option("--out", group=FIRST, default="gradret-model", type=click.Path(), help="Where the encoder and its run go.")
@DEVICE
@option("--resume", is_flag=True, help="Continue the unfinished run in --out, with its settings.")
@option("--tensorboard", is_flag=True, help="Write the run's curves for TensorBoard, too, to OUT/tensorboard.")
@set_option(FitSettings)
@QUIET
@JSON
def fit(out, device, resume, tensorboard, as_json, **given):
    """Fine-tune an encoder on graded lists and save it as a sentence-transformers directory.

    SOURCE is a JSONL file of ranking lists, a BEIR directory (DIR or DIR:SPLIT), an ir_datasets id, or `sample`, the
    bundled lists. After a '?' come options joined by '&': grades=1:3,0 (use these grades, 1 as 3), sample=K (at most
    K passages per query), queries=even|odd|FILE, labels=judged|agreed (of lists that gen --judge wrote). Without any
    option it trains on the bundled sample.

    \b
    gradret fit --data lists.jsonl --out model
    gradret fit --data lists.jsonl --data 'beir/scifact/train?grades=1:3&sample=2' --dev mine/dev.jsonl
    """
    chosen = collect_settings(given)
    if not resume:
        settings = choose_settings(chosen)  # what is wrong is told before the wait for imports
    with show_wait("loading PyTorch"):
        from gradret.distributed import join_processes
        from gradret.train import loop

    with join_processes(device) as (processes, device):
        if resume:  # settings come from the run, which the first process alone need have
            with processes.agree():
                stored = _read_settings(out) if processes.is_first else None
            stored = collect_settings(processes.broadcast(stored))
            settings = choose_settings(chosen, stored)  # what was spelled out must agree with the run
        result = loop.fit(settings, out, resume=resume, device=device, tensorboard=tensorboard, processes=processes)
    if not processes.is_first:
        return
    document = {
        "out": str(result.out),
        "steps": result.steps,
        "loss": result.loss,
        "dev": None if result.dev is None else {settings.dev_measure: result.dev, "step": result.dev_step},
        "share": result.share,
        "seconds": round(result.seconds, 1),
    }
    if as_json:
        click.echo(json.dumps(document))
    elif result.was_finished:
        click.echo(f"{result.out}: already finished, {count_of(result.steps, 'step')}")
    else:
        best = f", {settings.dev_measure} {result.dev:.4f} at step {result.dev_step}" if result.dev is not None else ""
        steps = count_of(result.steps, "step")
        kept = "" if settings.interpolate == 1 else f", saved at {result.share:g} of the way"
        click.echo(f"{result.out}: {steps}, last loss {result.loss:.4f}{best}, {result.seconds:.0f} s{kept}")


def choose_settings(chosen: dict, stored: dict | None = None) -> FitSettings:
    """The settings of a run, the stored ones under the chosen. Raises: click.UsageError."""
    settings = make_settings(FitSettings, (stored or {}) | chosen)
    refuse_unused(settings, chosen, [settings.loss])
    return settings


def refuse_unused(settings: FitSettings, chosen: dict, losses: list[str]) -> None:
    """Refuse a chosen setting that does nothing, also where it is the default. Raises: click.UsageError."""
    if unused := find_unused(settings, chosen, losses):
        raise click.UsageError(unused)


def _read_settings(out: str) -> dict:
    stored = read_object(Path(out, "gradret.json")).get("settings")
    if not isinstance(stored, dict):
        raise GradretError(f"{out}: holds no run to resume; check --out, or start one without --resume")
    if other := stored.keys() - {declared.name for declared in fields(FitSettings)}:
        raise GradretError(
            f"{out}: holds a run of another version of gradret, with the setting '{min(other)}'; choose another --out"
        )
    return stored


@click.command(cls=Command, short_help="Let an LLM write graded lists for queries.")
@click.argument("queries")
@option("--out", group=QUERIES, default="lists.jsonl", type=click.Path(), help="Where the lists go.")
@option(
    "--rejects",
    group=QUERIES,
    type=click.Path(),
    help="Where queries without a list go. [default: OUT's .rejects.jsonl]",
)
@option("--retry-rejects", group=QUERIES, is_flag=True, help="Try queries again that were rejected before.")
@option("--mix-settings", group=QUERIES, is_flag=True, help="Append to lists that were written with other settings.")
@option(
    "--shard",
    group=QUERIES,
    type=Parsed("shard", parse_shard),
    metavar="i/n",
    help="Only the i-th of n equal parts of the queries.",
)
@ENGINE_OPTIONS
@option(
    "--scale",
    group=WRITTEN,
    type=click.Path(),
    help="JSON file of grades, see docs/generate.md. [default: TREC Deep Learning, 3 to 0]",
)
@option(
    "--length",
    group=WRITTEN,
    type=Parsed("length", parse_length),
    metavar="MIN:MAX",
    help=f"Characters of a passage. [default: {GenSettings.min_chars}:{GenSettings.max_chars}]",
)
@setting_options(GenSettings)
@option("--show-prompt", is_flag=True, help="Print the first query's prompts, and stop.")
@QUIET
@JSON
@click.pass_context
def gen(
    ctx,
    queries,
    out,
    rejects,
    retry_rejects,
    mix_settings,
    shard,
    model,
    endpoint,
    scale,
    length,
    show_prompt,
    as_json,
    **given,
):
    """An LLM writes, for every query, a passage at each relevance grade.

    QUERIES is a JSONL file (query_id and query, or BEIR's _id and text), a TSV file (id, query), a text file with a
    query per line, a BEIR directory, an ir_datasets id, or - for standard input.

    Lists are appended to --out one by one; the same command goes on where it was stopped. What fails the checks is
    tried again with another seed, then recorded beside --out with the reason. A key for --endpoint is read from
    OPENAI_API_KEY.

    \b
    gradret gen queries.tsv
    gradret gen queries.tsv --model qwen2.5-7b-instruct-q4_k_m.gguf --out lists.jsonl
    gradret gen beir/scifact/train --endpoint http://localhost:8000/v1 --shard 1/4 --out lists-1.jsonl
    """
    require_one("gen", "; --shard i/n shares the queries out")
    from gradret.generate.journal import Journal
    from gradret.generate.prompts import TREC_DL, Prompts, read_scale
    from gradret.generate.queries import Query, read_queries, take_shard
    from gradret.generate.replies import Checks
    from gradret.generate.run import NO_REPLY, format_summary, generate, open_engine, settings_record

    check_engine_options(ctx, endpoint)
    chosen = {name: value for name, value in collect_settings(given).items() if name in vars(GenSettings())}
    if length is not None:
        chosen["min_chars"], chosen["max_chars"] = length
    settings = make_settings(GenSettings, chosen)
    prompts = Prompts(settings, read_scale(scale) if scale else TREC_DL)
    checks = Checks(settings, prompts.instructions)
    wanted = take_shard(read_queries(queries), shard or (1, 1))
    if show_prompt:
        query = next((q for q in wanted if q.text.strip()), Query("", ""))
        shown = [prompts.plan(query, part, thing="...") for part in prompts.plan_parts]
        for request in [*shown, prompts.write(query, prompts.scale.grades[0], query.text)]:
            for message in request.messages:
                click.echo(f"[{message['role']}]\n{message['content']}\n")
        return
    with ExitStack() as stack:
        # First the files: a model is not loaded for nothing.
        journal = stack.enter_context(Journal(Path(out), rejects and Path(rejects)))
        of_engine = {name: given[name] for name in (ENDPOINT_ONLY if endpoint else MODEL_ONLY)}
        with StopRequest() as stop:
            engine = open_engine(prompts.kinds(), settings, model, endpoint, **of_engine)
            stack.enter_context(closing(engine))
        if stop.signal is not None:
            raise Interrupted("stopped before anything was asked for")
        record = settings_record(prompts, engine.identity, given["request_options"])
        journal.resume(record, mix=mix_settings, retry_rejects=retry_rejects)
        journal.check_queries(wanted)
        first = f", the first {quote(wanted[0].text)}" if wanted else ""  # seen before anything is paid for
        say(f"gen: {count_of(len(wanted), 'query', 'queries')}{first}; {engine.describe()}")
        summary = generate(wanted, engine, prompts, checks, journal)
    document = {"out": out, "rejects": str(journal.rejects), **summary.as_dict()}
    if not as_json:  # before the encoder is loaded, which may take its time or fail
        click.echo(format_summary(document))
    order, warning = measure_written(out) if summary.lists else (None, "")
    if as_json:
        click.echo(json.dumps(document | {"order": order, "warning": warning or None}))
    elif order is not None:
        click.echo(f"pairs of passages that the default encoder has in the intended order: {order:.3f}")
        if warning:
            click.echo(warning)
    if unanswered := summary.rejected[NO_REPLY]:
        again = "run the same command again to ask for what is missing"
        advice = "mend the request options or the model" if summary.lasting == unanswered else again
        raise GradretError(
            f"{count_of(unanswered, 'query', 'queries')} got no reply (last: {summary.last_error}); {advice}"
        )


def measure_written(out):
    """Of MEASURED_LISTS of a file the share of pairs that the default encoder has in order, and a warning.

    None and "" where there is no such encoder; "" as the warning where enough are in order.
    """
    from gradret.data.lists import ListFile
    from gradret.encoder.load import load_encoder
    from gradret.evaluation.order import measure_order

    lists = ListFile(out)
    step = -(-len(lists) // MEASURED_LISTS)
    try:
        order = measure_order([lists[i] for i in range(0, len(lists), step)], load_encoder()).encoder
    except GradretError as error:  # the lists are written all the same
        say(f"whether the grades follow an encoder's order was not measured: {error}")
        return None, ""
    warning = order.warn()
    return order.share, f"{warning}; look at them with `gradret look {out}` before training" if warning else ""


@click.command(cls=Command, short_help="Look at lists before training on them.")
@click.argument("lists", nargs=-1, required=True)
@option("--encoder", default=DEFAULT_ENCODER, help="Directory or hub repository.")
@option("--draw", default=10, type=click.IntRange(min=0), help="Lists printed for reading.")
@option("--seed", default=0, type=click.IntRange(min=0), help="Of the draw, and of what sources draw.")
@option("--html", "page", type=click.Path(), metavar="FILE", help="Write it all as one page for a browser, too.")
@DEVICE
@QUIET
@JSON
def look(lists, encoder, draw, seed, page, device, as_json):
    """Show what can be seen of ranking lists before anything is trained on them.

    LISTS are what fit --data takes. Shown are how many pairs of passages an encoder, and the judge of gen --judge, put
    in the order of their grades; grades that are missing; the grades' lengths and similarities to the query; passages
    that repeat another list's; and some lists to read. It is a report: no list is changed or left out.

    \b
    gradret look lists.jsonl
    gradret look lists.jsonl --draw 40 --html lists.html
    """
    require_one("look")
    from gradret.data.sources import MixedLists, check_lists, parse_source

    if page:
        check_writable(page)
    mixed = MixedLists([parse_source(source) for source in lists], seed=seed)
    checked = check_lists(mixed, refuse_negative=False)
    say(f"look: {checked}")
    with show_wait("loading PyTorch"):
        from gradret.encoder.load import load_encoder
        from gradret.evaluation.order import measure_order
        from gradret.look import describe_lists, draw_lists, format_lists, format_page
    model = load_encoder(encoder, device=device)
    kept = checked.kept.tolist()
    order = measure_order(map(mixed.__getitem__, kept), model, total=len(kept))
    drawn = [(mixed[kept[i]], order.similarities[i]) for i in draw_lists(len(kept), draw, seed)]
    document = describe_lists(" ".join(lists), encoder, model.config.similarity, order, drawn)
    click.echo(json.dumps(document) if as_json else format_lists(document))
    if page:
        Path(page).write_text(format_page(document), encoding="utf-8")
        say(f"written: {page}")


@click.command(cls=Command, short_help="Convert lists to and from other formats.")
@click.argument("source")
@option("--format", "form", required=True, type=click.Choice(FORMS))
@option("--out", required=True, type=click.Path(), help="Folder; for tevatron and lists, file.")
@option("--positive-from", type=float, help="tevatron: the lowest positive grade. [default: each list's highest]")
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


def parse_shapes(text):
    """BxN of lists and documents, or BxNxD of queries, documents and dimensions, by commas. Raises: ValueError."""
    shapes = []
    for part in text.split(","):
        if not re.fullmatch("[0-9]{1,9}(x[0-9]{1,9}){1,2}", part):
            raise ValueError(f"'{part}' is not BxN or BxNxD in whole numbers, such as 512x2048 or 2048x16384x384")
        shape = tuple(map(int, part.split("x")))
        if min(shape) < 1 or shape[1] < 2:
            raise ValueError(f"'{part}' has too little: two documents and one of everything else at least")
        shapes.append(shape)
    if len(set(shapes)) < len(shapes):
        raise ValueError(f"'{text}': the same shape stands there twice")
    return shapes


@click.command(cls=Command, short_help="Time losses and measure their peak memory.")
@option(
    "--shapes",
    default="64x256,512x2048,2048x16384x384",
    type=Parsed("shapes", parse_shapes),
    metavar="BxN|BxNxD,...",
    help="Lists x documents per list, or queries x documents x dimensions to score, too.",
)
@option("--all", "every", is_flag=True, help="Time gradret's other losses, and other ways to them, too.")
@option("--dtype", default="float32", type=click.Choice(("float32", "bfloat16", "float16")), help="Of the scores.")
@option("--repeats", default=30, type=AT_LEAST_1, help="Samples per row; slow rows take fewer.")
@option("--chart", is_flag=True, help="Draw loss.png, too.")
@option("--out", default="gradret-bench", type=click.Path(), help="Where loss.json and loss.png go.")
@DEVICE
@QUIET
@JSON
def loss(shapes, every, dtype, repeats, chart, out, device, as_json):
    """Time losses side by side, forward and backward, and measure their peak memory.

    The default loss, with grades prepared once and raw, and InfoNCE with one positive per list. With --all also its
    transport alone, the exact Wasserstein losses of orders 1 and 2, and the Gaussian one; from embeddings, all of them
    on a matrix of scores, beside scoring fused with the loss.

    Every row is first checked against float64. The rows take turns within one process, so compare within one run only.
    Stopped before the end, it leaves the shapes that it has done in loss.json.

    \b
    gradret bench loss
    gradret bench loss --shapes 512x4096 --all --chart
    """
    require_one("bench loss")
    from gradret.bench import require_matplotlib

    if chart:
        require_matplotlib()
    with show_wait("loading PyTorch"):
        from gradret.bench.loss import draw_speed, format_speed, measure_speed
    from gradret.encoder.load import choose_device
    from gradret.loss.kernels import describe_backend

    where = choose_device(device)
    open_folder(out, "loss.json", *["loss.png"] * chart)
    (say if as_json else click.echo)(f"path: {describe_backend(where)}")
    path, command = Path(out, "loss.json"), {"command": command_line()}
    options = {"device": device, "dtype": dtype, "repeats": repeats, "every": every}
    result = command | measure_speed(shapes, **options, keep=lambda result: write_json(path, command | result))
    if chart:
        draw_speed(result, Path(out, "loss.png"))
    click.echo(json.dumps(result) if as_json else format_speed(result))
    say(f"written: {out}/loss.json" + f", {out}/loss.png" * chart)


class Bench(click.Group):
    """A group that runs `quality` when no command is named."""

    def parse_args(self, ctx, args):
        named = bool(args) and (not args[0].startswith("-") or args[0] in ctx.help_option_names)
        if not named and not ctx.resilient_parsing:  # a shell that completes asks for the commands
            args = ["quality", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Bench, short_help="Measure retrieval quality or speed.")
def bench():
    """Measure retrieval quality, or the speed of losses. Without a command: quality."""


@bench.command(cls=Command, short_help="Train with each loss and compare (the default).")
@option("--data", group=FIRST, multiple=True, default=(SAMPLE,), metavar="SOURCE", help="Training lists, as of fit.")
@option(
    "--dataset",
    "datasets",
    group=FIRST,
    multiple=True,
    default=(MEDQUAD,),
    metavar="SOURCE",
    help="Collections to measure on.",
)
@option(
    "--model",
    "models",
    group=FIRST,
    multiple=True,
    default=(f"{DEFAULT_ENCODER}?layers=3", DEFAULT_ENCODER),
    metavar="ENCODER",
    help="Encoders, as of fit; ?layers=K keeps the first K layers.",
)
@option(
    "--losses",
    group=FIRST,
    default=f"infonce,{DEFAULT_LOSS}",
    help="Rows, separated by commas, each spelled as --loss of fit.",
)
@option("--seeds", group=FIRST, default=1, type=AT_LEAST_1, help="Runs per loss; p-values need two at least.")
@option(
    "--out",
    group=FIRST,
    default="gradret-bench",
    type=click.Path(),
    help="Where rows.jsonl, quality.json and quality.png go.",
)
@setting_options(FitSettings, without=("data", "model", "loss", "dev", "dev_every", "patience", "exclude", "seed"))
@DEVICE
@MEASURES
@option("--fresh", is_flag=True, help="Do the runs again that are in --out already.")
@set_option(FitSettings, without=("layers", "dev_measure", "checkpoint_every"))
@QUIET
@JSON
def quality(data, datasets, models, losses, seeds, out, device, measures, fresh, as_json, **given):
    """Train each loss on the same lists, seeds and budget; compare with InfoNCE and the untrained encoder.

    By default trains on the bundled sample and measures on a part of MedQuAD, questions on health whose answers people
    judged: with the first three layers of an encoder, which know nothing of retrieval yet, and with the whole of it.
    A dataset is a BEIR directory, an ir_datasets id or a ranking-list file; after a '?' come queries=even|odd|FILE,
    grades=OLD:NEW,... (others stay) and drop_self=yes|no.

    Every finished run is a line of rows.jsonl in --out: stopped at any moment, the same command does the rest.

    \b
    gradret bench quality --data lists.jsonl --dataset beir/scifact/test --model intfloat/e5-small-v2 --seeds 3
    """
    require_one("bench quality")
    from gradret.bench import require_matplotlib

    chosen, encoders = collect_settings(given) | {"data": data}, _parse_encoders(models)
    systems = {}
    for loss in losses.split(","):
        try:
            taken = {name: value for name, value in chosen.items() if takes_setting(loss, name)}
            settings = FitSettings(**taken, loss=loss)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--losses") from None
        if settings.loss in systems:  # perhaps in another spelling
            raise click.UsageError(f"--losses {losses}: the same loss stands there twice")
        systems[settings.loss] = settings
    refuse_unused(settings, chosen, list(systems))
    require_matplotlib()
    open_folder(out, "quality.json", "quality.png")
    with show_wait("loading PyTorch"):
        from gradret.bench.quality import format_quality, measure_quality

    document, error = measure_quality(
        {name: {loss: replace(s, **own) for loss, s in systems.items()} for name, own in encoders.items()},
        datasets=datasets,
        seeds=seeds,
        measures=measures,
        out=out,
        device=device,
        fresh=fresh,
    )
    click.echo(json.dumps(document) if as_json else format_quality(document))
    say(f"written: {out}/quality.json, {out}/quality.png")
    if error is not None:
        raise GradretError(error)


def _parse_encoders(models: Sequence[str]) -> dict[str, dict]:
    """What tables call each encoder -> its settings."""
    forms = {"layers": (partial(parse_count, low=1), "a whole number above 0")}
    chosen: list[dict] = []
    for text in models:
        model, _, query = text.partition("?")
        if not model:
            raise click.BadParameter(f"'{text}' names no encoder", param_hint="--model")
        settings = {"model": model, **parse_options(text, filter(None, query.split("&")), forms, "layers=K")}
        if settings not in chosen:
            chosen.append(settings)
    parts = {one["model"]: Path(one["model"]).absolute().parts for one in chosen}
    # The fewest last parts of their paths that tell them apart.
    depth = next((d for d in range(1, 99) if len({p[-d:] for p in parts.values()}) == len(parts)), 0)
    shown = {model: "/".join(parts[model][-depth:]) if depth else model for model in parts}
    found = {}
    for one in chosen:
        kept = f", {count_of(one['layers'], 'layer')}" if "layers" in one else ""
        found[shown[one["model"]] + kept] = one
    return found


@bench.command("eval", cls=Command, short_help="Measure one encoder on one collection.")
@setting_options(FitSettings, only=("model", *FitSettings().encoder_options))
@option(
    "--dataset",
    group=FIRST,
    default="sample",
    metavar="SOURCE",
    help="BEIR directory, ir_datasets id or ranking-list file.",
)
@option("--queries", group=DATA, metavar="even|odd|FILE", help="Only these queries; FILE holds one id per line.")
@option("--grade-map", group=DATA, metavar="OLD=NEW,...", help="Other values for some grades of the qrels.")
@option(
    "--drop-self/--keep-self",
    group=DATA,
    default=None,
    show_default=False,
    help="Leave out a document whose id is the query's. [default: for ArguAna and Quora]",
)
@MEASURES
@option("--depth", default=1000, type=AT_LEAST_1, help="Documents ranked for each query.")
@option("--run", "run_file", type=click.Path(), help="Write the ranking as a TREC run.")
@option("--cache", type=click.Path(), help="Folder of corpus embeddings. [default: $GRADRET_CACHE or ~/.cache/gradret]")
@option("--batch-size", group=MEMORY, default=32, type=AT_LEAST_1, help="Texts encoded at once.")
@option("--precision", group=MEMORY, default="float32", type=click.Choice(PRECISIONS), help="Of encoding.")
@DEVICE
@set_option(FitSettings, ENCODER)
@QUIET
@JSON
def evaluate_command(
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
    **given,
):
    """Measure one encoder on one collection: exact search, ir_measures.

    \b
    gradret bench eval --model model --dataset beir/scifact/test
    gradret bench eval --model model --dataset cranfield --queries even --grade-map=-1=4,1=4,2=3,3=2,4=1
    """
    with show_wait("loading PyTorch"):
        from gradret.encoder.load import choose_precision, load_encoder
    from gradret.bench import format_table
    from gradret.data.sources import open_collection, parse_grade_map, parse_source
    from gradret.distributed import join_processes
    from gradret.evaluation.measures import evaluate, parse_measures, split_measures
    from gradret.evaluation.search import default_cache, write_run
    from gradret.files import versions

    settings = make_settings(FitSettings, collect_settings(given))
    with join_processes(device) as (processes, where):
        with processes.agree():
            names = list(parse_measures(split_measures(measures), depth))
            if run_file and processes.is_first:
                check_writable(run_file)
            grades = parse_grade_map(grade_map) if grade_map else None
            flags = {"queries": queries, "grades": grades, "drop_self": drop_self}
            source = replace(parse_source(dataset), **{k: v for k, v in flags.items() if v is not None})
            collection = open_collection(source)
            encoder = load_encoder(settings.model, device=where, **settings.encoder_options)
            precision = choose_precision(precision, encoder.device)
        if processes.is_first:
            size = count_of(len(collection.queries), "query", "queries")
            size += f", {count_of(collection.document_count, 'document')}"
            shared = f", {processes.size} processes" if processes.size > 1 else ""
            say(f"eval: {settings.model} on {dataset}, {size}{shared}")
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
        "model": settings.model,
        "dataset": dataset,
        "queries": len(collection.queries),
        "documents": collection.document_count,
        "selection": {"queries": source.queries, "grades": source.grades, "drop_self": collection.drop_self},
        "depth": depth,
        "precision": precision,
        "measures": result.measures,
        "versions": versions(),
    }
    row = [settings.model, *(f"{value:.4f}" for value in result.measures.values())]
    click.echo(json.dumps(document) if as_json else format_table([dataset, *result.measures], [row]))
    if run_file:
        write_run(run_file, result.run)


class Commands(click.Group):
    """A group whose commands are shown in the order of their use."""

    def list_commands(self, ctx):
        return list(self.commands)

    def main(self, *arguments, **options):
        try:
            return super().main(*arguments, **options)
        except SystemExit as end:
            if "gradret.distributed" in sys.modules and count_processes() > 1:
                from gradret.distributed import end_process

                end_process(end.code)  # a number, from click
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="gradret", prog_name="gradret")
def main():
    """Dense retrievers without labels: an LLM writes graded lists, a list-wise Wasserstein loss trains on them."""


bench.add_command(loss)
for command in (gen, look, fit, export, bench):
    main.add_command(command)
