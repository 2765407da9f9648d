"""Where `fit`'s learning rate and share of the way come from: each run is measured at several shares.

    python -m benchmarks.defaults ROWS

Trains on the lists of results/lists but for those with a query that is measured; measures on development queries: every
third of the SciFact claims of dev-scifact.txt, Cranfield's of dev-cranfield.txt, NPL's of odd numbers; among the
documents relevant to one of them and OTHERS more.
Writes a line per run to ROWS and leaves out what is there. Needs the data that benchmarks/README.md names.
"""

import json
import random
import tempfile
from pathlib import Path

import click

from benchmarks.quality.plan import CRANFIELD_CODES, LISTS, MINILM, PARAPHRASE, THREE_LAYERS
from benchmarks.script import Script
from gradret.console import say
from gradret.data.collections import Collection
from gradret.data.sources import open_collection, parse_source
from gradret.encoder.load import load_encoder
from gradret.evaluation.measures import evaluate
from gradret.files import versions
from gradret.settings import FitSettings
from gradret.train.loop import copy_trained, fit, interpolated

COLLECTIONS = {
    "scifact": "beir/scifact/train?queries=benchmarks/queries/dev-scifact.txt",
    "cranfield": f"cranfield?queries=benchmarks/queries/dev-cranfield.txt&{CRANFIELD_CODES}",
    "npl": "beir/npl?queries=odd",
}
ENCODERS = {"three layers": THREE_LAYERS, "paraphrase-MiniLM-L3-v2": PARAPHRASE, "all-MiniLM-L6-v2": MINILM}
RATES, SHARES, OTHERS = (5e-5, 2e-4, 5e-4), (1.0, 0.5, 0.25), 1000
MEASURE = "nDCG@10"


class Part(Collection):
    """Some queries of a collection, and of its documents the relevant ones and OTHERS more."""

    def __init__(self, whole: Collection, every: int):
        self.name, self.drop_self = whole.name, whole.drop_self
        self.queries = {q: whole.queries[q] for q in sorted(whole.queries)[::every]}
        self.qrels = {q: whole.qrels[q] for q in self.queries}
        relevant = {d for grades in self.qrels.values() for d, grade in grades.items() if grade > 0}
        documents = list(whole.documents())
        others = [d.doc_id for d in documents if d.doc_id not in relevant]
        kept = relevant.union(random.Random(0).sample(others, min(OTHERS, len(others))))
        self._documents = [d for d in documents if d.doc_id in kept]
        self.document_count = len(self._documents)

    def documents(self, start=0, characters=None):
        return iter(self._documents[start:])

    def read_documents(self, doc_ids, characters=None):
        return {d.doc_id: d for d in self._documents if d.doc_id in doc_ids}


def measure(encoder, parts: dict[str, Part]) -> dict[str, float]:
    """nDCG@10 by collection."""
    options = {"measures": [MEASURE], "progress": False}
    return {name: round(evaluate(encoder, part, **options).measures[MEASURE], 4) for name, part in parts.items()}


@click.command(cls=Script)
@click.argument("rows", type=click.Path(path_type=Path))
def main(rows):
    """Train each encoder at each rate, and measure it at shares of the way from its own weights."""
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    parts = {
        name: Part(open_collection(parse_source(s)), 1 + 2 * (name == "scifact")) for name, s in COLLECTIONS.items()
    }
    exclude = tuple(sorted(COLLECTIONS.values()))
    for name, options in ENCODERS.items():
        for rate in RATES:
            settings = FitSettings(
                data=tuple(LISTS.values()), exclude=exclude, learning_rate=rate, interpolate=1.0, **options
            )
            told = {"encoder": name, "learning_rate": rate, "temperature": settings.temperature}
            told |= {"epochs": settings.epochs}
            if any(told.items() <= row.items() for row in done):
                continue
            encoder = load_encoder(settings.model, device="cpu", **settings.encoder_options)
            own = copy_trained(encoder)
            row = told | {"versions": versions(), "shares": {"0": measure(encoder, parts)}}
            with tempfile.TemporaryDirectory(prefix="gradret-") as folder:
                fit(settings, Path(folder, "run"), device="cpu")
                encoder = load_encoder(str(Path(folder, "run")), device="cpu")
            for share in SHARES:
                with interpolated(encoder, own, share):
                    row["shares"][f"{share:g}"] = measure(encoder, parts)
            with open(rows, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            say(f"{name}, {rate:g}: " + json.dumps(row["shares"]))


if __name__ == "__main__":
    main()
