"""Where `fit`'s learning rate, epochs and share of the way come from, and what else was tried with a strong encoder.

    python -m benchmarks.defaults ROWS

Each run is measured at several shares of the way from the encoder's own weights to the trained ones, or at the one that
fit has chosen. Trains on the lists of results/lists, or on 50, 100 or 200 of them, but for those with a query that is
measured; measures on development queries: the SciFact claims of dev-scifact.txt, Cranfield's of dev-cranfield.txt,
NPL's of odd numbers; among all documents: among a random part of them a strong encoder seems to gain where it loses.
Writes a line per run to ROWS and leaves out what is there. Needs the data that benchmarks/README.md names.
"""

import json
import tempfile
from pathlib import Path

import click

from benchmarks.quality.plan import DEV_CRANFIELD, DEV_SCIFACT, LISTS, MINILM, PARAPHRASE, THREE_LAYERS
from benchmarks.script import Script
from gradret.console import say
from gradret.encoder.load import choose_precision, load_encoder
from gradret.evaluation.measures import evaluate
from gradret.files import versions
from gradret.settings import AUTO, FitSettings
from gradret.train.interpolation import SHARES, copy_trained, interpolated
from gradret.train.loop import fit

COLLECTIONS = {
    "scifact": DEV_SCIFACT,
    "cranfield": DEV_CRANFIELD,
    "npl": "beir/npl?queries=odd",
}
ENCODERS = {"three layers": THREE_LAYERS, "paraphrase-MiniLM-L3-v2": PARAPHRASE, "all-MiniLM-L6-v2": MINILM}
RATES = (5e-5, 2e-4, 5e-4)
FEW = "lists"  # how many are trained on, no setting of fit: those for the queries of curve-50.txt or another
STRONG = "all-MiniLM-L6-v2"
TRIED = (  # with the strong one, beside what it has anyway
    {"loss": "infonce", "positive_from": 1.0},
    {"temperature": 0.05},
    {"temperature": 0.05, "learning_rate": 5e-5},
    {"batch_lists": 64, "epochs": 4.0},
    {"mine": "k=2,grade=0"},
)
BASE = {"interpolate": 1.0, "epochs": 2.0}  # of every run, before what it changes
RUNS = [(name, {"learning_rate": rate}) for name in ENCODERS for rate in RATES]
RUNS += [(STRONG, {"learning_rate": 2e-4} | changed) for changed in TRIED]
RUNS += [(name, {"learning_rate": 2e-4, "epochs": epochs, FEW: 50}) for name in ENCODERS for epochs in (2.0, 8.0)]
FEWER = ({FEW: 100}, {FEW: 200})
RUNS += [(name, {"learning_rate": 2e-4, "epochs": AUTO} | few) for name in ENCODERS for few in FEWER]
AS_IT_COMES = {"learning_rate": 2e-4, "epochs": AUTO, "interpolate": AUTO}
RUNS += [(name, AS_IT_COMES | few) for name in ENCODERS for few in ({}, *FEWER)]
MEASURE = "nDCG@10"


def measure(encoder) -> dict[str, float]:
    """nDCG@10 by collection."""
    options = {"measures": [MEASURE], "precision": choose_precision("auto", encoder.device), "progress": False}
    return {name: round(evaluate(encoder, s, **options).measures[MEASURE], 4) for name, s in COLLECTIONS.items()}


@click.command(cls=Script)
@click.argument("rows", type=click.Path(path_type=Path))
def main(rows):
    """Train each encoder with each of its settings, and measure it at shares of the way from its own weights."""
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    made = [{key: value for key, value in row.items() if key not in ("versions", "shares")} for row in done]
    untrained = {row["encoder"]: row["shares"]["0"] for row in done}
    for name, changed in RUNS:
        few = f"&queries=benchmarks/queries/curve-{changed[FEW]}.txt" if FEW in changed else ""
        settings = FitSettings(
            data=tuple(f"{source}{few}" for source in LISTS.values()),
            exclude=tuple(sorted(COLLECTIONS.values())),
            **ENCODERS[name] | BASE | {key: value for key, value in changed.items() if key != FEW},
        )
        told = {"encoder": name, "temperature": settings.temperature, "epochs": settings.epochs} | changed
        if told in made:
            continue
        encoder = load_encoder(settings.model, device="cpu", **settings.encoder_options)
        own = copy_trained(encoder)
        if name not in untrained:
            untrained[name] = measure(encoder)
        with tempfile.TemporaryDirectory(prefix="gradret-") as folder:
            result = fit(settings, Path(folder, "run"), device="cpu")
            encoder = load_encoder(str(Path(folder, "run")), device="cpu")
        shares = {"0": untrained[name]}
        if settings.interpolate == AUTO:
            shares[f"{result.share:g}"] = measure(encoder)
        else:
            for share in SHARES:
                with interpolated(encoder, own, share):
                    shares[f"{share:g}"] = measure(encoder)
        with open(rows, "a", encoding="utf-8") as file:
            file.write(json.dumps(told | {"versions": versions(), "shares": shares}) + "\n")
        say(f"{name}, {json.dumps(changed)}: {json.dumps(shares)}")


if __name__ == "__main__":
    main()
