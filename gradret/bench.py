"""Retrieval quality of losses side by side: the same lists, seeds and budget for each."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from gradret.collection import Collection
from gradret.console import say
from gradret.encoder import Encoder
from gradret.encoder_load import load
from gradret.errors import GradretError, Interrupted
from gradret.evaluation import Evaluation, evaluate, paired_t_test, parse_measures
from gradret.settings import DEFAULT_MEASURES, LOSS_NAMES, FitSettings
from gradret.sources import open_collection, parse_source
from gradret.train import fit
from gradret.versions import versions

UNTRAINED = "untrained"
BASELINE = "infonce"


def parse_loss(name: str) -> dict:
    """Settings of a row: `wasserstein`, or `wasserstein:2` for its order 2. Raises: ValueError."""
    loss, _, order = name.partition(":")
    if loss not in LOSS_NAMES or order not in ("", "1", "2") or (order and loss != "wasserstein"):
        raise ValueError(f"'{name}' is not one of {', '.join(LOSS_NAMES)}, wasserstein:1, wasserstein:2")
    return {"loss": loss, **({"order": int(order)} if order else {})}


def measure_quality(
    base: FitSettings,
    *,
    losses: Sequence[str],
    seeds: int,
    datasets: Sequence[str],
    measures: Sequence[str] = DEFAULT_MEASURES,
    device: str | None = None,
    progress: bool = True,
) -> dict:
    """Train each loss with each seed and measure it, and the untrained encoder, on each dataset.

    Args:
        base: settings shared by all runs; loss, order where a row names it, seed and exclude are replaced.
        losses: rows, see parse_loss.
        seeds: runs a loss, with seeds 0 to seeds - 1.
        datasets: collections, see sources.parse_source.
    Returns: a JSON-serialisable document. Its "rows" hold for each system and dataset the mean over seeds, the
        standard deviation, each seed's value, each query's mean over seeds, and the p-value of the paired t-test
        over these queries against infonce.
    Raises: GradretError.
    """
    began = time.monotonic()
    measures = list(parse_measures(measures))
    collections = {name: open_collection(parse_source(name)) for name in datasets}
    base = replace(base, exclude=tuple(datasets))
    rows = [replace(base, **parse_loss(name)) for name in losses]
    if len(set(rows)) < len(rows):
        raise GradretError(f"--losses {','.join(losses)}: the same loss stands there twice")
    plan = [(name, replace(base, seed=seed, **parse_loss(name))) for name in losses for seed in range(seeds)]
    found: dict[tuple[str, str], list[Evaluation]] = {}
    fit_seconds: dict[str, list[float]] = {}

    # Half precision moves a measure by about .001: only when asked for by name.
    precision = "bfloat16" if base.precision == "bfloat16" else "float32"

    def measure(system: str, encoder: Encoder) -> None:
        for dataset, collection in collections.items():
            result = evaluate(encoder, collection, measures=measures, precision=precision, progress=progress)
            found.setdefault((system, dataset), []).append(result)
            say(f"{system} on {dataset}: " + ", ".join(f"{m} {v:.4f}" for m, v in result.measures.items()))

    encoder = load(base.model, device=device, **base.encoder_options)
    measure(UNTRAINED, encoder)
    for number, (system, settings) in enumerate(plan, 1):
        say(f"run {number} of {len(plan)}: {system}, seed {settings.seed}")
        with tempfile.TemporaryDirectory(prefix="gradret-") as temporary:
            try:
                result = fit(settings, Path(temporary) / "run", device=device, progress=progress)
            except Interrupted:
                raise GradretError(
                    f"stopped in run {number} of {len(plan)}; no result is written: start again"
                ) from None
            fit_seconds.setdefault(system, []).append(round(result.seconds, 1))
            measure(system, load(str(result.out), device=device, trust_remote_code=base.trust_remote_code))
    return {
        "versions": versions(),
        "settings": {k: v for k, v in asdict(base).items() if k not in ("loss", "seed")},
        "seeds": seeds,
        "datasets": {name: _describe(collection) for name, collection in collections.items()},
        "rows": [_make_row(system, dataset, found, measures) for system, dataset in found],
        "fit_seconds": fit_seconds,
        "seconds": round(time.monotonic() - began, 1),
    }


def _describe(collection: Collection) -> dict:
    return {"queries": len(collection.queries), "documents": collection.document_count}


def _make_row(system: str, dataset: str, found: dict, measures: Sequence[str]) -> dict:
    runs = found[system, dataset]
    row: dict = {"system": system, "dataset": dataset, "mean": {}, "sd": {}, "values": {}, "p": {}, "per_query": {}}
    for measure in measures:
        values = [run.measures[measure] for run in runs]
        row["mean"][measure] = float(np.mean(values))
        row["sd"][measure] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        row["values"][measure] = values
        row["per_query"][measure] = _mean_per_query(runs, measure)
        baseline = found.get((BASELINE, dataset))
        if baseline is not None and system != BASELINE:
            p = paired_t_test(row["per_query"][measure], _mean_per_query(baseline, measure))
            row["p"][measure] = None if math.isnan(p) else p
    return row


def _mean_per_query(runs: list[Evaluation], measure: str) -> dict[str, float]:
    return {q: float(np.mean([run.per_query[measure][q] for run in runs])) for q in runs[0].per_query[measure]}
