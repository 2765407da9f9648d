"""Where a GGUF model's files are looked for."""

import huggingface_hub
import pytest

from gradret.console import GradretError
from gradret.generate.llama import choose_files, locate_gguf

SPLIT = [f"q8/model-q8-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
FILES = ["README.md", "mmproj-f16.gguf", "model-q4.gguf", *reversed(SPLIT)]


def test_choose_files():
    assert choose_files(FILES, "model-q4.gguf") == ["model-q4.gguf"]
    assert choose_files(FILES, SPLIT[0]) == SPLIT
    assert choose_files(FILES[:3], "") == ["model-q4.gguf"]
    assert choose_files(FILES, "") == []  # two models: which is meant?
    assert choose_files(FILES, "model-q5.gguf") == []
    assert choose_files(FILES[:-1], SPLIT[1]) == []  # a part is missing
    assert choose_files([], "") == []


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A local hub cache with one repository, and no hub."""
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / "q8").mkdir(parents=True)
    for name in ("model-q4.gguf", *SPLIT):
        (snapshot / name).write_bytes(b"GGUF")

    def snapshot_download(name, local_files_only):
        assert local_files_only
        return huggingface_hub._snapshot_download.snapshot_download(name, cache_dir=tmp_path, local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return snapshot


def test_a_cached_model_needs_no_hub(hub_cache):
    assert locate_gguf("owner/model:model-q4.gguf") == hub_cache / "model-q4.gguf"
    assert locate_gguf(f"owner/model:{SPLIT[1]}") == hub_cache / SPLIT[0]
    for file in SPLIT:
        (hub_cache / file).unlink()
    assert locate_gguf("owner/model") == hub_cache / "model-q4.gguf"


def test_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").write_bytes(b"GGUF")
    assert str(locate_gguf("owner/model")) == "owner/model"


class Hub:
    """A hub's answers."""

    def model_info(self, name, timeout):
        class Info:
            siblings = [type("File", (), {"rfilename": file}) for file in FILES]  # noqa: RUF012

        return Info()


def test_what_the_hub_has(hub_cache, monkeypatch):
    fetched = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda _, file, etag_timeout: fetched.append(file) or f"/cache/{file}"
    )
    assert str(locate_gguf(f"other/model:{SPLIT[0]}")) == f"/cache/{SPLIT[0]}"
    assert fetched == SPLIT
    with pytest.raises(GradretError) as error:
        locate_gguf("other/model")
    assert str(error.value) == (
        "other/model: name one of the repository's GGUF files as other/model:FILE; there: mmproj-f16.gguf, "
        f"model-q4.gguf, {', '.join(reversed(SPLIT))}"
    )


def test_messages(hub_cache, tmp_path):
    with pytest.raises(
        GradretError, match=r"^other/model: no such file, not in the local cache, and the hub can not be"
    ):
        locate_gguf("other/model")
    for name in ("model.gguf", str(tmp_path), "a/b/c"):
        with pytest.raises(GradretError, match=r": no such file; give a GGUF file, or a hub repository as OWNER/NAME"):
            locate_gguf(name)
