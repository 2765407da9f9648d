"""`gradret fit`: parse, call one function, print. Heavy imports stay inside the command."""

import json
from pathlib import Path

import click

from gradret.console import show_wait
from gradret.errors import GradretError
from gradret.files import read_object
from gradret.options import (
    BUDGET_OPTIONS,
    DEFAULTS,
    DEVICE,
    ENCODER_OPTIONS,
    JSON,
    POSITIVE,
    QUIET,
    make_settings,
    option,
)
from gradret.settings import EARLIER, LOSS_NAMES, TAKEN_BY, FitSettings


@click.command()
@click.option(
    "--data", multiple=True, metavar="SOURCE", help="Training lists; again to merge several. [default: sample]"
)
@click.option(
    "--out", default="gradret-model", show_default=True, type=click.Path(), help="Where the encoder and its run go."
)
@click.option("--resume", is_flag=True, help="Continue the unfinished run in --out, with its settings.")
@option("--loss", type=click.Choice(LOSS_NAMES), help="The loss over a list.")
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
        from gradret.processes import join_processes
        from gradret.train import fit as train

    with join_processes(device) as (processes, device):
        if resume:  # settings come from the run, which the first process alone need have
            with processes.agree():
                stored = _read_settings(out) if processes.is_first else None
            stored = processes.broadcast(stored)
            # What was spelled out must agree with the run.
            given |= {k: v for k, v in stored.items() if k in given and k not in named}
            settings = _choose_settings(given, named)
        result = train(settings, out, resume=resume, device=device, tensorboard=tensorboard)
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
            option, losses = f"--{name.replace('_', '-')}", ", ".join(TAKEN_BY[name])
            raise click.UsageError(f"{option} is for --loss {losses}, not {settings.loss}; leave it out")
    return settings


def _read_settings(out: str) -> dict:
    stored = read_object(Path(out, "gradret.json")).get("settings")
    if not isinstance(stored, dict):
        raise GradretError(f"{out}: holds no run to resume; check --out, or start one without --resume")
    return EARLIER | stored
