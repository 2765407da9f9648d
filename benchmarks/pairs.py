"""How far encoders order lists by grade before any training: python benchmarks/pairs.py LISTS.jsonl ... > FILE.json

Run from the repository. A loss that only sharpens what an encoder ranks first, such as quality.toml's sorted masses,
trains it on that order.
"""

import json
import sys
from itertools import combinations
from pathlib import Path

import torch

from gradret import Encoder, RankingList, load_encoder, read_lists
from gradret.grid_file import read_grid
from gradret.versions import versions


def measure_order(encoder: Encoder, lists: list[RankingList]) -> dict:
    """Of the pairs of one list's passages with different grades: their number, and the share whose order is right.

    `first` counts the lists by the grade of the passage ranked first.
    """
    right = pairs = 0
    first: dict[int, int] = {}
    for ranking in lists:
        query = torch.from_numpy(encoder.encode([ranking.query], "query"))
        documents = torch.from_numpy(encoder.encode([passage.text for passage in ranking.passages]))
        scores = encoder.score(query, documents)[0].tolist()
        grades = [passage.grade for passage in ranking.passages]
        best = grades[scores.index(max(scores))]
        first[best] = first.get(best, 0) + 1
        for a, b in combinations(range(len(grades)), 2):
            if grades[a] != grades[b]:
                pairs += 1
                right += scores[a] != scores[b] and (scores[a] > scores[b]) == (grades[a] > grades[b])
    return {"pairs": pairs, "right": right / pairs, "first": {str(grade): first[grade] for grade in sorted(first)}}


if __name__ == "__main__":
    files = sys.argv[1:]
    lists = [ranking for file in files for ranking in read_lists(file)]
    result = {"command": " ".join(["python benchmarks/pairs.py", *files]), "versions": versions(), "lists": len(lists)}
    for name, choice in read_grid(Path(__file__).with_name("quality.toml")).encoders.items():
        keys = ("layers", "document_max_length")
        encoder = load_encoder(choice["model"], **{key: choice[key] for key in keys if key in choice})
        result[name] = measure_order(encoder, lists)
    print(json.dumps(result, indent=2))
