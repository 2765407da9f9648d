"""The plan of the figures in benchmarks/HISTORY.md, where its protocol is: lists of an unknown large model."""

from benchmarks.quality.plan import (
    BM25,
    CRANFIELD_CODES,
    DEFAULT,
    LABELS,
    LARGE_MODELS,
    MEASURES,
    MINILM,
    SETTINGS,
    SYSTEMS,
    THREE_LAYERS,
    Experiment,
    Plan,
    System,
    each,
    mix,
)

ENCODERS = {  # what did best on development queries, see earlier_development.py
    "three-layers": THREE_LAYERS | {"learning_rate": 5e-4, "temperature": 0.01},
    "all-MiniLM-L6-v2": MINILM | {"learning_rate": 1e-4, "temperature": 0.05, "interpolate": 0.1},
}
GENTLE = {"learning_rate": 5e-5, "temperature": 0.02}
HOT = {"learning_rate": 2e-4, "temperature": 0.05}
QUARTER = {"interpolate": 0.25}
TUNED = {
    "three-layers": {
        "gaussian": HOT,
        "wasserstein-1": HOT,
        "sorted": GENTLE,
        "sorted-alone": GENTLE,  # not tuned: as sorted, and so are the two below
        "shuffled-slow": GENTLE,
        "alone-slow": GENTLE,
    },
    "all-MiniLM-L6-v2": {
        "gaussian": {"learning_rate": 5e-6, "interpolate": 1.0},
        "wasserstein-1": {"learning_rate": 2e-5, "interpolate": 0.25},
        "infonce-1": QUARTER,
        "contrast": QUARTER,
        "wasserstein": QUARTER,
        "labels": QUARTER,
        "scifact-labels": QUARTER,
        "cranfield-labels": QUARTER,
    },
}
COLLECTIONS = {
    "SciFact test": "beir/scifact/test",
    "Cranfield, even": f"cranfield?queries=even&{CRANFIELD_CODES}",
    "SciFact lists, held out": f"{LARGE_MODELS['scifact']}?queries=benchmarks/queries/held-out-scifact.txt",
    "Cranfield lists, held out": f"{LARGE_MODELS['cranfield']}?queries=benchmarks/queries/held-out-cranfield.txt",
}
REAL, LISTS_HELD_OUT = tuple(COLLECTIONS)[:2], tuple(COLLECTIONS)[2:]
OURS = {"loss": DEFAULT, "order": 2}
ALONE = {"in_batch": False}  # without other lists' documents
REAL_LABELS = "real labels, Wasserstein .85 contrast"
COMPARED = (
    *("bm25", "untrained", "infonce", "infonce-2", "infonce-1", "gaussian", "gaussian-sqrt", "kl", "contrast"),
    *("wasserstein-1", "wasserstein-2", "wasserstein-kl", "wasserstein"),
)
ABLATION = {"encoders": ("three-layers",), "collections": REAL}
ONE_SEED = ABLATION | {"seeds": 1}


