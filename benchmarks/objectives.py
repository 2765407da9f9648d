"""Which list-wise objective is worth real training? A small network on frozen vectors tries each candidate in seconds.

    python -m benchmarks.objectives FILE.jsonl

Run from the repository, with the lists in graded/. Its lists and development collections are those of the development
plan, embedded once by the three-layer encoder there. Each of SETTINGS trains the network with three seeds and appends a
line to FILE: nDCG@10 on each collection, their mean, and its standard deviation over seeds; a setting that FILE has is
skipped. What it is not: a result on reported queries, or proof of what the encoder itself would learn. It decides what
the development runs try. Prints each setting's mean.

The candidates, with p = softmax(scores / temperature) and q a list's target mass:

- infonce (van den Oord et al., arXiv 1807.03748): the highest grade positive or, as SyCL compares (arXiv 2503.23239),
  grades 2 and 3, or grades 1 to 3; cumulative sums it over every threshold between grades; contrast weighs the
  positives of grades 1 to 3 by their target mass.
- kl: ListNet (Cao et al., ICML 2007). cost_augmented gives its documents a margin that grows with their distance from
  the target mass, after softmax-margin (Gimpel and Smith, NAACL 2010).
- gaussian: SyCL's own.
- wasserstein: exact W_1 or W_2^2 along the grade axis (Peyré and Cuturi, 2019). Its gradient vanishes where p has
  collapsed on a wrong document; log_wasserstein and a share of kl or of contrast are ways to keep one there. Rows spell
  the shares kl_share and contrast_share: fit takes such mixtures as --loss NAME:WEIGHT+NAME:WEIGHT.
- geometric: the Fenchel-Young loss of an entropy that transport regularises (Mensch, Blondel and Peyré, ICML 2019).
- threshold: cross-entropy at every threshold between grades, as of cumulative links in ordinal regression (McCullagh,
  JRSS B 1980), where p's mass above a threshold stands for the link.

A number of a setting may be a schedule: [a, b] goes from a at the first step to b at the last, linearly.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import click
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from benchmarks.quality.earlier_development import EARLIER_DEVELOPMENT
from benchmarks.script import Script
from gradret.data.collections import Collection
from gradret.data.lists import RankingList, decode_json, query_words
from gradret.data.sources import MixedLists, check_lists, open_collection, parse_source
from gradret.encoder.load import choose_precision, load_encoder
from gradret.evaluation.measures import measure_run
from gradret.evaluation.search import default_cache, embed_corpus, top_k
from gradret.files import versions
from gradret.loss import functions as losses
from gradret.loss.functions import infonce_loss, kl_loss, wasserstein_loss
from gradret.loss.grades import normalize_mass, place_grades, weigh_grades
from gradret.settings import FitSettings
from gradret.train.batches import collate, draw_positions
from gradret.train.loop import count_steps, learning_rate_at

EVALUATED = ("beir/scifact/test", "cranfield?queries=even")  # reported elsewhere: their queries are not trained on
MEASURE, DEPTH = "nDCG@10", 10
SEEDS = (0, 1, 2)
TRAINING = {"epochs": 4.0, "batch_lists": 16, "learning_rate": 1e-4}  # of every setting; the rest as fit's defaults
HIDDEN, DROPOUT = 1536, 0.1

# --- the candidates that gradret does not have: scores (B, N), grades (B, N), every document present


def log_wasserstein_loss(scores, grades, *, order: int, temperature: float, targets: str, ground: str) -> Tensor:
    """Mean of -log(1 - W / W_max), W = W_p^p and W_max its highest value: all of p at the axis's end far from q.

    The logarithm steepens as p collapses there, where W's own gradient vanishes. 0 for a list without target mass.
    """
    q, places = place_mass(grades, targets, ground)
    ends = torch.stack([places.amin(-1), places.amax(-1)], -1)  # (B, 2)
    worst = (q[:, None] * (places[:, None] - ends[..., None]).abs() ** order).sum(-1).amax(-1)  # (B,)
    options = {"order": order, "temperature": temperature, "targets": targets, "ground": ground}
    cost = wasserstein_loss(scores.double(), grades, reduction="none", **options)  # float32 rounds 1 - W / W_max to 0
    return -torch.log((1 - cost / worst.clamp_min(1e-12)).clamp_min(1e-12)).mean()


def threshold_loss(scores, grades, *, temperature: float, targets: str, ground: str) -> Tensor:
    """Mean of sum_i g_i KL(Bernoulli(mass of q above threshold i) || Bernoulli(mass of p above it)).

    The thresholds lie between neighbouring grades of the batch, g_i apart under the ground distance.
    """
    q, places = place_mass(grades, targets, ground)
    logits = scores.double() / temperature
    levels = places.unique()  # (L,), ascending
    above = places[:, None] > levels[:-1, None]  # (B, L - 1, N)
    loss = 0
    for side in (above, ~above):
        mass = (q[:, None] * side).sum(-1)  # (B, L - 1)
        log_mass = sum_within(logits, side) - logits.logsumexp(-1, keepdim=True)
        loss = loss + torch.xlogy(mass, mass) - mass * log_mass
    return (levels.diff() * loss).sum(-1).mean()


def cost_augmented_loss(scores, grades, *, temperature: float, targets: str, ground: str, margin: float) -> Tensor:
    """kl_loss with margin * (mean distance from the target mass) added to each document's score / temperature."""
    q, places = place_mass(grades, targets, ground)
    cost = (q[:, None] * (places[:, :, None] - places[:, None]).abs()).sum(-1)  # (B, N)
    return kl_loss(scores + temperature * margin * cost, grades, temperature=temperature, targets=targets)


