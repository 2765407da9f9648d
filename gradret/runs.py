"""Rankings as TREC runs, for other tools."""

import os
from collections.abc import Mapping, Sequence

from gradret.errors import GradretError


def write_run(
    path: str | os.PathLike[str], run: Mapping[str, Sequence[tuple[str, float]]], tag: str = "gradret"
) -> None:
    """Write a TREC run: `qid Q0 docid rank score tag`, scores with all the digits a float32 has.

    Raises: GradretError when an id holds white space, which the format can not carry.
    """
    with open(path, "w", encoding="utf-8") as file:
        for query_id, ranking in run.items():
            for rank, (doc_id, score) in enumerate(ranking, 1):
                if query_id.split() != [query_id] or doc_id.split() != [doc_id]:
                    raise GradretError(
                        f"{path}: a TREC run can not hold the ids '{query_id}' and '{doc_id}': white space"
                    )
                file.write(f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n")
