"""gradret: dense retrievers trained on graded lists with an exact 1-D Wasserstein loss.

The public names load on first use, so that `import gradret` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ gives, for type checkers and editors
    from gradret.console import GradretError as GradretError
    from gradret.data.lists import Passage as Passage
    from gradret.data.lists import RankingList as RankingList
    from gradret.data.lists import read_lists as read_lists
    from gradret.data.lists import write_lists as write_lists
    from gradret.encoder.load import load_encoder as load_encoder
    from gradret.encoder.model import Encoder as Encoder
    from gradret.evaluation.measures import Evaluation as Evaluation
    from gradret.evaluation.measures import evaluate as evaluate
    from gradret.evaluation.search import write_run as write_run
    from gradret.loss.functions import contrast_loss as contrast_loss
    from gradret.loss.functions import gaussian_loss as gaussian_loss
    from gradret.loss.functions import infonce_loss as infonce_loss
    from gradret.loss.functions import kl_loss as kl_loss
    from gradret.loss.functions import ranknet_loss as ranknet_loss
    from gradret.loss.functions import wasserstein_loss as wasserstein_loss
    from gradret.loss.grades import PreparedGrades as PreparedGrades
    from gradret.loss.grades import prepare_grades as prepare_grades
    from gradret.loss.retrieval import PreparedPairs as PreparedPairs
    from gradret.loss.retrieval import prepare_pairs as prepare_pairs
    from gradret.loss.retrieval import wasserstein_retrieval_loss as wasserstein_retrieval_loss
    from gradret.settings import FitSettings as FitSettings
    from gradret.train.loop import fit as fit

__version__ = "0.1.0"

_HOMES = {
    "GradretError": "console",
    "Passage": "data.lists",
    "RankingList": "data.lists",
    "read_lists": "data.lists",
    "write_lists": "data.lists",
    "PreparedGrades": "loss.grades",
    "prepare_grades": "loss.grades",
    "wasserstein_loss": "loss.functions",
    "PreparedPairs": "loss.retrieval",
    "prepare_pairs": "loss.retrieval",
    "wasserstein_retrieval_loss": "loss.retrieval",
    "gaussian_loss": "loss.functions",
    "infonce_loss": "loss.functions",
    "kl_loss": "loss.functions",
    "contrast_loss": "loss.functions",
    "ranknet_loss": "loss.functions",
    "Encoder": "encoder.model",
    "load_encoder": "encoder.load",
    "Evaluation": "evaluation.measures",
    "write_run": "evaluation.search",
    "evaluate": "evaluation.measures",
    "FitSettings": "settings",
    "fit": "train.loop",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradret' has no attribute '{name}'")
    return getattr(import_module(f"gradret.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
