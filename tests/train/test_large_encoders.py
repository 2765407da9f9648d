"""Decoders as encoders, tiny and with random weights: last-token pooling, instructions, adapters on bfloat16."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLE_FILE
from forked import run_forked
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from gradret.data.lists import read_lists, write_lists
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder
from gradret.settings import FitSettings
from gradret.train import loop as trainer
from gradret.train.loop import fit
from gradret.train.memory import merge_adapters

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2Model),
    "qwen3": (Qwen3Config, Qwen3Model),
    "mistral": (MistralConfig, MistralModel),
}
TEXTS = [
    "bread needs yeast",
    "tea",
    "the moon pulls the sea, and the sea pulls back " * 2,
    "a longer line on rye bread",
]
INSTRUCTION = "Instruct: find passages that answer it\nQuery: "
END, PAD = 0, 1


pytestmark = pytest.mark.usefixtures("one_thread")


def make_tiny_decoder(
    directory: Path, family: str = "qwen2", *, side: str = "left", has_pad: bool = False, appends_end: bool = True
) -> Path:
    """A two-layer decoder of width 32 over byte pairs of the sample, as a plain transformers directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train([str(SAMPLE_FILE)], trainers.BpeTrainer(vocab_size=600, **options))
    if appends_end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {special[END]}", special_tokens=[(special[END], END)]
        )
    names = {"eos_token": special[END]} | ({"pad_token": special[PAD]} if has_pad else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, padding_side=side, **names)
    make_config, make_model = FAMILIES[family]
    torch.manual_seed(0)
    config = make_config(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.2,  # large enough that attention looks at more than the token itself
        pad_token_id=PAD if has_pad else None,
        bos_token_id=None,
        eos_token_id=END,
    )
    make_model(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory) -> Path:
    """A Qwen2 that pads on the left, with the end token it appends to each text."""
    return make_tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def six_lists(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "six.jsonl"
    write_lists(path, list(read_lists(SAMPLE_FILE))[:6])
    return path


@pytest.mark.parametrize("appends_end", [True, False])
@pytest.mark.parametrize("has_pad", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_last_token_pooling_pads_on_either_side(tmp_path, family, has_pad, appends_end):
    found = {}
    for side in ("left", "right"):
        options = {"side": side, "has_pad": has_pad, "appends_end": appends_end}
        encoder = load_encoder(str(make_tiny_decoder(tmp_path / side, family, **options)), pooling="last")
        assert encoder.tokenizer.padding_side == side
        assert encoder.tokenizer.pad_token_id == (PAD if has_pad else END)
        found[side] = encoder.encode(TEXTS)
        alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
        np.testing.assert_allclose(found[side], alone, atol=1e-5)
    np.testing.assert_allclose(found["left"], found["right"], atol=1e-5)

    (ids,) = encoder.tokenize(TEXTS[:1], "document")
    words = encoder.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert ids.tolist() == words + [END] * appends_end
    with torch.no_grad():  # the vector at the last token, which is the end token even where padding is that one, too
        ids = torch.tensor([ids.tolist()], device=encoder.device)
        hidden = encoder.transformer(ids).last_hidden_state[0].cpu()  # (T, 32)
    np.testing.assert_allclose(found["left"][0], torch.nn.functional.normalize(hidden[-1], dim=0), atol=1e-5)
    assert np.abs(encoder.encode(["wheat needs yeast"]) - found["left"][0]).max() > 0.01  # an earlier token has a say


def test_a_text_without_any_token_has_an_embedding(tmp_path):
    encoder = load_encoder(str(make_tiny_decoder(tmp_path, appends_end=False)), pooling="last")
    assert encoder.tokenizer("")["input_ids"] == []
    embeddings = encoder.encode(["", "tea"])
    assert np.isfinite(embeddings).all()
    np.testing.assert_allclose(embeddings[0], encoder.encode([""])[0], atol=1e-6)


def test_a_text_cut_short_keeps_its_end_token(tiny_decoder):
    encoder = load_encoder(str(tiny_decoder), pooling="last", document_max_length=8)
    (ids,) = encoder.tokenize(TEXTS[2:3], "document")
    assert ids[-1] == END
    assert len(ids) == 8
    assert ids[:-1].tolist() == encoder.tokenizer(TEXTS[2])["input_ids"][:7]


def test_instructions_stand_before_queries_alone(tiny_decoder, tmp_path):
    encoder = load_encoder(str(tiny_decoder), pooling="last", query_prefix=INSTRUCTION)
    plain = load_encoder(str(tiny_decoder), pooling="last")
    (query,), (document,) = (encoder.tokenize(["tea"], kind) for kind in ("query", "document"))
    assert encoder.tokenizer.decode(query) == f"{INSTRUCTION}tea<|endoftext|>"
    assert encoder.tokenizer.decode(document) == "tea<|endoftext|>"
    instructed = [INSTRUCTION + text for text in TEXTS]
    np.testing.assert_allclose(encoder.encode(TEXTS, "query"), plain.encode(instructed), atol=1e-6)
    np.testing.assert_array_equal(encoder.encode(TEXTS), plain.encode(TEXTS))
    assert np.abs(encoder.encode(TEXTS, "query") - encoder.encode(TEXTS)).max() > 0.01
    encoder.save(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    assert theirs.prompts == {"query": INSTRUCTION, "document": ""}
    np.testing.assert_allclose(theirs.encode_query(TEXTS), encoder.encode(TEXTS, "query"), atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(TEXTS), encoder.encode(TEXTS), atol=1e-5)


def run_settings(model: Path, lists: Path, **changes) -> FitSettings:
    options = {"data": (str(lists),), "model": str(model), "pooling": "last", "query_prefix": INSTRUCTION}
    options |= {"batch_lists": 6, "learning_rate": 3e-3, "temperature": 0.1, "precision": "float32"}
    options |= {"epochs": 16, "document_max_length": 48, "query_max_length": 48, "interpolate": 1.0}
    return FitSettings(**options | changes)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_falls(values: list[float], share: float = 0.5) -> None:
    assert np.isfinite(values).all()
    assert len(values) == 16
    assert np.mean(values[-3:]) < share * values[0]


def assert_sentence_transformer_agrees(encoder: Encoder, out: Path) -> None:
    theirs = SentenceTransformer(str(out), device="cpu").float()
    assert theirs.tokenizer.padding_side == encoder.tokenizer.padding_side == "left"
    for kind, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        found = np.asarray(encode(TEXTS, convert_to_tensor=True).float())
        np.testing.assert_allclose(found, encoder.encode(TEXTS, kind), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_beside_weights_in_bfloat16(tmp_path, six_lists, monkeypatch, family):
    pytest.importorskip("peft")
    model, kept = make_tiny_decoder(tmp_path / "model", family), {}

    def merge(encoder):
        kept.update({name: parameter.detach().to("cpu", copy=True) for name, parameter in encoder.named_parameters()})
        kept["embeddings"] = encoder.encode(TEXTS)
        merge_adapters(encoder)

    monkeypatch.setattr(trainer, "merge_adapters", merge)
    fit(run_settings(model, six_lists, lora=4, weights="bfloat16"), tmp_path / "out")
    assert_falls(losses(tmp_path / "out"))
    embeddings, start = kept.pop("embeddings"), load_file(model / "model.safetensors")
    trained = {name: tensor for name, tensor in kept.items() if ".lora_" in name}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert len(trained) == 2 * 2 * 7  # A and B, 2 layers: query, key, value, output, gate, up and down
    assert all(tensor.any() for tensor in trained.values())
    for name in kept.keys() - trained.keys():
        original = start[name.removeprefix("transformer.base_model.model.").replace(".base_layer", "")]
        assert torch.equal(kept[name], original.bfloat16()), name
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    saved = load_encoder(str(tmp_path / "out"), weights="bfloat16")
    rounding = np.abs(saved.encode(TEXTS) - embeddings).max()  # of the merged weights
    moved = np.abs(load_encoder(str(model), pooling="last").encode(TEXTS) - embeddings).max()
    assert rounding < 0.03 < 0.1 < moved


def test_what_adapters_add_is_saved_by_the_share_asked_for(tiny_decoder, six_lists, tmp_path):
    pytest.importorskip("peft")
    settings = run_settings(tiny_decoder, six_lists, lora=4, epochs=4)
    fit(settings, tmp_path / "whole")
    fit(replace(settings, interpolate=0.25), tmp_path / "part")
    files = [path / "model.safetensors" for path in (tiny_decoder, tmp_path / "whole", tmp_path / "part")]
    start, whole, part = map(load_file, files)
    assert max((whole[name] - start[name]).abs().max() for name in start) > 0.01
    for name, tensor in part.items():
        torch.testing.assert_close(tensor, torch.lerp(start[name], whole[name], 0.25))


def test_adapters_checkpointing_and_chunks_together(tiny_decoder, six_lists, tmp_path):
    pytest.importorskip("peft")
    small = {"lora": 4, "lora_alpha": 16.0}
    fit(run_settings(tiny_decoder, six_lists, **small), tmp_path / "plain")
    thrifty = run_settings(tiny_decoder, six_lists, **small, gradient_checkpointing=True, chunk=4)
    fit(thrifty, tmp_path / "out")
    found = losses(tmp_path / "out")
    assert_falls(found)
    # The same gradients in less memory, to rounding.
    np.testing.assert_allclose(found, losses(tmp_path / "plain"), rtol=1e-4)
    encoder = load_encoder(str(tmp_path / "out"))
    assert (encoder.config.pooling, encoder.config.query_prefix) == ("last", INSTRUCTION)
    assert_sentence_transformer_agrees(encoder, tmp_path / "out")


def test_all_weights_of_a_decoder_train(tiny_decoder, six_lists, tmp_path):
    fit(run_settings(tiny_decoder, six_lists), tmp_path / "out")
    assert_falls(losses(tmp_path / "out"))
    start, end = (load_file(path / "model.safetensors") for path in (tiny_decoder, tmp_path / "out"))
    assert start.keys() == end.keys()
    assert not any(torch.equal(start[name], end[name]) for name in start)
    assert_sentence_transformer_agrees(load_encoder(str(tmp_path / "out")), tmp_path / "out")


def test_the_command_line(tiny_decoder, six_lists, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    command = ["-m", "gradret", "fit", "--data", six_lists, "--model", tiny_decoder, "--out", out]
    command += [
        "--set",
        "pooling=last",
        "--lora",
        "4",
        "--set",
        "lora_targets=q_proj,v_proj",
        "--gradient-checkpointing",
    ]
    command += ["--set", "weights=bfloat16", "--query-prefix", "Instruct: find it\nQuery: ", "--chunk", "8"]
    command += ["--max-steps", "3", "--batch-lists", "6", "--epochs", "3", "--learning-rate", "1e-2", "--json"]
    result = run_forked(command)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert json.loads(result.stdout)["steps"] == len(losses(out)) == 3
    start, end = (load_file(path / "model.safetensors") for path in (tiny_decoder, out))
    assert start.keys() == end.keys()
    changed = {name.split(".", 2)[2] for name in start if not torch.equal(start[name].bfloat16(), end[name])}
    assert changed == {"self_attn.q_proj.weight", "self_attn.v_proj.weight"}
    encoder = load_encoder(str(out), weights="bfloat16")
    assert (encoder.config.pooling, encoder.config.query_prefix) == ("last", "Instruct: find it\nQuery: ")
    # In float32: rounding to bfloat16 would differ with the shapes of batches, and by processor.
    assert_sentence_transformer_agrees(load_encoder(str(out)), out)
