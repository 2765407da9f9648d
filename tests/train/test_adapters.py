"""Low-rank adapters and activation checkpointing: by hand first, then as a run trains, saves and resumes them."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import make_tiny_encoder
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    MambaConfig,
    MambaModel,
    MPNetConfig,
    MPNetModel,
)

from gradret.cli import main
from gradret.console import GradretError
from gradret.encoder.directory import EncoderConfig
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder
from gradret.evaluation.measures import Evaluation
from gradret.settings import FitSettings
from gradret.train import loop as trainer
from gradret.train.loop import fit
from gradret.train.memory import adapt, merge_adapters

pytest.importorskip("peft")

TEXTS = ["bread needs yeast", "", "the moon pulls the sea " * 10, "tea"]
SELF = ["attention.self.query", "attention.self.key", "attention.self.value"]
QUERY = "encoder.layer.0.attention.self.query"
LONG = EncoderConfig(query_max_length=64, document_max_length=64)


pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(model: Path, *, weights: str = "float32", **settings) -> Encoder:
    """The encoder in `model` with adapters of rank 4."""
    encoder = load_encoder(str(model), weights=weights)
    adapt(encoder, FitSettings(model=str(model), weights=weights, **{"lora": 4, **settings}))
    return encoder


def adapters(encoder: Encoder, matrix: str = "") -> dict[str, torch.Tensor]:
    """The adapters by their layers' paths, A or B alone if asked."""
    mark = ".base_model.model."
    return {
        name.split(mark)[1]: parameter.detach()
        for name, parameter in encoder.named_parameters()
        if f".lora_{matrix}" in name
    }


def adapted_layers(encoder: Encoder) -> set[str]:
    return {name.split(".lora_")[0] for name in adapters(encoder, "A")}


def fill_adapters(encoder: Encoder) -> None:
    """B starts at zero, where the adapters have no effect: give it random values."""
    generator = torch.Generator().manual_seed(1)
    for tensor in adapters(encoder, "B").values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_an_adapter_by_hand(tiny_encoder):
    encoder = adapted(tiny_encoder, lora=1, lora_alpha=4.0, lora_targets=("query",))
    layer = encoder.transformer.get_submodule(f"base_model.model.{QUERY}")
    found = adapters(encoder)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.eye(32))
        layer.base_layer.bias.zero_()
        found[f"{QUERY}.lora_A.default.weight"].zero_()[0, 0] = 2
        found[f"{QUERY}.lora_B.default.weight"].zero_()[1, 0] = 3
    x = torch.zeros(32, device=encoder.device)
    x[0], x[5] = 1, 7
    y = layer(x)
    assert (y[0], y[1], y[5], y.sum()) == (1, 4 * 3 * 2, 7, 32)  # W x, and (4 / 1) B A x in place 1
    merge_adapters(encoder)
    weight = encoder.transformer.get_submodule(QUERY).weight.cpu()
    assert weight[1, 0] == 24
    assert torch.count_nonzero(weight - torch.eye(32)) == 1


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_adapters_change_nothing_at_the_start(tiny_encoder, weights):
    plain = load_encoder(str(tiny_encoder), weights=weights)
    encoder = adapted(tiny_encoder, weights=weights, lora_dropout=0.5)
    np.testing.assert_array_equal(encoder.encode(TEXTS), plain.encode(TEXTS))
    fill_adapters(encoder)
    assert np.abs(encoder.encode(TEXTS) - plain.encode(TEXTS)).max() > 0.01


def test_adapters_alone_are_trained_in_float32(tiny_encoder):
    encoder = adapted(tiny_encoder, weights="bfloat16")
    trained = {n: (p.dtype, p.requires_grad) for n, p in encoder.named_parameters()}
    for name, (dtype, requires_grad) in trained.items():
        is_adapter = ".lora_" in name
        assert (dtype, requires_grad) == (torch.float32 if is_adapter else torch.bfloat16, is_adapter), name
    # BERT has 6 linear layers a block besides the pooler's: 4 of 32 to 32, and 32 to 64 and back.
    assert sum(p.numel() for p in adapters(encoder).values()) == 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))


