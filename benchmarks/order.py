"""How far encoders order lists by grade before any training: python benchmarks/order.py LISTS.jsonl ... > FILE.json

Run from the repository. A loss that only sharpens what an encoder ranks first, such as quality.toml's sorted masses,
trains it on that order.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from quality.controls import register

from gradret import Encoder, RankingList, load_encoder, read_lists
from gradret.bench.grid_file import read_grid
from gradret.encoder.load import choose_precision
from gradret.files import versions


def measure_order(encoder: Encoder, lists: list[RankingList], precision: str = "float32") -> dict:
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


def main(files: list[str]) -> None:
    """Print what quality.toml's encoders do with the lists of all files."""
    lists = [ranking for file in files for ranking in read_lists(file)]
    result = {"command": " ".join(["python benchmarks/order.py", *files]), "versions": versions(), "lists": len(lists)}
    register()
    grid = read_grid(Path(__file__).with_name("quality.toml"))
    for name, choice in grid.encoders.items():
        settings = replace(grid.settings, **choice)
        encoder = load_encoder(settings.model, **settings.encoder_options)
        precision = choose_precision(settings.precision, encoder.device)
        result[name] = {"precision": precision} | measure_order(encoder, lists, precision)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
