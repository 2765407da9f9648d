"""gradret: dense retrievers trained on graded lists with an exact 1-D Wasserstein loss.

The public names load on first use, so that `import gradret` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ gives, for type checkers and editors
    from gradret.encoder import Encoder as Encoder
    from gradret.encoder_load import load_encoder as load_encoder
    from gradret.errors import GradretError as GradretError
    from gradret.evaluation import Evaluation as Evaluation
    from gradret.evaluation import evaluate as evaluate
    from gradret.grades import PreparedGrades as PreparedGrades
    from gradret.grades import prepare_grades as prepare_grades
    from gradret.lists import Passage as Passage
    from gradret.lists import RankingList as RankingList
    from gradret.lists import read_lists as read_lists
    from gradret.lists import write_lists as write_lists
    from gradret.losses import contrast_loss as contrast_loss
    from gradret.losses import gaussian_loss as gaussian_loss
    from gradret.losses import infonce_loss as infonce_loss
    from gradret.losses import kl_loss as kl_loss
    from gradret.losses import ranknet_loss as ranknet_loss
    from gradret.losses import wasserstein_loss as wasserstein_loss
    from gradret.pairs import PreparedPairs as PreparedPairs
    from gradret.pairs import prepare_pairs as prepare_pairs
    from gradret.retrieval_loss import wasserstein_retrieval_loss as wasserstein_retrieval_loss
    from gradret.runs import write_run as write_run
    from gradret.settings import FitSettings as FitSettings
    from gradret.train import fit as fit

__version__ = "0.1.0"

_HOMES = {
    "GradretError": "errors",
    "Passage": "lists",
    "RankingList": "lists",
    "read_lists": "lists",
    "write_lists": "lists",
    "PreparedGrades": "grades",
    "prepare_grades": "grades",
    "wasserstein_loss": "losses",
    "PreparedPairs": "pairs",
    "prepare_pairs": "pairs",
    "wasserstein_retrieval_loss": "retrieval_loss",
    "gaussian_loss": "losses",
    "infonce_loss": "losses",
    "kl_loss": "losses",
    "contrast_loss": "losses",
    "ranknet_loss": "losses",
    "Encoder": "encoder",
    "load_encoder": "encoder_load",
    "Evaluation": "evaluation",
    "write_run": "runs",
    "evaluate": "evaluation",
    "FitSettings": "settings",
    "fit": "train",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradret' has no attribute '{name}'")
    return getattr(import_module(f"gradret.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