def test_the_start_depends_on_the_seed_alone(tiny_encoder):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adapters(adapted(tiny_encoder))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, coarse, other = (
        adapters(adapted(tiny_encoder, **more)) for more in ({}, {"weights": "bfloat16"}, {"seed": 1})
    )
    assert len(first) == len(again) == len(coarse) == len(other) == 24
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor)
        assert torch.equal(coarse[name], tensor)  # not rounded to the frozen weights' type
        assert torch.equal(other[name], tensor) == (".lora_B." in name)
        bound = tensor.shape[1] ** -0.5  # uniform, as peft and PyTorch start a linear layer
        assert tensor.abs().max() <= (bound if ".lora_A." in name else 0)


@pytest.mark.parametrize(
    ("targets", "endings"),
    [
        ((), [*SELF, "attention.output.dense", "intermediate.dense", "output.dense"]),
        (("query",), ["attention.self.query"]),
        (("self.value", "key"), SELF[1:]),
        (("attention.output.dense",), ["attention.output.dense"]),
        (("output.dense",), ["attention.output.dense", "output.dense"]),
    ],
)  # fmt: skip
def test_targets_are_chosen_by_the_end_of_their_names(tiny_encoder, targets, endings):
    encoder = adapted(tiny_encoder, lora_targets=targets)
    assert adapted_layers(encoder) == {f"encoder.layer.{i}.{ending}" for i in (0, 1) for ending in endings}


def test_one_layer_alone(tiny_encoder):
    assert adapted_layers(adapted(tiny_encoder, lora_targets=("layer.1.attention.self.key",))) == {
        "encoder.layer.1.attention.self.key"
    }


@pytest.mark.parametrize("name", ["q_proj", "uery", "LayerNorm", "attention", "pooler.dense", ".*"])
def test_a_target_that_matches_nothing(tiny_encoder, tmp_path, name):
    arguments = ("fit", "--model", tiny_encoder, "--lora", 4, "--set", f"lora_targets=query,{name}")
    result = invoke(*arguments, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: lora_targets {name}: matches no linear layer of {tiny_encoder}; it has: dense, key, query, value\n",
    )
    assert not (tmp_path / "out").exists()