def cumulative_loss(scores, grades, *, temperature: float, ground: str) -> Tensor:
    """Sum over thresholds between neighbouring grades of infonce_loss, what is above being positive, times the gap."""
    levels = grades.unique()  # (L,), ascending
    gaps = place_grades(levels, ground).diff().tolist()
    terms = zip(levels[1:].tolist(), gaps, strict=True)
    return sum(gap * infonce_loss(scores, grades, temperature=temperature, positive_from=level) for level, gap in terms)


def geometric_loss(scores, grades, *, temperature: float, targets: str, ground: str, steepness: float) -> Tensor:
    """Mean of Omega*(f) - sum_k q_k f_k, f_k the log-sum-exp of the logits at the axis's k-th place, q_k its mass.

    Omega*(f) = -log min over a on the simplex of a'Ka, K_kl = exp(-(f_k + f_l + steepness |v_k - v_l|) / 2) for places
    v; of a list without target mass 0. Less by a constant of the list than the Fenchel-Young loss. K is positive
    definite, so the minimum is the least 1 / 1'K_S^-1 1 among the supports S with K_S^-1 1 >= 0.
    """
    q, places = place_mass(grades, targets, ground)
    logits = scores.double() / temperature
    levels = places.unique()  # (L,)
    here = places[:, None] == levels[:, None]  # (B, L, N)
    f = sum_within(logits, here)  # (B, L)
    top = f.amax(-1, keepdim=True)
    root = ((f - top) / 2).exp()  # (B, L)
    kernel = (-steepness / 2 * (levels[:, None] - levels).abs()).exp()
    found = []
    for size in range(1, len(levels) + 1):
        for support in map(list, combinations(range(len(levels)), size)):
            part = root[:, support]
            solved = part @ torch.linalg.inv(kernel[support][:, support])
            found.append(((solved >= 0).all(-1) * (part * solved).sum(-1)).clamp_min(1e-300))
    conjugate = top[:, 0] + torch.stack(found).amax(0).log()
    mass = (q[:, None] * here).sum(-1)
    return (mass.sum(-1) * conjugate - (mass * f).sum(-1)).mean()


def sum_within(logits: Tensor, groups: Tensor) -> Tensor:
    """Log-sum-exp (B, G) of logits (B, N) within each group (B, G, N).

    A finite floor stands for -inf: a group without a document, and so without mass, counts as 0 and not NaN.
    """
    return logits[:, None].masked_fill(~groups, torch.finfo(logits.dtype).min).logsumexp(-1)


def place_mass(grades: Tensor, targets: str, ground: str) -> tuple[Tensor, Tensor]:
    """Target mass (B, N), 1 in each row with any, and the documents' places on the axis (B, N); float64."""
    return normalize_mass(weigh_grades(grades, None, targets, torch.float64)), place_grades(grades, ground).double()


LOSSES = losses.LOSS_FUNCTIONS | {
    "log_wasserstein": log_wasserstein_loss,
    "threshold": threshold_loss,
    "cost_augmented": cost_augmented_loss,
    "cumulative": cumulative_loss,
    "geometric": geometric_loss,
}


def make_objective(setting: dict) -> Callable[..., Tensor]:
    """The setting's loss(scores, grades, progress), progress from 0 to 1 being how much of the training is done.

    Its shares of kl and of contrast have the same temperature and targets.
    """

    def objective(scores: Tensor, grades: Tensor, progress: float = 0.0) -> Tensor:
        now = {k: v[0] + progress * (v[1] - v[0]) if isinstance(v, list) else v for k, v in setting.items()}
        loss, shares = now.pop("loss"), {name: now.pop(f"{name}_share", 0.0) for name in ("kl", "contrast")}
        mixed = (1 - sum(shares.values())) * LOSSES[loss](scores, grades, **now)
        for name, share in shares.items():
            if share:
                options = {"temperature": now["temperature"], "targets": now["targets"]}
                mixed = mixed + share * LOSSES[name](scores, grades, **options)
        return mixed

    return objective


