"""The losses at the settings of what is worked out by hand: order 1, temperature 1, mass 2^grade - 1 at the grade."""

from functools import partial

from torch import Tensor

from gradret.loss import functions, grades, retrieval
from gradret.settings import LOSSES

AXIS = {"targets": "gain", "ground": "grade"}
PLAIN = {"order": 1, "temperature": 1.0, **AXIS}
prepare_grades = partial(grades.prepare_grades, **AXIS)
prepare_pairs = partial(retrieval.prepare_pairs, **AXIS)


def make_plain(name: str, **options):
    """The named loss; prepared grades have targets and ground of their own."""
    taken = {key: value for key, value in (PLAIN | options).items() if key in LOSSES[name]}

    def loss(scores, grades, **more):
        given = {key: value for key, value in taken.items() if isinstance(grades, Tensor) or key not in AXIS}
        return functions.LOSS_FUNCTIONS[name](scores, grades, **given | more)

    return loss


wasserstein_loss, gaussian_loss, infonce_loss = map(make_plain, ("wasserstein", "gaussian", "infonce"))
kl_loss, contrast_loss, ranknet_loss = map(make_plain, ("kl", "contrast", "ranknet"))


def wasserstein_retrieval_loss(queries, documents, grades, **options):
    given = {key: value for key, value in PLAIN.items() if isinstance(grades, tuple) or key not in AXIS}
    return retrieval.wasserstein_retrieval_loss(queries, documents, grades, **given | options)
