"""Where a GGUF model's files are: on disk, in the local hub cache, or on the hub."""

import re
from pathlib import Path

from gradret.errors import GradretError
from gradret.hub import HUB_TIMEOUT_S, tell_reason

SPLIT = re.compile(r"-[0-9]{5}-of-([0-9]{5})(?=\.gguf$)")
SHOWN = 8


def locate_gguf(name: str) -> Path:
    """The local path of a GGUF model: a file, or HUB_REPO[:FILE], fetched when it is not in the local hub cache.

    Of a model split into several files the first is returned, and all are fetched.

    Raises: GradretError when there is no such file, the repository has several models and none is named, or the hub
        does not answer.
    """
    if Path(name).is_file():
        return Path(name)
    repository, _, file = name.partition(":")
    if Path(name).exists() or name.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise GradretError(f"{name}: no such file; give a GGUF file, or a hub repository as OWNER/NAME[:FILE.gguf]")
    return _find_in_cache(repository, file) or _fetch(name, repository, file)


def choose_files(files: list[str], file: str) -> list[str]:
    """The files of the one model that is meant, all parts in order; [] when it is not there or several could be."""
    models: dict[str, list[str]] = {}
    for found in sorted(files):
        if found.endswith(".gguf") and "mmproj" not in found:  # an image encoder beside the model
            models.setdefault(SPLIT.sub("", found), []).append(found)
    if not file and len(models) > 1:
        return []
    parts = models.get(SPLIT.sub("", file), []) if file else next(iter(models.values()), [])
    split = SPLIT.search(parts[0]) if parts else None
    return parts if not split or len(parts) == int(split.group(1)) else []


def _find_in_cache(repository: str, file: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(repository, local_files_only=True))
    except HFValidationError:
        raise GradretError(f"{repository}: no such file, and not a hub repository's name (OWNER/NAME)") from None
    except LocalEntryNotFoundError:
        return None
    parts = choose_files([str(path.relative_to(directory)) for path in directory.rglob("*.gguf")], file)
    return directory / parts[0] if parts else None


def _fetch(name: str, repository: str, file: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = [f.rfilename for f in HfApi().model_info(repository, timeout=HUB_TIMEOUT_S).siblings]
        parts = choose_files(files, file)
        fetched = [hf_hub_download(repository, part, etag_timeout=HUB_TIMEOUT_S) for part in parts]
    except RepositoryNotFoundError:
        raise GradretError(f"{name}: no such file, and the hub has no such model") from None
    except Exception as error:  # the hub's client raises whatever its HTTP library does
        raise GradretError(
            f"{name}: no such file, not in the local cache, and the hub can not be reached ({tell_reason(error)})"
        ) from error
    if not fetched:
        there = [f for f in files if f.endswith(".gguf")]
        shown = ", ".join(there[:SHOWN]) + (f" and {len(there) - SHOWN} more" if len(there) > SHOWN else "") or "none"
        raise GradretError(f"{name}: name one of the repository's GGUF files as {repository}:FILE; there: {shown}")
    return Path(fetched[0])