# --- the settings

SQRT = {"targets": "sqrt", "ground": "sqrt"}
W1, W2 = ({"loss": "wasserstein", "order": order} for order in (1, 2))
LOG_W1, LOG_W2 = ({"loss": "log_wasserstein", "order": order} | SQRT for order in (1, 2))
THRESHOLD, COST = {"loss": "threshold"} | SQRT, {"loss": "cost_augmented"} | SQRT
KL, GAUSSIAN = {"loss": "kl"}, {"loss": "gaussian"}
INFONCE = ({"loss": "infonce"}, {"loss": "infonce", "positive_from": 2}, {"loss": "cumulative", "ground": "sqrt"})
GRADED = (KL | {"targets": "sqrt"}, GAUSSIAN | {"targets": "softmax"}, COST | {"margin": 1.0}, THRESHOLD)
CANDIDATES = (*INFONCE, *GRADED, W1 | SQRT, W2 | SQRT, LOG_W1, LOG_W2)
AXES = (("gain", "grade"), ("softmax", "grade"), ("sqrt", "grade"), ("sqrt", "gain"))
VARIANTS = (
    *(KL | {"targets": targets} for targets in ("gain", "softmax")),
    *(GAUSSIAN | {"targets": "sqrt"}, COST | {"margin": 2.0}),
    *(w | {"targets": targets, "ground": ground} for w in (W1, W2) for targets, ground in AXES),
    *(candidate | {"kl_share": 0.5} for candidate in (THRESHOLD, LOG_W1, LOG_W2)),
)
MIXTURES = tuple(w | SQRT | {"kl_share": share} for w in (W1, W2) for share in (0.1, 0.3, 0.5, 0.6, 0.8))
ALL_POSITIVE, CONTRAST = {"loss": "infonce", "positive_from": 1}, {"loss": "contrast", "targets": "sqrt"}
SHARED = tuple(w | SQRT | {"contrast_share": share} for w in (W1, W2) for share in (0.6, 0.85))
GEOMETRIC = tuple({"loss": "geometric"} | SQRT | {"steepness": steepness} for steepness in (1.0, 4.0, 16.0))
DEFAULT = W2 | SQRT | {"contrast_share": 0.85}
COOLED = (KL | {"targets": "sqrt"}, W2 | SQRT, W2 | SQRT | {"kl_share": 0.6}, CONTRAST, DEFAULT)
FADED = tuple(W2 | SQRT | {f"{name}_share": [1.0, last]} for name in ("kl", "contrast") for last in (0.0, 0.6))
SETTINGS = (
    {"loss": "untrained"},
    *(candidate | {"temperature": temperature} for candidate in CANDIDATES for temperature in (0.01, 0.02, 0.05)),
    *(variant | {"temperature": 0.02} for variant in VARIANTS),
    *(mixture | {"temperature": temperature} for mixture in MIXTURES for temperature in (0.015, 0.02)),
    *(new | {"temperature": t} for new in (*SHARED, ALL_POSITIVE, CONTRAST, *GEOMETRIC) for t in (0.01, 0.02, 0.05)),
    *(cooled | {"temperature": [0.05, last]} for cooled in COOLED for last in (0.01, 0.02)),
    *(faded | {"temperature": temperature} for faded in FADED for temperature in (0.015, 0.02)),
)

# --- the network, its training and its measurement


@dataclass(frozen=True)
class Vectors:
    """Frozen embeddings, each (D,) or (n, D) float32.

    Attributes:
        lists: to train on.
        queries, documents: text -> embedding, of the lists.
        collections: name -> the collection, its documents' ids, their embeddings, its queries' embeddings.
    """

    lists: Sequence[RankingList]
    queries: dict[str, Tensor]
    documents: dict[str, Tensor]
    collections: dict[str, tuple[Collection, list[str], Tensor, Tensor]]


