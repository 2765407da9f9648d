"""The plan of every figure that benchmarks/README.md reports of quality; its protocol is there."""

from benchmarks.quality.plan import (
    BM25,
    CRANFIELD_CODES,
    DEFAULT,
    LABELS,
    LARGE_MODELS,
    LISTS,
    MEASURES,
    MINILM,
    PARAPHRASE,
    SETTINGS,
    SYSTEMS,
    THREE_LAYERS,
    Experiment,
    Plan,
    System,
)
from gradret.settings import FitSettings

GENTLE = {"learning_rate": 2e-4, "temperature": 0.01, "interpolate": 0.25}
AS_IT_COMES = {name: getattr(FitSettings, name) for name in (*GENTLE, "epochs")}
WARM = {"temperature": 0.05}
COLLECTIONS = {
    "SciFact": "beir/scifact/test",
    "Cranfield": f"cranfield?queries=even&{CRANFIELD_CODES}",
    "NPL": "beir/npl?queries=even",
    "MedQuAD": "beir/medquad",
    "sample's lists": "sample",
}
FOUR = tuple(COLLECTIONS)[:4]
# So that the loss can tell a query's own list. With the weights below, that part of its gradient which orders the
# list's own passages is a third of the contrast's. At equal weights that of W2 is 1/28 of it, of CRPS 1/72 (three
# layers before training, 64 lists of SciFact).
OWN_LIST = {"in_batch_grade": -1.0}
OTHERS = {  # of a collection, the lists for the three others
    name: tuple(source for other, source in LISTS.items() if other != name.lower()) for name in FOUR
}
COMPARED = (
    *("bm25", "untrained", "infonce-1", "wasserstein", "infonce", "infonce-2", "gaussian", "contrast", "kl", "labels"),
    *(
        "wasserstein-1",
        "wasserstein-2",
        "flat-contrast",
        "own-wasserstein",
        "own-crps",
        "bixse",
        "rince",
        "lambda",
        "brier",
        "infonce-1-warm",
        "kl-warm",
    ),
    *("gaussian-published", "gaussian-sqrt", "shuffled", "fit"),
)
ALIGNED = ("bm25", "untrained", "infonce-1", "wasserstein", "infonce", "infonce-2", "kl", "labels", "fit")
FEW = ("untrained", "infonce-1", "kl", "wasserstein")
THREE = {"encoders": ("three-layers",), "collections": FOUR}
SEEDS = 2  # of what is compared; a curve has one

REPORTED = Plan(
    measures=MEASURES,
    primary="wasserstein",
    settings=SETTINGS | {"temperature": 0.01},
    encoders={  # what did best on development queries: the whole way for the first, a quarter of it for the others
        "three-layers": THREE_LAYERS | {"learning_rate": 5e-4},
        "paraphrase-MiniLM-L3-v2": PARAPHRASE | GENTLE,
        "all-MiniLM-L6-v2": MINILM | GENTLE,
    },
    tuned={
        "three-layers": {"gaussian-published": {"learning_rate": 2e-4}}
        | dict.fromkeys(("gaussian", "wasserstein-1", "bixse", "lambda", "brier"), WARM)
    },
    data={
        "lists": tuple(LISTS.values()),
        "two": (LISTS["scifact"], LISTS["cranfield"]),
        "two-large": tuple(LARGE_MODELS.values()),
        "shuffled": tuple(f"{source}&shuffle=1.0" for source in LISTS.values()),
        "labels": (*LABELS.values(), "beir/npl?queries=odd&grades=1:3&sample=4"),
    }
    | {f"without-{name}": sources for name, sources in OTHERS.items()},
    collections=COLLECTIONS,
    systems=SYSTEMS
    | {
        "bm25": System("BM25", ranker=BM25),
        "gaussian": System("SyCL's Gaussian, our temperature", {"loss": "gaussian", "targets": "softmax"}),
        "gaussian-published": System(
            "SyCL's Gaussian as published",
            {"loss": "gaussian", "targets": "softmax", "temperature": 1.0, "normalize": False, "similarity": "dot"},
        ),
        "wasserstein": System("gradret's default loss", {"loss": DEFAULT}),
        "fit": System("gradret fit as it comes", {"loss": DEFAULT} | AS_IT_COMES),
        "own-wasserstein": System(
            "contrast, W2 on the own list", {"loss": "own-wasserstein:.9+contrast:.1"} | OWN_LIST
        ),
        "own-crps": System("contrast, CRPS on the own list", {"loss": "own-crps:.96+contrast:.04"} | OWN_LIST),
        # No worse than at the default's temperature on development queries, see development.py.
        "infonce-1-warm": System(
            "InfoNCE, grades 1 to 3 positive, temperature .05", WARM | SYSTEMS["infonce-1"].settings
        ),
        "kl-warm": System("kl, temperature .05", WARM | SYSTEMS["kl"].settings),
        "flat-contrast": System("contrast with grade 0 alone", {"loss": "flat-contrast"}),
        "bixse": System("BiXSE", {"loss": "bixse"}),
        "rince": System("RINCE", {"loss": "rince"}),
        "lambda": System("LambdaLoss", {"loss": "lambda"}),
        "brier": System("Brier score", {"loss": "brier"}),
        "labels": System("real labels, the default loss", {"loss": DEFAULT}, "labels"),
        "shuffled": System("shuffled grades, the default loss", {"loss": DEFAULT}, "shuffled"),
    },
    experiments={
        "main": Experiment("Trained on lists for all four collections", systems=COMPARED, seeds=SEEDS, **THREE),
        "aligned": Experiment(
            "The same with encoders that were trained for retrieval or similarity",
            encoders=("paraphrase-MiniLM-L3-v2", "all-MiniLM-L6-v2"),
            systems=ALIGNED,
            collections=FOUR,
            seeds=SEEDS,
        ),
        "held-out": Experiment(
            "The first, ranking the passages of lists that were held out",
            encoders=("three-layers",),
            systems=COMPARED,
            collections=("sample's lists",),
            seeds=SEEDS,
        ),
        "small-model": Experiment(
            "417 lists of a model of 1.5B", "two", ("three-layers",), FEW, ("SciFact", "Cranfield"), SEEDS
        ),
        "large-model": Experiment(
            "Lists of a large model for the same queries",
            data="two-large",
            encoders=("three-layers",),
            systems=FEW,
            collections=("SciFact", "Cranfield"),
            seeds=SEEDS,
        ),
    }
    | {
        f"without-{name}": Experiment(
            f"Trained on lists for the three others, measured on {name}",
            data=f"without-{name}",
            encoders=("three-layers",),
            systems=("untrained", "infonce-1", "wasserstein"),
            collections=(name,),
            seeds=SEEDS,
        )
        for name in FOUR
    }
    | {
        "curve": Experiment(
            "Trained on a part of the lists, drawn at random",
            systems=("untrained", "infonce", "infonce-1", "fit", "wasserstein"),
            seeds=1,
            vary="lists",
            values={n: {"source": f"queries=benchmarks/queries/curve-{n}.txt"} for n in (50, 100, 200, 400)}
            | {558: {}},
            **THREE,
        ),
        "noise": Experiment(
            "Grades shuffled within their list, in a share of the lists",
            systems=("untrained", "infonce", "infonce-2", "infonce-1", "wasserstein"),
            seeds=1,
            vary="share of the lists shuffled",
            values={0.0: {}} | {share: {"source": f"shuffle={share}"} for share in (0.2, 0.4)},
            **THREE,
        ),
    },
)
