"""The plan of what is tuned for reported.py, on queries that no table of it reports.

Of the losses that are neither the default nor its parts: which learning rate and temperature suit them, with the
encoder that moves most. Those of the default and of the other encoders come from benchmarks.defaults.
"""

from dataclasses import replace

from benchmarks.quality.plan import CRANFIELD_CODES, Experiment, each
from benchmarks.quality.reported import REPORTED

COLLECTIONS = {
    "SciFact, training claims": "beir/scifact/train?queries=benchmarks/queries/dev-scifact.txt",
    "Cranfield, odd-numbered": f"cranfield?queries=benchmarks/queries/dev-cranfield.txt&{CRANFIELD_CODES}",
    "NPL, odd-numbered": "beir/npl?queries=odd",
}

DEVELOPMENT = replace(
    REPORTED,
    tuned={},
    encoders={"three-layers": REPORTED.encoders["three-layers"]},
    collections=COLLECTIONS,
    experiments={
        "temperatures": Experiment(
            "Temperatures at learning rate 5e-4",
            systems=("bixse", "rince", "lambda", "brier", "wasserstein-1", "wasserstein-2", "wasserstein"),
            seeds=1,
            vary="temperature",
            values=each("temperature", 0.01, 0.05),
        ),
        "gaussians": Experiment(
            "Learning rates of the Gaussian losses, at temperature .05 and, as published, 1",
            systems=("untrained", "gaussian", "gaussian-published"),
            seeds=1,
            vary="learning rate",
            values=each("learning_rate", 2e-4, 5e-4),
        ),
        "own": Experiment(
            "The transport on the own list beside the contrast",
            systems=("untrained", "contrast", "own-wasserstein", "own-crps"),
            seeds=1,
        ),
    },
)