def embed() -> Vectors:
    """Embed the plan's lists, without those with the words of a measured or evaluated query, and its collections."""
    opened = {name: open_collection(parse_source(source)) for name, source in EARLIER_DEVELOPMENT.collections.items()}
    measured = [*opened.values(), *(open_collection(parse_source(source)) for source in EVALUATED)]
    words = {query_words(text) for collection in measured for text in collection.queries.values()}
    mixed = MixedLists([parse_source(source) for source in EARLIER_DEVELOPMENT.data["lists"]])
    lists = [mixed[int(i)] for i in check_lists(mixed, refuse_negative=True, exclude=words).kept]
    options = dict(EARLIER_DEVELOPMENT.encoders["three-layers"])
    encoder = load_encoder(options.pop("model"), device="cpu", **options)
    precision = choose_precision(FitSettings().precision, encoder.device)

    def encode(texts: Sequence[str], kind: str) -> Tensor:
        return torch.from_numpy(encoder.encode(texts, kind, precision=precision))

    collections = {}
    for name, collection in opened.items():
        corpus = embed_corpus(encoder, collection, default_cache(), precision=precision)
        doc_ids = [doc_id.decode() for doc_id in corpus.doc_ids.tolist()]
        queries = encode([*collection.queries.values()], "query")
        collections[name] = collection, doc_ids, torch.tensor(corpus.vectors), queries
    texts = ("query", [r.query for r in lists]), ("document", [p.content for r in lists for p in r.passages])
    queries, documents = (dict(zip(found, encode(found, kind), strict=True)) for kind, found in texts)
    return Vectors(lists, queries, documents, collections)


class Network(nn.Module):
    """(n, D) unit vectors x to unit vectors along x + linear(x) + perceptron(x), of queries and documents alike.

    Both parts start at 0: untrained, it changes no ranking.
    """

    def __init__(self, dimension: int):
        super().__init__()
        self.dropout = nn.Dropout(DROPOUT)
        self.linear = nn.Linear(dimension, dimension, bias=False)
        self.inner, self.outer = nn.Linear(dimension, HIDDEN), nn.Linear(HIDDEN, dimension)
        for parameter in (self.linear.weight, self.outer.weight, self.outer.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        hidden = torch.relu(self.inner(8 * x))  # beside a bias, the entries of a unit vector, about .05, are small
        return nnf.normalize(x + self.linear(x) + self.outer(hidden), dim=-1)


def train(vectors: Vectors, setting: dict, seed: int) -> Network:
    """A network trained on the lists; every other list's documents join a list at grade 0, as in fit."""
    torch.manual_seed(seed)
    network = Network(len(next(iter(vectors.queries.values()))))
    if setting["loss"] == "untrained":
        return network
    objective, fit = make_objective(setting), FitSettings(**TRAINING, seed=seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=fit.weight_decay)
    count, steps = len(vectors.lists), count_steps(fit, len(vectors.lists))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, fit)
        drawn = draw_positions(step, count=count, size=min(fit.batch_lists, count), seed=seed)
        batch = collate([vectors.lists[i] for i in drawn])
        queries = network(torch.stack([vectors.queries[text] for text in batch.queries]))  # (B, D)
        documents = network(torch.stack([vectors.documents[text] for text in batch.documents]))  # (N, D)
        loss = objective(queries @ documents.T, batch.spread_grades(0.0), step / max(steps - 1, 1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), fit.clip)
        optimizer.step()
    return network


def measure(vectors: Vectors, network: Network) -> dict[str, float]:
    """The measure on each collection."""
    network.eval()
    found = {}
    for name, (collection, doc_ids, documents, queries) in vectors.collections.items():
        with torch.inference_mode():
            _, rows = top_k(network(queries).numpy(), network(documents).numpy(), DEPTH)
        ranked = zip(collection.queries, rows, strict=True)
        run = {query_id: [(doc_ids[i], -rank) for rank, i in enumerate(row)] for query_id, row in ranked}
        found[name] = measure_run(run, collection, [MEASURE]).measures[MEASURE]
    return found


def try_setting(vectors: Vectors, setting: dict) -> dict:
    """The setting's row, JSON-serialisable."""
    began = time.perf_counter()
    runs = [measure(vectors, train(vectors, setting, seed)) for seed in SEEDS]
    means = [statistics.fmean(run.values()) for run in runs]
    return {
        "setting": setting,
        MEASURE: {name: statistics.fmean(run[name] for run in runs) for name in runs[0]},
        "mean": statistics.fmean(means),
        "sd": statistics.stdev(means),
        "seconds": round(time.perf_counter() - began, 1),
        "training": {**TRAINING, "seeds": len(SEEDS), "lists": len(vectors.lists)},
    }


def list_remaining(path: Path) -> list[dict]:
    """The settings without a row in the file. Raises: GradretError when a line of it is not JSON."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    done = [decode_json(line, f"{path}:{number}")["setting"] for number, line in enumerate(lines, 1)]
    return [setting for setting in SETTINGS if setting not in done]


@click.command(cls=Script)
@click.argument("path", metavar="FILE.jsonl", type=click.Path(path_type=Path))
def main(path):
    """Append a row to the file for each setting that has none."""
    remaining, found = list_remaining(path), versions()
    vectors = embed() if remaining else None
    for setting in remaining:
        row = try_setting(vectors, setting) | {"versions": found}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        click.echo(f"{row['mean']:.4f} ± {row['sd']:.4f}  {json.dumps(setting)}")


if __name__ == "__main__":
    main()
