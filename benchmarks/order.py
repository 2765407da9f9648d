"""How far do encoders order lists by grade before any training?

    python -m benchmarks.order LISTS.jsonl ... > FILE.json

A loss that only sharpens what an encoder ranks first, such as the plan's sorted masses, trains it on that order. Prints
one JSON document, with the earlier plan's encoders.
"""

import json
from collections import Counter
from itertools import combinations

import click
import torch

from benchmarks.quality.earlier import EARLIER
from benchmarks.script import Script, command_line
from gradret import Encoder, RankingList, load_encoder, read_lists
from gradret.encoder.load import choose_precision
from gradret.files import versions
from gradret.settings import FitSettings


def count_pairs(encoder: Encoder, lists: list[RankingList], precision: str = "float32") -> dict:
    """How passages of one list with different grades are ordered by their scores.

    Returns:
        `pairs`: by their two grades, the number of pairs, and how many have the higher grade first; a tie has not.
        `first`: lists by the grade of the passage ranked first, the lowest of those that tie.
    """
    pairs: Counter[tuple[float, float]] = Counter()
    right: Counter[tuple[float, float]] = Counter()
    first: Counter[float] = Counter()
    for ranking in lists:
        query = torch.from_numpy(encoder.encode([ranking.query], "query", precision=precision))
        texts = [passage.content for passage in ranking.passages]
        scores = encoder.score(query, torch.from_numpy(encoder.encode(texts, "document", precision=precision)))[0]
        scored = sorted(zip([passage.grade for passage in ranking.passages], scores.tolist(), strict=True))
        first[max(scored, key=lambda pair: pair[1])[0]] += 1
        for (low, below), (high, above) in combinations(scored, 2):
            if low < high:
                pairs[high, low] += 1
                right[high, low] += above > below
    found = {f"{high:g},{low:g}": {"pairs": n, "right": right[high, low]} for (high, low), n in sorted(pairs.items())}
    return {"pairs": found, "first": {f"{grade:g}": n for grade, n in sorted(first.items())}}


@click.command(cls=Script)
@click.argument("files", nargs=-1, required=True)
def main(files):
    """Print what the earlier plan's encoders do with the lists of all files."""
    lists = [ranking for file in files for ranking in read_lists(file)]
    result = {"command": command_line("benchmarks.order"), "versions": versions(), "lists": len(lists)}
    for name, choice in EARLIER.encoders.items():
        settings = FitSettings(**EARLIER.settings | choice)
        encoder = load_encoder(settings.model, **settings.encoder_options)
        precision = choose_precision(settings.precision, encoder.device)
        result[name] = {"precision": precision} | count_pairs(encoder, lists, precision)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
