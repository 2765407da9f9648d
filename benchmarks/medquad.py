"""The part of MedQuAD that the package carries, from all that stands under CC BY 4.0: smaller, for a first try.

    python -m benchmarks.medquad DIR OUT

DIR is a BEIR directory. OUT gets its queries and judgments as they are, its judged documents and as many others, evenly
spaced, as make DOCUMENTS, each text cut after WORDS words.
"""

import json
import shutil
from pathlib import Path

import click

from benchmarks.script import Script
from gradret.data.collections import BeirCollection

DOCUMENTS, WORDS = 800, 80


@click.command(cls=Script)
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(folder, out):
    """Write a smaller copy of the BEIR directory DIR to OUT."""
    collection = BeirCollection(folder, "test")
    judged = {doc_id for grades in collection.qrels.values() for doc_id in grades}
    records = [json.loads(line) for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    others = [record["_id"] for record in records if record["_id"] not in judged]
    wanted = max(DOCUMENTS - len(judged), 0)
    kept = judged | {others[i * len(others) // wanted] for i in range(wanted)}
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    with open(out / "corpus.jsonl", "w", encoding="utf-8") as file:
        for record in records:
            if record["_id"] in kept:
                text = " ".join(record["text"].split()[:WORDS])
                cut = {"_id": record["_id"], "title": " ".join(record["title"].split()), "text": text}
                file.write(json.dumps(cut, ensure_ascii=False) + "\n")
    for name in ("queries.jsonl", "qrels/test.tsv"):
        shutil.copyfile(folder / name, out / name)


if __name__ == "__main__":
    main()