def test_without_peft(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    result = invoke("fit", "--model", tiny_encoder, "--lora", 4, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: --lora needs the package peft: pip install 'gradret[lora]'\n",
    )
    adapt(load_encoder(str(tiny_encoder)), FitSettings(gradient_checkpointing=True))  # needs no peft


def test_layers_that_peft_knows_not_to_work(tiny_encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    config = MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(GradretError, match="^tiny/mamba: cannot get adapters: .*out_proj"):
        adapt(Encoder(MambaModel(config), tokenizer, LONG), FitSettings(model="tiny/mamba", lora=4))
    encoder = Encoder(MambaModel(config), tokenizer, LONG)
    adapt(encoder, FitSettings(model="tiny/mamba", lora=4, lora_targets=("in_proj",)))
    assert adapted_layers(encoder) == {"layers.0.mixer.in_proj"}


def test_adapting_warns_of_nothing(tiny_encoder):
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("error", category)
        adapted(tiny_encoder, gradient_checkpointing=True)


def make_gpt2(tiny_encoder: Path, directory: Path) -> Path:
    """A tiny GPT-2, whose linear layers are Conv1D: their weights lie the other way round."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2Model(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_merged_adapters_leave_embeddings_and_no_trace(tiny_encoder, tmp_path, family):
    model = tiny_encoder if family == "bert" else make_gpt2(tiny_encoder, tmp_path / "gpt2")
    plain = load_encoder(str(model))
    encoder = adapted(model)
    fill_adapters(encoder)
    before = encoder.encode(TEXTS)
    assert np.abs(before - plain.encode(TEXTS)).max() > 0.01
    merge_adapters(encoder)
    np.testing.assert_allclose(encoder.encode(TEXTS), before, atol=5e-6)
    assert type(encoder.transformer) is type(plain.transformer)
    assert all(p.requires_grad for p in encoder.parameters())
    assert encoder.state_dict().keys() == plain.state_dict().keys()

    encoder.save(tmp_path / "saved")
    plain.save(tmp_path / "plain")
    for file in {*(tmp_path / "saved").rglob("*.json")} - {tmp_path / "saved" / "tokenizer.json"}:  # has "exploration"
        assert not any(word in file.read_text().lower() for word in ("lora", "peft", "base_layer")), file
    names = sorted(str(f.relative_to(tmp_path / "saved")) for f in (tmp_path / "saved").rglob("*") if f.is_file())
    assert names == sorted(str(f.relative_to(tmp_path / "plain")) for f in (tmp_path / "plain").rglob("*.*"))
    for file in ("config.json", "modules.json"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    keys = []
    for directory in ("saved", "plain"):
        with safe_open(tmp_path / directory / "model.safetensors", "pt") as tensors:
            keys.append(sorted(tensors.keys()))
    assert keys[0] == keys[1]
    np.testing.assert_allclose(load_encoder(str(tmp_path / "saved")).encode(TEXTS), before, atol=5e-6)
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode_document(TEXTS)
    np.testing.assert_allclose(theirs, before, atol=1e-5)


def test_merging_without_adapters_changes_nothing(tiny_encoder):
    encoder = load_encoder(str(tiny_encoder))
    before = encoder.fingerprint()
    merge_adapters(encoder)
    assert encoder.fingerprint() == before


def test_a_merge_into_bfloat16_rounds_once(tiny_encoder):
    encoder = adapted(tiny_encoder, weights="bfloat16", lora_alpha=1.0)
    fill_adapters(encoder)
    layer = encoder.transformer.get_submodule(f"base_model.model.{QUERY}")
    low = adapters(encoder)
    delta = low[f"{QUERY}.lora_B.default.weight"] @ low[f"{QUERY}.lora_A.default.weight"] / 4
    expected = (layer.base_layer.weight.float() + delta).bfloat16()
    merge_adapters(encoder)
    assert torch.equal(encoder.transformer.get_submodule(QUERY).weight, expected)


def gradients(encoder: Encoder, seed: int) -> dict[str, torch.Tensor]:
    """Of a sum of products of embeddings, with the dropout of the seed."""
    encoder.zero_grad(set_to_none=True)
    encoder.train()
    torch.manual_seed(seed)
    embeddings = encoder(TEXTS, "document")
    (embeddings @ embeddings.T)[0].sum().backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dropout_before_the_adapters(tmp_path, share):
    encoder = adapted(make_tiny_encoder(tmp_path, dropout=0.0), lora_dropout=share)
    fill_adapters(encoder)
    first, again, other = (gradients(encoder, seed) for seed in (1, 1, 2))
    assert len(first) == 24
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (share == 0), name


@pytest.mark.parametrize("options", [{"lora": 0}, {"lora_dropout": 0.2}], ids=["whole", "lora"])
def test_checkpointing_leaves_the_gradients(tiny_encoder, options):
    found, runs = [], []
    for checkpointing in (False, True):
        encoder = adapted(tiny_encoder, gradient_checkpointing=checkpointing, **options)
        fill_adapters(encoder)
        calls = []
        first = next(m for path, m in encoder.named_modules() if path.endswith(QUERY))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append((gradients(encoder, 1), gradients(encoder, 2)))
        runs.append(len(calls))
    assert runs == [2, 4]  # every layer's forward a second time in backward
    (plain, plain_2), (checkpointed, checkpointed_2) = found
    assert plain.keys() == checkpointed.keys() == checkpointed_2.keys()
    assert len(plain) == (24 if "lora_dropout" in options else 37)  # without the pooler's 2
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=0)
        torch.testing.assert_close(checkpointed_2[name], plain_2[name], atol=1e-6, rtol=0)
    assert max((plain[name] - plain_2[name]).abs().max() for name in plain) > 1e-3  # dropout is on


def test_a_model_that_can_not_compute_activations_again(tiny_encoder):
    config = MPNetConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    encoder = Encoder(MPNetModel(config), AutoTokenizer.from_pretrained(tiny_encoder), LONG)
    with pytest.raises(GradretError) as error:
        adapt(encoder, FitSettings(model="tiny/mpnet", gradient_checkpointing=True))
    assert str(error.value) == (
        "tiny/mpnet: MPNetModel cannot compute its activations again; "
        "train without --gradient-checkpointing, with a smaller --chunk"
    )


def run_settings(model: Path, **changes) -> FitSettings:
    options = {"data": ("sample?queries=odd",), "model": str(model), "batch_lists": 4, "learning_rate": 1e-2}
    options |= {"lora": 4, "precision": "float32", "checkpoint_every": 2, "max_steps": 5}
    return FitSettings(**options | changes)


def test_a_run_trains_every_adapter_and_no_weight(tiny_encoder, tmp_path, monkeypatch):
    kept = {}

    def merge(encoder):
        kept.update({name: parameter.detach().clone() for name, parameter in encoder.named_parameters()})
        merge_adapters(encoder)

    monkeypatch.setattr(trainer, "merge_adapters", merge)
    settings = run_settings(tiny_encoder, max_steps=3)
    fit(settings, tmp_path / "out")
    began = dict(adapted(tiny_encoder).named_parameters())
    assert kept.keys() == began.keys()
    for name, tensor in began.items():
        assert torch.equal(kept[name], tensor) == (".lora_" not in name), name
    before, after = (load_file(path / "model.safetensors") for path in (tiny_encoder, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in adapted_layers(adapted(tiny_encoder))}
    for name in changed:
        values = torch.linalg.svdvals(after[name].double() - before[name].double())
        assert values[4] < 1e-6 < 1e-3 < values[3]  # of rank 4, but for rounding


def test_the_best_adapters_on_dev_are_merged(tiny_encoder, tmp_path, monkeypatch):
    values, seen = iter([0.3, 0.5, 0.2]), []

    def measure(encoder, collection, *, measures, **_):
        seen.append(encoder.encode(TEXTS))
        return Evaluation({measures[0]: next(values)}, {}, {})

    monkeypatch.setattr(trainer, "evaluate", measure)
    fit(run_settings(tiny_encoder, dev="sample?queries=even", dev_every=2, max_steps=4), tmp_path / "out")
    assert len(seen) == 3
    assert np.abs(seen[2] - seen[1]).max() > 0.001
    np.testing.assert_allclose(load_encoder(str(tmp_path / "out")).encode(TEXTS), seen[1], atol=1e-6)


class Killed(Exception):
    pass


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, monkeypatch):
    model = make_tiny_encoder(tmp_path / "model")
    settings = run_settings(
        model, lora_dropout=0.1, gradient_checkpointing=True, dev="sample?queries=even", dev_every=4, chunk=8
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    fit(settings, whole)

    draw = trainer.draw_batches

    def die(lists, kept, step, **options):
        if step == 3:
            raise Killed
        return draw(lists, kept, step, **options)

    monkeypatch.setattr(trainer, "draw_batches", die)
    with pytest.raises(Killed):
        fit(settings, out)
    monkeypatch.undo()
    (last,) = (out / "checkpoints").iterdir()
    assert last.name == "step-000000002"
    for file in ("model.safetensors", "best.safetensors"):
        saved = load_file(last / file)
        assert saved.keys() == {name for name, _ in adapted(model).named_parameters() if ".lora_" in name}
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        assert (last / file).stat().st_size < (model / "model.safetensors").stat().st_size / 10
    assert len(load_file(last / "optimizer.safetensors")) == 3 * len(saved)

    assert fit(settings, out, resume=True).steps == 5
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (out / "dev.jsonl").read_text() == (whole / "dev.jsonl").read_text()
    losses = [[json.loads(x)["loss"] for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (out, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5
