"""gradret: dense retrievers trained on graded lists with an exact 1-D Wasserstein loss.

The public names load on first use, so that `import gradret` stays light.
"""

from importlib import import_module

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
    "ranknet_loss": "losses",
    "Encoder": "encoder",
    "evaluate": "evaluation",
    "FitSettings": "train",
    "fit": "train",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'gradret' has no attribute '{name}'")
    return getattr(import_module(f"gradret.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
