"""Rankings as TREC runs, for other tools."""

import os
from collections.abc import Mapping, Sequence

from gradret.console import PATIENCE_S, show_bar
from gradret.errors import GradretError


def write_run(
    path: str | os.PathLike[str], run: Mapping[str, Sequence[tuple[str, float]]], tag: str = "gradret"
) -> None:
    """Write a TREC run: `qid Q0 docid rank score tag`, scores with all the digits a float32 has.

    Raises: GradretError when an id holds white space, which the format can not carry, and nothing is written; or when
        the file can not be written.
    """
    for query_id, ranking in run.items():
        for doc_id, _ in ranking:
            if query_id.split() != [query_id] or doc_id.split() != [doc_id]:
                raise GradretError(f"{path}: a TREC run can not hold the ids '{query_id}' and '{doc_id}': white space")
    rankings = show_bar(run.items(), desc=f"writing {path}", unit="query", delay=PATIENCE_S)
    try:
        with open(path, "w", encoding="utf-8") as file:
            for query_id, ranking in rankings:
                for rank, (doc_id, score) in enumerate(ranking, 1):
                    file.write(f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n")
    except OSError as error:
        raise GradretError(f"{path}: can not be written ({error.strerror})") from None
