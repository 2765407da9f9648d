"""The plan of what is tuned for reported.py, on queries that no table of it reports.

Of the losses: which temperature or learning rate suits them, with the encoder that moves most. The default's other
settings and those of the other encoders come from benchmarks.defaults.
"""

from dataclasses import replace

from benchmarks.quality.plan import DEV_CRANFIELD, DEV_SCIFACT, LISTS, Experiment, System, each
from benchmarks.quality.reported import REPORTED

COLLECTIONS = {
    "SciFact, training claims": DEV_SCIFACT,
    "Cranfield, odd-numbered": DEV_CRANFIELD,
    "NPL's lists": LISTS["npl"],  # none of which is then trained on
}

DEVELOPMENT = replace(
    REPORTED,
    tuned={"three-layers": {"gaussian": {"temperature": 0.05}}},
    encoders={name: REPORTED.encoders[name] for name in ("three-layers", "all-MiniLM-L6-v2")},
    collections=COLLECTIONS,
    systems=REPORTED.systems
    | {
        "flat-wasserstein": System("the default loss with it", {"loss": "wasserstein:.15+flat-contrast:.85"}),
    },
    experiments={
        "own": Experiment(
            "The transport on the own list beside the contrast",
            encoders=("three-layers",),
            systems=("untrained", "contrast", "own-wasserstein", "own-crps"),
            seeds=1,
        ),
        "contrast": Experiment(
            "A contrast with all of lower grades or with those of grade 0",
            encoders=("three-layers",),
            systems=("flat-contrast", "flat-wasserstein", "rince", "contrast", "wasserstein"),
            seeds=2,
        ),
        "aligned": Experiment(
            "The same with an encoder that was trained for retrieval",
            encoders=("all-MiniLM-L6-v2",),
            systems=("flat-contrast", "contrast"),
            seeds=1,
        ),
        "temperatures": Experiment(
            "Temperatures at learning rate 5e-4",
            encoders=("three-layers",),
            systems=(
                *("infonce-1", "kl", "wasserstein", "wasserstein-1", "wasserstein-2"),
                *("bixse", "rince", "lambda", "brier"),
            ),
            seeds=1,
            vary="temperature",
            values=each("temperature", 0.01, 0.05),
        ),
        "gaussians": Experiment(
            "Learning rates of the Gaussian losses, at temperature .05 and, as published, 1",
            encoders=("three-layers",),
            systems=("gaussian", "gaussian-published"),
            seeds=1,
            vary="learning rate",
            values=each("learning_rate", 2e-4, 5e-4),
        ),
    },
)
