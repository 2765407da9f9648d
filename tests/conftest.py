"""Shared pieces: a tiny encoder with random weights, small list files, and the shared collections if they are there."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the workers share the processors; PyTorch reads this when it is loaded
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    )

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for other in ("JAX", "CUPY", "TENSORFLOW"):  # POT loads them where they are, and JAX takes most of a GPU's memory
    os.environ.setdefault(f"POT_BACKEND_DISABLE_{other}", "1")

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("GRADRET_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
# Favourite words of make_tiny_gguf's model, cut off as in its vocabulary: its briefs share some with the query.
TINY_QUERY = "consequ called broader cooler ating became blue adjust counted becomes above emissio denser curious {}"
# Without distances: random weights write no brief about a thing, but any brief is one for a definition.
DEFINED_SCALE = REPOSITORY / "tests" / "scale.json"
SAMPLE_FILE = REPOSITORY / "gradret" / "data" / "sample.jsonl"


def make_tiny_encoder(directory: Path, *, dropout: float = 0.1) -> Path:
    """A two-layer BERT of width 32 over the sample's words, as a plain transformers directory."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted(set(re.findall(r"[a-z]+", SAMPLE_FILE.read_text().lower())))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(special) + len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def known_losses():
    """The table of losses is as it was after a test of plans, which register more."""
    from gradret.settings import LOSSES

    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)
    if functions := sys.modules.get("gradret.loss.functions"):
        for name in functions.LOSS_FUNCTIONS.keys() - before.keys():
            del functions.LOSS_FUNCTIONS[name]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("tiny"))


def make_tiny_gguf(path: Path, *, liked: dict | None = None, **changes) -> Path:
    """A two-layer GGUF model with random weights that likes to write words of the sample, digits now and then.

    Its weights are float32, for which llama.cpp has no kernels of Intel's AMX: they can crash where llama-cpp-python
    itself loads a model (see gradret.generate.llama.make_parameters).
    """
    from benchmarks.speed.random_gguf import Size, byte_characters, write_random_gguf

    words = sorted(set(re.findall("[a-z]{3,7}", SAMPLE_FILE.read_text().lower())))[::3][:400]
    space = byte_characters()[ord(" ")]
    bias = {
        "": -6.0,
        **{space + word: 4.0 for word in words},
        **{d: -3.0 for d in "0123"},
        "<|im_end|>": -8.0,
        # It ends sentences and strings.
        ".": 6.5,
        '"': 7.0,
        **(liked or {}),
    }
    size = Size(layers=2, width=64, heads=2, kv_heads=1, feed_forward=128, vocabulary=3000, context=16_384)
    write_random_gguf(path, size, words=words, bias=bias, quantized=False, **changes)
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    pytest.importorskip("llama_cpp")
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def real_server(tmp_path_factory):
    """The URL of llama_cpp.server with a tiny model that ends its strings by itself and likes digits."""
    pytest.importorskip("llama_cpp.server.app")
    path = make_tiny_gguf(tmp_path_factory.mktemp("served") / "tiny.gguf", liked=dict.fromkeys("0123", 8.0))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = path.with_suffix(".log")
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--port", str(port), "--n_ctx", "8192"]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    deadline_s = time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < deadline_s:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(f"llama_cpp.server did not start: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def one_thread():
    """Matrices of 32 by 32 are multiplied before a second thread has woken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def list_record(query_id: str, grades=(3, 2, 1, 0), **extra) -> dict:
    passages = [{"grade": g, "text": f"passage {i} about {query_id}"} for i, g in enumerate(grades)]
    return {"query_id": query_id, "query": f"what is {query_id}", "passages": passages, **extra}


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name: str, records: list) -> Path:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path

    return write


@pytest.fixture
def beir_directory(tmp_path) -> Path:
    """Three documents, two queries, splits train and test."""
    root = tmp_path / "beir"
    (root / "qrels").mkdir(parents=True)
    documents = [("d1", "Tides", "the moon pulls the sea"), ("d2", "", "bread needs yeast"), ("d3", "Bread", "rye")]
    lines = [json.dumps({"_id": i, "title": t, "text": x}) for i, t, x in documents]
    (root / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    queries = [{"_id": "q1", "text": "why tides"}, {"_id": "q2", "text": "bread"}, {"_id": "q3", "text": "unjudged"}]
    (root / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    header = "query-id\tcorpus-id\tscore\n"
    (root / "qrels" / "test.tsv").write_text(header + "q1\td1\t1\nq2\td2\t2\nq2\td3\t1\n")
    (root / "qrels" / "train.tsv").write_text(header + "q2\td3\t1\n")
    return root


def pytest_configure(config):
    """A throw-away IR_DATASETS_HOME with the shared collections; ir_datasets looks at it once, when it is imported."""
    config.ir_datasets_home = tempfile.TemporaryDirectory(prefix="ir_datasets-")
    os.environ["IR_DATASETS_HOME"] = config.ir_datasets_home.name
    for file in (SHARED / "ir_datasets").rglob("*.*"):
        if file.is_file():
            target = Path(config.ir_datasets_home.name) / file.relative_to(SHARED / "ir_datasets")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def pytest_unconfigure(config):
    config.ir_datasets_home.cleanup()


@pytest.fixture(scope="session")
def shared_home() -> None:
    """Skips where the shared collections are not."""
    if not (SHARED / "ir_datasets").is_dir():
        pytest.skip(f"needs the shared collections in {SHARED}")


@pytest.fixture(scope="session")
def shared_graded() -> dict[str, Path]:
    """The shared graded lists by collection."""
    if not (SHARED / "graded").is_dir():
        pytest.skip(f"needs the shared graded lists in {SHARED}")
    return {name: SHARED / "graded" / f"{name}.jsonl" for name in ("cranfield", "scifact")}
