"""`gradret gen`, `bench gen` and `export`: parse, call one function, print. Heavy imports stay inside the commands."""

import json
import re
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import click

from gradret.console import StopRequest, command_line, say
from gradret.errors import GradretError, Interrupted
from gradret.export import FORMS
from gradret.files import open_folder, write_json
from gradret.gen_options import (
    DEFAULTS,
    ENDPOINT_OPTIONS,
    GPU_LAYERS,
    LLAMA_OPTIONS,
    PROMPT_OPTIONS,
    THREADS,
    Shard,
    check_engine_options,
)
from gradret.launch import require_one
from gradret.options import JSON, POSITIVE, QUIET
from gradret.settings import SAMPLE, GenSettings
from gradret.sources import find_path


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
    from gradret.checks import Checks
    from gradret.generate import NO_REPLY, generate, request_kinds, settings_record
    from gradret.journal import Journal
    from gradret.prompts import Prompts, read_examples
    from gradret.queries import Query, read_queries, take_shard
    from gradret.scales import TREC_DL, read_scale
    from gradret.summary import format_summary

    check_engine_options(ctx, model, endpoint)
    given["min_chars"], given["max_chars"] = given.pop("length")
    try:
        settings = GenSettings(**{k: given[k] for k in vars(DEFAULTS)})
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    scale = read_scale(given["scale"]) if given["scale"] else TREC_DL
    examples = read_examples(given["examples"], scale, settings)
    if len(examples) < settings.shots and ctx.get_parameter_source("shots").name == "COMMANDLINE":
        raise click.UsageError(
            "--shots needs --examples here: the bundled ones do not fit the scale, language or length"
        )
    prompts = Prompts(settings, scale, examples)
    checks = Checks(settings, prompts.instructions(), examples)
    wanted = read_queries(queries)
    wanted = take_shard(wanted, shard) if shard else wanted
    if show_prompt:
        query = next((q for q in wanted if q.text.strip()), Query("", ""))
        grade = scale.grades[0] if settings.separate else None
        for message in prompts.write(query.text, prompts.draw_style(query.key), grade):
            click.echo(f"[{message['role']}]\n{message['content']}\n")
        return
    with ExitStack() as stack:
        engine = None

        def describe_settings() -> dict:  # asked for once OUT is open: a model is not loaded for nothing
            nonlocal engine
            with StopRequest() as stop:
                opened = open_engine(model, endpoint, request_kinds(prompts, settings), given)
            engine = stack.enter_context(closing(opened))
            if stop.signal is not None:
                raise Interrupted("stopped before anything was asked for")
            return settings_record(settings, prompts, engine.identity, given["request_options"])

        journal = stack.enter_context(
            Journal(
                Path(out), rejects and Path(rejects), describe_settings, mix=mix_settings, retry_rejects=retry_rejects
            )
        )
        journal.check_queries(wanted)
        say(f"gen: {len(wanted)} queries, {engine.describe()}")
        summary = generate(wanted, engine, prompts, checks, journal, settings)
    document = {"out": out, "rejects": str(journal.rejects), **summary.as_dict()}
    click.echo(json.dumps(document) if as_json else format_summary(document))
    if unanswered := summary.rejected[NO_REPLY]:
        raise GradretError(
            f"{unanswered} queries got no reply (last: {summary.last_error}); "
            "run the same command again to ask for them"
        )


def open_engine(model: str | None, endpoint: str | None, kinds, given: dict):
    """The engine that the options name. Raises: GradretError."""
    if endpoint:
        from gradret.chat_protocol import read_key
        from gradret.endpoint import Endpoint

        return Endpoint(
            endpoint,
            model=model,
            concurrency=given["concurrency"],
            timeout_s=given["timeout"],
            retries=given["retries"],
            temperature=given["temperature"],
            top_p=given["top_p"],
            options=given["request_options"],
            key=read_key(),
        )
    from gradret.hub_gguf import locate_gguf
    from gradret.llama import LlamaEngine
    from gradret.llama_sampler import Sampling

    return LlamaEngine(
        locate_gguf(model),
        kinds,
        sequences=given["sequences"],
        context=given["context"],
        gpu_layers=given["gpu_layers"],
        threads=given["threads"],
        sampling=Sampling(given["temperature"], given["top_p"]),
    )


@click.command("gen")
@click.option(
    "--model", metavar="FILE|HUB_REPO[:FILE]", help="GGUF model. [default: random weights, Qwen2-0.5B's size]"
)
@click.option("--sequences", default=16, show_default=True, type=POSITIVE, help="Replies the engine writes at once.")
@click.option("--queries", default=32, show_default=True, type=click.IntRange(1, 95), help="Of the sample, a round.")
@click.option("--loop-queries", default=3, show_default=True, type=POSITIVE, help="The same for the loop.")
@click.option("--max-tokens", default=256, show_default=True, type=POSITIVE, help="Of a reply.")
@click.option("--repeats", default=3, show_default=True, type=POSITIVE, help="Rounds.")
@GPU_LAYERS
@THREADS
@click.option("--out", default="gradret-bench", show_default=True, type=click.Path(), help="Where gen.json goes.")
@QUIET
@JSON
def bench_gen(model, queries, out, as_json, **given):
    """Time the llama.cpp engine against a loop over llama-cpp-python's create_chat_completion.

    The same model, prompts, sampler and token cap, without a grammar and with one; rounds take turns.
    """
    require_one("bench gen")
    from gradret.engine_speed import format_engine_speed, measure_engine
    from gradret.hub_gguf import locate_gguf
    from gradret.prompts import Prompts, read_examples
    from gradret.queries import read_queries
    from gradret.random_gguf import write_random_gguf
    from gradret.scales import TREC_DL

    open_folder(out, "gen.json")
    settings = GenSettings()
    prompts = Prompts(settings, TREC_DL, read_examples(None, TREC_DL, settings))
    sample = read_queries(str(find_path(SAMPLE)))[1:]  # the first is the prompt's example
    with tempfile.TemporaryDirectory(prefix="gradret-") as temporary:
        path = locate_gguf(model) if model else Path(temporary, "random.gguf")
        if not model:  # a vocabulary with the prompts' words, so that they are as long as in a real one
            texts = [prompts.instructions(), Path(find_path(SAMPLE)).read_text(encoding="utf-8")]
            write_random_gguf(path, words=sorted(set(re.findall("[A-Za-z]+", " ".join(texts)))))
        result = {"command": command_line()} | measure_engine(path, prompts, sample[:queries], settings, **given)
    write_json(Path(out, "gen.json"), result)
    click.echo(json.dumps(result) if as_json else format_engine_speed(result))
    say(f"written: {out}/gen.json")


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
    from gradret.export import export_lists

    if positive_from is not None and form != "tevatron":
        raise click.UsageError("--positive-from is for --format tevatron; the other formats keep the grades")
    counts = export_lists(source, form, Path(out), positive_from=positive_from)
    click.echo(
        json.dumps({"out": out, **counts}) if as_json else f"{out}: " + ", ".join(f"{v} {k}" for k, v in counts.items())
    )
