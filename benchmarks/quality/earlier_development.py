"""The plan of what was tuned for the earlier figures, on queries that no table reports.

For each loss two to eight pairs of learning rate and temperature; with six layers four of learning rate and share of
the way (interpolate), for three losses three more of rate and temperature before.
"""

from benchmarks.quality.plan import (
    DEFAULT,
    DEV_CRANFIELD,
    DEV_SCIFACT,
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

SIX_LAYERS = MINILM | {"temperature": 0.05}
KL_6 = {"loss": mix("kl", 0.6)}
TUNED_THREE = (
    *("untrained", "infonce", "infonce-2", "infonce-1", "gaussian", "gaussian-sqrt", "kl", "wasserstein-1"),
    *("wasserstein-2", "wasserstein", "labels", "sorted"),
)
TUNED_SIX = (
    *("untrained", "infonce", "infonce-2", "infonce-1", "gaussian", "gaussian-sqrt", "kl", "contrast"),
    *("wasserstein-1", "wasserstein-2", "wasserstein", "wasserstein-contrast-9", "labels"),
)
SHARES = ("wasserstein-contrast-6", "wasserstein-contrast-9", "wasserstein-1-contrast-9")


EARLIER_DEVELOPMENT = Plan(
    measures=MEASURES,
    baselines=("kl",),
    primary="wasserstein",
    settings=SETTINGS | {"learning_rate": 2e-4},
    encoders={
        "three-layers": THREE_LAYERS,
        "three-layers-fast": THREE_LAYERS | {"learning_rate": 5e-4},
        "all-MiniLM-L6-v2": SIX_LAYERS | {"learning_rate": 5e-6},
        "all-MiniLM-L6-v2-fast": SIX_LAYERS | {"learning_rate": 2e-5},
        "all-MiniLM-L6-v2-fastest": SIX_LAYERS | {"learning_rate": 1e-4},
    },
    tuned={},
    data={"lists": tuple(LARGE_MODELS.values()), "labels": tuple(LABELS.values())},
    collections={  # claims of SciFact's training set without lists; half of Cranfield's odd-numbered queries
        "SciFact, training claims": DEV_SCIFACT,
        "Cranfield, odd-numbered": DEV_CRANFIELD,
    },
    systems=SYSTEMS
    | {
        "gaussian": System("Gaussian Wasserstein (SyCL), softmax targets", {"loss": "gaussian", "targets": "softmax"}),
        "wasserstein": System("Wasserstein, order 2, .6 kl", KL_6),
        "wasserstein-3": System("Wasserstein, order 2, .3 kl", {"loss": mix("kl", 0.3)}),
        "wasserstein-1-5": System("Wasserstein, order 1, .5 kl", {"loss": mix("kl", 0.5), "order": 1}),
        "wasserstein-contrast-3": System("Wasserstein, order 2, .3 contrast", {"loss": mix("contrast", 0.3)}),
        "wasserstein-contrast-6": System("Wasserstein, order 2, .6 contrast", {"loss": mix("contrast", 0.6)}),
        "wasserstein-contrast-9": System("Wasserstein, order 2, .85 contrast", {"loss": DEFAULT}),
        "wasserstein-1-contrast-9": System("Wasserstein, order 1, .85 contrast", {"loss": DEFAULT, "order": 1}),
        "labels": System("real labels, Wasserstein, order 2, .6 kl", KL_6, "labels"),
        "kl-gain": System("listwise cross-entropy (kl), gain targets", {"loss": "kl", "targets": "gain"}),
        "wasserstein-gain": System(
            "Wasserstein, order 2, .6 kl, gain targets and grades as they are",
            KL_6 | {"targets": "gain", "ground": "grade"},
        ),
    },
    experiments={
        "shares": Experiment(
            "Shares of the listwise cross-entropy",
            encoders=("three-layers",),
            systems=("untrained", "kl", "wasserstein", "wasserstein-3", "wasserstein-1-5"),
        ),
        "targets": Experiment(
            "Targets and ground distances",
            encoders=("three-layers",),
            systems=("untrained", "kl", "kl-gain", "wasserstein", "wasserstein-gain"),
            seeds=1,
        ),
        "learning-rates": Experiment(
            "Learning rates at temperature .02",
            encoders=("three-layers",),
            systems=TUNED_THREE,
            seeds=1,
            vary="learning_rate",
            values=each("learning_rate", 5e-5, 2e-4, 5e-4),
        ),
        "temperatures": Experiment(
            "Temperatures at learning rate 2e-4",
            encoders=("three-layers",),
            systems=TUNED_THREE,
            seeds=1,
            vary="temperature",
            values=each("temperature", 0.02, 0.05),
        ),
        "hotter": Experiment(
            "Higher temperatures, for what was best at .05, at learning rates 2e-4 and, fast, 5e-4",
            encoders=("three-layers", "three-layers-fast"),
            systems=("untrained", "gaussian", "wasserstein-1"),
            seeds=1,
            vary="temperature",
            values=each("temperature", 0.05, 0.1),
        ),
        "colder": Experiment(
            "Temperature .01 at learning rate 5e-4",
            encoders=("three-layers-fast",),
            systems=TUNED_THREE,
            seeds=1,
            vary="temperature",
            values=each("temperature", 0.01),
        ),
        "contrasts": Experiment(
            "Shares of the contrast",
            encoders=("three-layers-fast",),
            systems=("untrained", "infonce-1", "contrast", "wasserstein-contrast-3", *SHARES),
            seeds=1,
            vary="temperature",
            values=each("temperature", 0.01, 0.02),
        ),
        "contrast-seeds": Experiment(
            "Shares of the contrast, three seeds",
            encoders=("three-layers-fast",),
            systems=("untrained", "infonce-1", "contrast", *SHARES),
            vary="temperature",
            values=each("temperature", 0.01),
        ),
        "in-batch": Experiment(
            "Other lists' documents",
            encoders=("three-layers",),
            systems=("untrained", "kl", "wasserstein"),
            seeds=1,
            vary="in_batch",
            values=each("in_batch", True, False),
        ),
        "six-layers": Experiment(
            "Temperatures of all six layers at learning rates 5e-6 and, fast, 2e-5",
            encoders=("all-MiniLM-L6-v2", "all-MiniLM-L6-v2-fast"),
            systems=("untrained", "infonce-2", "kl", "wasserstein"),
            seeds=1,
            vary="temperature",
            values=each("temperature", 0.02, 0.05),
        ),
        "six-layers-targets": Experiment(
            "Targets and ground distances of all six layers",
            encoders=("all-MiniLM-L6-v2-fast",),
            systems=("untrained", "wasserstein", "wasserstein-gain"),
            seeds=1,
        ),
        "slow": Experiment(
            "All six layers at learning rate 5e-6, temperature .05",
            encoders=("all-MiniLM-L6-v2",),
            systems=TUNED_SIX,
            seeds=1,
        ),
        "interpolate": Experiment(
            "Learning rate 2e-5: how far the weights are from the encoder's own to the trained ones",
            encoders=("all-MiniLM-L6-v2-fast",),
            systems=TUNED_SIX,
            seeds=1,
            vary="interpolate",
            values=each("interpolate", 0.25),
        ),
        "interpolate-fastest": Experiment(
            "Learning rate 1e-4: the same",
            encoders=("all-MiniLM-L6-v2-fastest",),
            systems=TUNED_SIX,
            seeds=1,
            vary="interpolate",
            values=each("interpolate", 0.1, 0.25),
        ),
        "default-rate": Experiment(
            "Learning rate 5e-6, the whole way, three seeds",
            encoders=("all-MiniLM-L6-v2",),
            systems=("untrained", "wasserstein-contrast-9"),
        ),
        "default-interpolate": Experiment(
            "Learning rate 1e-4, a quarter of the way, three seeds",
            encoders=("all-MiniLM-L6-v2-fastest",),
            systems=("untrained", "wasserstein-contrast-9"),
            vary="interpolate",
            values=each("interpolate", 0.25),
        ),
    },
)
