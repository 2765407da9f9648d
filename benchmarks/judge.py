"""How well does a model judge passages that people have judged?

    python -m benchmarks.judge --model MODEL.gguf SOURCE ... > FILE.json

Draws judged passages from each source, asks the model as `gradret gen --judge` does, and counts how often two passages
of a query are in the order of their human grades: by the judged grade, by the same corrected for the labels that the
model prefers whatever it reads (contextual calibration, Zhao et al. 2021, arXiv 2102.09690: label probabilities divided
by those for an empty query and passage), and by the default encoder. Needs the extra gen.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import click

from benchmarks.script import Script, command_line
from gradret import load_encoder
from gradret.data.lists import JUDGED, Passage, RankingList
from gradret.data.sources import MixedLists, parse_source
from gradret.evaluation.order import measure_order
from gradret.files import versions
from gradret.generate.engine import Request
from gradret.generate.llama import LlamaEngine, locate_gguf
from gradret.generate.prompts import TREC_DL, Prompts
from gradret.generate.queries import Query
from gradret.generate.run import expected_grade
from gradret.look import describe_pairs
from gradret.settings import DEFAULT_ENCODER, GenSettings

PER_QUERY = 6  # passages
WORDS = 150  # of each passage, the first ones: about twice what gen writes
EMPTY = ("", "")  # a query and a passage that say nothing

Pair = tuple[str, str]
Probabilities = Mapping[str, float]


def draw_lists(lists: Sequence[RankingList], count: int, seed: int) -> list[RankingList]:
    """About `count` passages, up to PER_QUERY per query, grade by grade in turn; no query with one grade alone."""
    found, draw = [], random.Random(seed)
    for number in draw.sample(range(len(lists)), k=len(lists)):
        if sum(len(ranking.passages) for ranking in found) >= count:
            break
        ranking, by_grade = lists[number], defaultdict(list)
        for passage in draw.sample(ranking.passages, k=len(ranking.passages)):
            text = " ".join(passage.content.split()[:WORDS])
            by_grade[passage.grade].append(Passage(passage.grade, text))
        chosen: list[Passage] = []
        while len(chosen) < PER_QUERY and any(by_grade.values()):
            chosen += [passages.pop() for _, passages in sorted(by_grade.items()) if passages]
        if len(by_grade) > 1:
            found.append(RankingList(ranking.query_id, ranking.query, chosen[:PER_QUERY]))
    return found


def ask(engine: LlamaEngine, prompts: Prompts, pairs: Iterable[Pair]) -> dict[Pair, Probabilities]:
    """The probabilities of the labels for each query and passage."""
    found, waiting = {}, []
    for query, passage in dict.fromkeys(pairs):
        request = prompts.judge(Query("", query), [passage])[0]
        waiting.append(Request(((query, passage), 1, "judge"), request.messages, 1, choices=request.choices))
    while True:
        while waiting and engine.free:
            engine.submit(waiting.pop())
        replies = engine.collect()
        if not replies:
            return found
        for reply in replies:
            found[reply.request.key[0]] = reply.probabilities


def calibrate(probabilities: Probabilities, prior: Probabilities) -> dict[str, float]:
    """Divided by what the model says of nothing, and scaled to sum to one."""
    shares = {label: p / prior[label] for label, p in probabilities.items()}
    return {label: share / sum(shares.values()) for label, share in shares.items()}


def measure_source(name: str, lists: list[RankingList], asked: Mapping[Pair, Probabilities], encoder) -> dict:
    """Orders and mean judged grades by human grade, as the model says it and corrected, and the encoder's order."""
    result: dict = {"source": name, "queries": len(lists), "passages": sum(len(r.passages) for r in lists)}
    corrections = {
        "judge": lambda query, text: asked[query, text],
        "judge, calibrated": lambda query, text: calibrate(asked[query, text], asked[EMPTY]),
    }
    for method, probabilities in corrections.items():
        for ranking in lists:
            for passage in ranking.passages:
                grade = expected_grade(probabilities(ranking.query, passage.text), TREC_DL)
                passage.extra = {JUDGED: grade}
        order = measure_order(lists, encoder)
        means = {f"{grade:g}": round(summary.judged, 3) for grade, summary in order.grades.items()}
        result[method] = {"mean_judged": means, "order": describe_pairs(order.judge)}
        result["encoder"] = {"order": describe_pairs(order.encoder)}
    return result


@click.command(cls=Script)
@click.argument("sources", nargs=-1, required=True)
@click.option("--model", required=True, help="A GGUF file.")
@click.option("--passages", default=100, show_default=True, help="Of each source.")
@click.option("--seed", default=0, show_default=True)
def main(sources, model, passages, seed):
    """Print how often the model's grades order the judged passages of each SOURCE as people did."""
    prompts = Prompts(GenSettings(judge=True), TREC_DL)
    drawn = {name: draw_lists(MixedLists([parse_source(name)]), passages, seed) for name in sources}
    pairs = [(r.query, passage.text) for lists in drawn.values() for r in lists for passage in r.passages]
    engine = LlamaEngine(locate_gguf(model), prompts.kinds())
    try:
        asked = ask(engine, prompts, [EMPTY, *pairs])
        identity = engine.identity
    finally:
        engine.close()
    encoder = load_encoder(DEFAULT_ENCODER)
    result = {"command": command_line("benchmarks.judge"), "versions": versions(), "model": identity}
    result |= {"words": WORDS, "prior": {label: round(p, 4) for label, p in asked[EMPTY].items()}}
    result["sources"] = [measure_source(name, lists, asked, encoder) for name, lists in drawn.items()]
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
