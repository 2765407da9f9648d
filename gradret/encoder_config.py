"""What a directory says of its encoder besides the weights: pooling, prompts, similarity, lengths."""

from dataclasses import dataclass
from pathlib import Path

from gradret.errors import GradretError
from gradret.files import read_json

FOREIGN_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # sentence-transformers' names and ours


@dataclass(frozen=True)
class EncoderConfig:
    """How texts become vectors and vectors scores.

    Attributes:
        pooling: "mean", "cls" or "last", over the real tokens.
        normalize: whether embeddings have length 1.
        similarity: "cosine" or "dot".
        query_prefix, document_prefix: put before every query or document.
        query_max_length, document_max_length: tokens, special ones and prefix included; the rest is cut off.
    """

    pooling: str = "mean"
    normalize: bool = True
    similarity: str = "cosine"
    query_prefix: str = ""
    document_prefix: str = ""
    query_max_length: int = 512
    document_max_length: int = 512


def read_config(directory: Path, name: str, longest: int) -> EncoderConfig:
    """The configuration of a sentence-transformers directory, as sentence-transformers reads it.

    A plain transformers directory has none: then mean pooling, normalised, cosine.

    Args:
        directory: the encoder's files.
        name: how the user named it.
        longest: tokens that tokenizer and model can take.
    Raises: GradretError when a part is not supported.
    """
    if not (directory / "modules.json").is_file():
        return EncoderConfig(query_max_length=longest, document_max_length=longest)
    modules = read_json(directory / "modules.json")
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown or kinds[:2] != ["Transformer", "Pooling"]:
        raise GradretError(
            f"{name}: sentence-transformers module '{(unknown or kinds or ['none'])[0]}' is not supported there; "
            "expected Transformer, Pooling and Normalize"
        )
    files = sorted((directory / modules[0]["path"]).glob("sentence_*_config.json"))  # bert, or an older name
    lengths = read_json(files[0]) if files else {}
    longest = min(lengths.get("max_seq_length") or longest, longest)
    whole = read_json(directory / "config_sentence_transformers.json")
    if whole.get("truncate_dim"):
        raise GradretError(f"{name}: truncate_dim {whole['truncate_dim']} is not supported; expected whole embeddings")
    prompts = whole.get("prompts") or {}
    return EncoderConfig(
        _read_pooling(read_json(directory / modules[1]["path"] / "config.json"), name),
        "Normalize" in kinds,
        whole.get("similarity_fn_name") or "cosine",
        prompts.get("query", ""),
        prompts.get("document", ""),
        min(lengths.get("query_length") or longest, longest),
        min(lengths.get("document_length") or longest, longest),
    )


def _read_pooling(config: dict, name: str) -> str:
    modes = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on
    ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in FOREIGN_POOLINGS or not config.get("include_prompt", True):
        raise GradretError(
            f"{name}: pooling {'+'.join(modes) or 'none'} is not supported; "
            f"expected one of {', '.join(FOREIGN_POOLINGS)}, over the prompt too"
        )
    return FOREIGN_POOLINGS[modes[0]]