EARLIER = Plan(
    measures=MEASURES,
    baselines=(
        *("infonce-1", "infonce-2", "infonce", "gaussian", "kl", "contrast", "untrained", "labels"),
        *("scifact-labels", "cranfield-labels"),
    ),
    primary="wasserstein",
    settings=SETTINGS,
    encoders=ENCODERS,
    tuned=TUNED,
    data={
        "lists": tuple(LARGE_MODELS.values()),
        "scifact": (LARGE_MODELS["scifact"],),
        "cranfield": (LARGE_MODELS["cranfield"],),
        "shuffled": tuple(f"{source}?shuffle=1.0" for source in LARGE_MODELS.values()),
        "labels": tuple(LABELS.values()),
        "scifact-labels": (LABELS["scifact"],),
        "cranfield-labels": (LABELS["cranfield"],),
    },
    collections=COLLECTIONS,
    systems=SYSTEMS
    | {
        "bm25": System("BM25", ranker=BM25),
        "gaussian": System("Gaussian Wasserstein (SyCL)", {"loss": "gaussian", "targets": "softmax"}),
        "wasserstein-kl": System("Wasserstein, order 2, .6 kl", {"loss": mix("kl", 0.6)}),
        "wasserstein": System("Wasserstein, order 2, .85 contrast", OURS),
        "labels": System(REAL_LABELS, OURS, "labels"),
        "scifact-labels": System(REAL_LABELS, OURS, "scifact-labels"),
        "cranfield-labels": System(REAL_LABELS, OURS, "cranfield-labels"),
        "sorted-alone": System("sorted masses, own documents alone", {"loss": "sorted"} | ALONE),
        "sorted-fast": System("sorted masses, the default loss's settings", {"loss": "sorted"}),
        "shuffled": System("shuffled grades, the default loss", OURS, "shuffled"),
        "shuffled-alone": System("shuffled grades, own documents alone", OURS | ALONE, "shuffled"),
        "shuffled-slow": System("shuffled grades, own documents alone, gentle", OURS | ALONE, "shuffled"),
        "alone-slow": System("true grades, own documents alone, gentle", OURS | ALONE),
    },
    experiments={
        "main": Experiment(
            "Trained on synthetic lists for both collections", systems=(*COMPARED, "labels"), collections=REAL
        ),
        "in-domain": Experiment(
            "The same, measured on synthetic lists held out of training",
            systems=(*COMPARED, "labels"),
            collections=LISTS_HELD_OUT,
        ),
        "scifact-to-cranfield": Experiment(
            "Transfer: trained for SciFact alone, measured on Cranfield",
            data="scifact",
            systems=(*COMPARED, "scifact-labels"),
            collections=("Cranfield, even",),
        ),
        "cranfield-to-scifact": Experiment(
            "Transfer: trained for Cranfield alone, measured on SciFact",
            data="cranfield",
            systems=(*COMPARED, "cranfield-labels"),
            collections=("SciFact test",),
        ),
        "control": Experiment(
            "Negative controls: losses, and grades, that do not know which document has which grade",
            systems=(
                *("untrained", "sorted", "sorted-alone", "sorted-fast", "shuffled", "shuffled-alone", "shuffled-slow"),
                *("alone-slow", "wasserstein"),
            ),
            **ABLATION,
        ),
        "noise": Experiment(
            "Grades shuffled within their list, in a share of the lists",
            systems=(
                *("untrained", "infonce", "infonce-2", "infonce-1", "gaussian", "kl", "contrast"),
                *("wasserstein-1", "wasserstein-2", "wasserstein-kl", "wasserstein"),
            ),
            vary="share of the lists shuffled",
            values={0.0: {}} | {share: {"source": f"shuffle={share}"} for share in (0.1, 0.2, 0.4)},
            **ABLATION,
        ),
        "temperature": Experiment(
            "Temperature",
            systems=("infonce-1", "kl", "wasserstein-2", "wasserstein"),
            vary="temperature",
            values=each("temperature", 0.01, 0.02, 0.05, 0.1),
            **ONE_SEED,
        ),
        "targets": Experiment(
            "Targets",
            systems=("gaussian", "kl", "wasserstein-2"),
            vary="targets",
            values=each("targets", "gain", "softmax", "sqrt"),
            **ONE_SEED,
        ),
        "targets-contrast": Experiment(
            "Targets of losses that need documents without target mass",
            systems=("contrast", "wasserstein"),
            vary="targets",
            values=each("targets", "gain", "sqrt"),
            **ONE_SEED,
        ),
        "ground": Experiment(
            "Ground distance",
            systems=("wasserstein-1", "wasserstein-2", "wasserstein"),
            vary="ground",
            values=each("ground", "grade", "gain", "sqrt"),
            **ONE_SEED,
        ),
        "contrast-share": Experiment(
            "Share of the contrast",
            systems=("wasserstein-1", "wasserstein-2"),
            vary="contrast share",
            # The last is all of it but a billionth: mixed as the others are, and so another run than "contrast".
            values={0.0: {"loss": "wasserstein"}}
            | {share: {"loss": mix("contrast", share)} for share in (0.3, 0.6, 0.85)}
            | {1.0: {"loss": "wasserstein:1e-9+contrast:1"}},
            **ONE_SEED,
        ),
        "kl-share": Experiment(
            "Share of the listwise cross-entropy",
            systems=("wasserstein-1", "wasserstein-2"),
            vary="kl share",
            values={0.0: {"loss": "wasserstein"}, 0.6: {"loss": mix("kl", 0.6)}},
            **ONE_SEED,
        ),
        "in-batch": Experiment(
            "Other lists' documents",
            systems=("infonce-1", "kl", "wasserstein"),
            vary="in batch",
            values=each("in_batch", True, False),
            **ONE_SEED,
        ),
        "batch-lists": Experiment(
            "Lists a batch",
            systems=("infonce-1", "kl", "wasserstein"),
            vary="batch lists",
            values=each("batch_lists", 8, 16, 32, 64),
            **ONE_SEED,
        ),
        "grades": Experiment(
            "Grades kept",
            systems=("infonce", "infonce-1", "kl", "wasserstein"),
            vary="grades",
            values={kept: {"source": f"grades={kept}"} for kept in ("3,0", "3,2,0", "3,2,1,0")},
            **ABLATION,
        ),
    },
)
