"""`gradret bench quality` and `eval`: parse, call one function, print. Heavy imports stay inside the commands."""

import json
from pathlib import Path

import click

from gradret.console import command_line, say, show_wait
from gradret.errors import GradretError
from gradret.files import check_writable, open_folder, replace_json
from gradret.gen_options import Shard
from gradret.launch import require_one
from gradret.options import BUDGET_OPTIONS, DEVICE, ENCODER_OPTIONS, JSON, MEASURES, POSITIVE, QUIET, make_settings
from gradret.settings import PRECISIONS

BESIDE_CONFIG = ("config", "out", "report", "shard", "max_runs", "fresh", "device", "as_json")


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
@click.option("--config", type=click.Path(), help="A TOML file that says what to run, instead of the options here.")
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
    default="infonce,wasserstein",
    show_default=True,
    help="Rows, separated by commas; wasserstein:2 is its order 2.",
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
@click.option("--report", type=click.Path(), metavar="DIR", help="Write a page with all tables and charts, too.")
@click.option("--shard", type=Shard(), metavar="i/n", help="Only every n-th run, from the i-th.")
@click.option(
    "--max-runs", type=click.IntRange(min=0), help="End after so many runs; 0 only shows what is in --out, as it is."
)
@click.option("--fresh", is_flag=True, help="Do the runs again that are in --out already.")
@ENCODER_OPTIONS
@BUDGET_OPTIONS
@DEVICE
@QUIET
@JSON
@click.pass_context
def quality(
    ctx, config, data, datasets, losses, seeds, measures, out, report, shard, max_runs, fresh, device, as_json, **given
):
    """Train each loss on the same lists, seeds and budget; compare with InfoNCE and the untrained encoder.

    By default on the bundled sample: trains on its odd-numbered queries, measures on the even-numbered ones among all
    its passages. A dataset is a BEIR directory, an ir_datasets id or a ranking-list file; after a '?' come
    queries=even|odd|FILE, grades=OLD:NEW,... (others stay) and drop_self=yes|no.

    With --config a file names encoders, data, collections, systems and the experiments that join them. Every finished
    run is a line of rows.jsonl in --out: stopped at any moment, the same command does the rest.

    \b
    gradret bench quality --config benchmarks/quality.toml --out results --report page
    """
    require_one("bench quality")
    if fresh and max_runs == 0:
        raise click.UsageError("--fresh does runs again, and --max-runs 0 does none; leave one out")
    if config is not None:
        _refuse_options(ctx)
    from gradret.grid_file import make_grid, parse_loss, read_grid
    from gradret.report import require_bench_extra

    names = losses.split(",")
    try:
        for name in names:
            parse_loss(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--losses") from None
    require_bench_extra()
    if config is not None:
        grid = read_grid(config)
    else:
        given["data"] = data or ("sample?queries=odd",)
        chosen = {"losses": names, "seeds": seeds, "measures": _split_measures(measures)}
        base = make_settings(given | {"loss": parse_loss(names[0])["loss"]})  # each row's is checked with its own loss
        grid = make_grid(base, datasets=datasets or ("sample?queries=even",), **chosen)
    open_folder(out, "quality.json", "quality.png")
    if report is not None:
        open_folder(report, "index.html")
    with show_wait("loading PyTorch"):
        from gradret.bench import ROWS_FILE, run_grid
    from gradret.grid_rows import GridRows
    from gradret.quality_page import write_page
    from gradret.quality_report import draw_quality, format_quality, make_document

    outcome = run_grid(grid, out, device=device, shard=shard or (1, 1), max_runs=max_runs, fresh=fresh)
    facts = {"command": command_line(), "collections": outcome.collections}
    document = make_document(grid, outcome.rows, facts)
    with GridRows(Path(out, ROWS_FILE)).locked():  # processes that share a folder may end at the same time
        replace_json(Path(out, "quality.json"), document)
        draw_quality(document, Path(out, "quality.png"))
        if report is not None:
            write_page(document, Path(report))
    click.echo(json.dumps(document) if as_json else format_quality(document))
    page = f", {report}/index.html" if report is not None else ""
    say(f"written: {out}/quality.json, {out}/quality.png{page}")
    if outcome.error is not None:
        raise GradretError(outcome.error)


def _refuse_options(ctx: click.Context) -> None:
    """--config stands alone but for options that say how and where to run."""
    for parameter in ctx.command.params:
        named = ctx.get_parameter_source(parameter.name) == click.core.ParameterSource.COMMANDLINE
        if named and parameter.name not in BESIDE_CONFIG:
            raise click.UsageError(f"{parameter.opts[0]} is for a run without --config; set it in the file instead")


def _split_measures(text: str) -> list[str]:
    from gradret.evaluation import split_measures

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
        from gradret.encoder_load import choose_precision, load_encoder
    from gradret.evaluation import evaluate, parse_measures, split_measures
    from gradret.processes import join_processes
    from gradret.report import format_table
    from gradret.retrieve import default_cache
    from gradret.runs import write_run
    from gradret.sources import open_collection, parse_grade_map, parse_source
    from gradret.versions import versions

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
