"""Directories as users have them: read as sentence-transformers reads them, or refused by the name of what is odd."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from gradret.cli import main
from gradret.console import GradretError
from gradret.encoder.directory import EncoderConfig, read_description, write_description
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder

TEXTS = ["WHY does bread need Yeast", "  the   moon \n", "", "the moon pulls the sea " * 30]
SETTINGS, TOKENIZER, WHOLE = "sentence_bert_config.json", "tokenizer_config.json", "config_sentence_transformers.json"
POOLING = "1_Pooling/config.json"


@pytest.fixture
def directory(tiny_encoder, tmp_path):
    """A directory as sentence-transformers saves it, for 64 positions; its tokenizer lowers letters."""
    load_encoder(str(tiny_encoder)).save(tmp_path / "ours")
    SentenceTransformer(str(tmp_path / "ours"), device="cpu").save(str(tmp_path / "model"))
    shutil.rmtree(tmp_path / "ours")
    return tmp_path / "model"


def edit(file, **changes):
    there = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(there | changes))


def say(file, **content):
    file.write_text(json.dumps(content))


def edit_modules(directory, change):
    modules = json.loads((directory / "modules.json").read_text())
    change(modules)
    (directory / "modules.json").write_text(json.dumps(modules))


def move_transformer(directory, name):
    (directory / name).mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", TOKENIZER, SETTINGS):
        (directory / file).rename(directory / name / file)
    edit_modules(directory, lambda modules: modules[0].update(path=name))


def keep_capitals(directory):
    edit(directory / "tokenizer.json", normalizer=None)


# Name -> what is changed, and how many tokens of a query and of a document are then read.
SAME = {
    "as it is": (lambda d: None, 64),
    "capitals are lost before the tokenizer": (
        lambda d: (keep_capitals(d), say(d / SETTINGS, max_seq_length=64, do_lower_case=True)),
        64,
    ),
    "a cased tokenizer": (keep_capitals, 64),
    "settings beat the tokenizer": (
        lambda d: (edit(d / TOKENIZER, model_max_length=16), say(d / SETTINGS, max_seq_length=64)),
        64,
    ),
    "the tokenizer where settings say null": (
        lambda d: (edit(d / TOKENIZER, model_max_length=16), say(d / SETTINGS, max_seq_length=None)),
        16,
    ),
    "the model where the tokenizer says more": (
        lambda d: (edit(d / TOKENIZER, model_max_length=1000), say(d / SETTINGS)),
        64,
    ),
    "the model where nothing else says": (
        lambda d: (edit(d / TOKENIZER, model_max_length=10**30), say(d / SETTINGS)),
        64,
    ),
    "lengths of both kinds": (
        lambda d: say(d / SETTINGS, max_seq_length=16, query_length=32, document_length=8),
        (32, 8),
    ),
    "the tokenizer's options, older": (
        lambda d: say(d / SETTINGS, max_seq_length=64, tokenizer_args={"model_max_length": 16}),
        16,
    ),
    "the tokenizer's options": (lambda d: say(d / SETTINGS, processor_kwargs={"model_max_length": 16}), 16),
    "the start is cut off": (
        lambda d: say(d / SETTINGS, max_seq_length=9, processor_kwargs={"truncation_side": "left"}),
        9,
    ),
    "the start is cut off, says the tokenizer": (
        lambda d: (say(d / SETTINGS, max_seq_length=9), edit(d / TOKENIZER, truncation_side="left")),
        9,
    ),
    "a model of one layer": (lambda d: say(d / SETTINGS, config_args={"num_hidden_layers": 1}), 64),
    "a model with another function": (lambda d: say(d / SETTINGS, config_kwargs={"hidden_act": "relu"}), 64),
    "options without effect": (
        lambda d: say(
            d / SETTINGS,
            model_args={"add_pooling_layer": False, "trust_remote_code": True},
            tokenizer_args={"subfolder": "x"},
        ),
        64,
    ),
    "settings under an older name": (
        lambda d: (say(d / SETTINGS), say(d / "sentence_roberta_config.json", max_seq_length=5)),
        5,
    ),
    "of two settings the one of today": (
        lambda d: (say(d / SETTINGS, max_seq_length=9), say(d / "sentence_albert_config.json", max_seq_length=5)),
        9,
    ),
    "prompts of null": (lambda d: edit(d / WHOLE, prompts={"query": None, "document": None}), 64),
    "one prompt, another name's": (lambda d: edit(d / WHOLE, prompts={"passage": "bread "}), 64),
    "a default prompt among others": (
        lambda d: edit(d / WHOLE, prompts={"query": "bread ", "passage": "tea "}, default_prompt_name="query"),
        64,
    ),
    "a default prompt": (lambda d: edit(d / WHOLE, prompts={"x": "bread "}, default_prompt_name="x"), 64),
    "no file about the whole": (lambda d: (d / WHOLE).unlink(), 64),
    "no similarity": (lambda d: edit(d / WHOLE, similarity_fn_name=None), 64),
    "no pooling named": (lambda d: say(d / POOLING, word_embedding_dimension=32, pooling_mode_cls_token=False), 64),
    "pooling by both names": (
        lambda d: say(d / POOLING, embedding_dimension=32, pooling_mode="cls", pooling_mode_mean_tokens=True),
        64,
    ),
    "pooling as a list": (lambda d: say(d / POOLING, embedding_dimension=32, pooling_mode=["lasttoken"]), 64),
    "normalised twice": (lambda d: edit_modules(d, lambda modules: modules.append(modules[2])), 64),
    "not normalised": (lambda d: edit_modules(d, lambda modules: modules.pop()), 64),
    "a transformer in a folder": (lambda d: move_transformer(d, "0_BERT"), 64),
    "code of its own for a known type": (lambda d: edit(d / "config.json", auto_map={"AutoModel": "own.Model"}), 64),
}


@pytest.mark.parametrize("name", SAME)
def test_embeddings_are_those_of_sentence_transformers(directory, name):
    change, lengths = SAME[name]
    change(directory)
    theirs, ours = SentenceTransformer(str(directory), device="cpu"), load_encoder(str(directory), device="cpu")
    found = ours.config.query_max_length, ours.config.document_max_length
    assert found == (lengths if isinstance(lengths, tuple) else (lengths, lengths))
    np.testing.assert_allclose(ours.encode(TEXTS, "query"), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode_document(TEXTS), atol=1e-5)

    ours.save(directory.parent / "again")
    again = SentenceTransformer(str(directory.parent / "again"), device="cpu")
    np.testing.assert_allclose(again.encode_query(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_array_equal(load_encoder(str(directory.parent / "again")).encode(TEXTS), ours.encode(TEXTS))
    assert (again.prompts, again.default_prompt_name) == (theirs.prompts, theirs.default_prompt_name)


# What is changed -> what the one line says.
REFUSED = {
    "a module of the repository": (
        lambda d: edit_modules(d, lambda modules: modules[0].update(type="custom_st.Transformer")),
        r"modules\.json: module 'custom_st\.Transformer' is not supported; expected sentence-transformers' Trans",
    ),
    "a pooling of the repository": (
        lambda d: edit_modules(d, lambda modules: modules[1].update(type="own_pooling.Pooling")),
        r"modules\.json: module 'own_pooling\.Pooling' is not supported",
    ),
    "a package named like the library": (
        lambda d: edit_modules(d, lambda modules: modules[2].update(type="sentence_transformers_own.Normalize")),
        "module 'sentence_transformers_own.Normalize' is not supported",
    ),
    "another module of the library": (
        lambda d: edit_modules(d, lambda modules: modules.append(modules[2] | {"type": "sentence_transformers.Dense"})),
        "module 'sentence_transformers.Dense' is not supported",
    ),
    "modules in another order": (
        lambda d: edit_modules(d, lambda modules: modules.insert(1, modules.pop())),
        "modules Transformer, Normalize, Pooling are not supported so; expected Transformer, Pooling, Normalize",
    ),
    "arguments of a module": (
        lambda d: edit_modules(d, lambda modules: modules[0].update(kwargs=["task"])),
        r"kwargs \[\"task\"\] is not supported; expected no such key",
    ),
    "a module elsewhere": (
        lambda d: edit_modules(d, lambda modules: modules[1].update(path="../model/1_Pooling")),
        "path \"../model/1_Pooling\" of module '.*Pooling' is not one inside the directory",
    ),
    "no list of modules": (
        lambda d: (d / "modules.json").write_text("{}"),
        r"modules\.json: expected a list of modules; put it back from a copy",
    ),
    "torn JSON": (lambda d: (d / WHOLE).write_text("{"), r"config_sentence_transformers\.json: not valid JSON"),
    "an unknown setting": (
        lambda d: edit(d / SETTINGS, strange=3),
        r"sentence_bert_config\.json: strange 3 is not supported; expected no such key",
    ),
    "another task": (
        lambda d: edit(d / SETTINGS, transformer_task="fill-mask"),
        'transformer_task "fill-mask" is not supported; expected "feature-extraction"',
    ),
    "another output of the model": (
        lambda d: edit(d / SETTINGS, modality_config={"message": {"method": "forward"}}),
        'modality_config {"message": .* is not supported; expected {"text":',
    ),
    "options of each call": (
        lambda d: edit(d / SETTINGS, processing_kwargs={"text": {"max_length": 8}}),
        "processing_kwargs .* is not supported",
    ),
    "longer queries": (
        lambda d: edit(d / SETTINGS, query_expansion={"strategy": "fixed", "length": 12}),
        "query_expansion .* is not supported",
    ),
    "an unknown option of the model": (
        lambda d: edit(d / SETTINGS, model_args={"quantization_config": {"bits": 4}}),
        'model_kwargs: quantization_config {"bits": 4} is not supported',
    ),
    "options that are none": (
        lambda d: edit(d / SETTINGS, tokenizer_args=None),
        "processor_kwargs null is not a JSON object",
    ),
    "a negative length": (
        lambda d: say(d / SETTINGS, max_seq_length=-1),
        "max_seq_length -1 is not a number of tokens; expected 1 or more, or null",
    ),
    "a length in words": (
        lambda d: say(d / SETTINGS, max_seq_length="64"),
        'max_seq_length "64" is not a number of tokens',
    ),
    "a tokenizer's negative length": (
        lambda d: (say(d / SETTINGS), edit(d / TOKENIZER, model_max_length=-1)),
        "maximum length -1 is not between 3 and 64 tokens",
    ),
    "another kind of model": (
        lambda d: edit(d / WHOLE, model_type="SparseEncoder"),
        'model_type "SparseEncoder" is not supported; expected "SentenceTransformer"',
    ),
    "shorter embeddings": (lambda d: edit(d / WHOLE, truncate_dim=8), "truncate_dim 8 is not supported"),
    "another similarity": (
        lambda d: edit(d / WHOLE, similarity_fn_name="euclidean"),
        "similarity 'euclidean' is not one of cosine, dot",
    ),
    "an unknown key about the whole": (
        lambda d: edit(d / WHOLE, skiplist=["a"]),
        r"skiplist \[\"a\"\] is not supported",
    ),
    "prompts that are none": (
        lambda d: edit(d / WHOLE, prompts=["query: "]),
        r"prompts \[\"query: \"\] is not a JSON object of texts",
    ),
    "a prompt that is none": (lambda d: edit(d / WHOLE, prompts={"query": 3}), 'prompts {"query": 3} is not a JSON'),
    "a default that is no prompt": (
        lambda d: edit(d / WHOLE, default_prompt_name="strange"),
        'default_prompt_name "strange" is not among the prompts',
    ),
    "pooling without the prompt": (
        lambda d: edit(d / POOLING, include_prompt=False),
        r"config\.json: include_prompt false is not supported; expected true",
    ),
    "an unknown key of the pooling": (lambda d: edit(d / POOLING, strange=1), "strange 1 is not supported"),
    "another pooling": (
        lambda d: edit(d / POOLING, pooling_mode="max"),
        "pooling max is not supported; expected one of",
    ),
    "two poolings": (lambda d: edit(d / POOLING, pooling_mode=["cls", "mean"]), r"pooling cls\+mean is not supported"),
    "no pooling": (lambda d: (d / POOLING).unlink(), "1_Pooling.config.json: is not there, or says nothing"),
    "other vectors normalised": (
        lambda d: say(d / "2_Normalize/config.json", module_input_name="token_embeddings"),
        'module_input_name "token_embeddings" is not supported; expected sentence_embedding',
    ),
    "an adapter beside": (
        lambda d: say(d / "adapter_config.json", base_model_name_or_path="some/base"),
        "an adapter of some/base, not a whole encoder; merge the two",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(directory, name):
    change, message = REFUSED[name]
    change(directory)
    with pytest.raises(GradretError, match=message) as error:
        load_encoder(str(directory))
    assert str(error.value).startswith(str(directory))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=3) | st.sampled_from(["query", "cls", "cosine"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
KEYS = st.sampled_from(
    "prompts default_prompt_name similarity_fn_name max_seq_length processor_kwargs tokenizer_args pooling_mode "
    "pooling_mode_cls_token include_prompt type path module_input_name x".split()
)
FILES = (WHOLE, SETTINGS, POOLING, "2_Normalize/config.json", "modules.json")


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | (st.dictionaries(KEYS, JSON) | st.lists(JSON)).map(lambda said: json.dumps(said).encode()))
def test_any_bytes_are_settings_or_one_line(tmp_path, name, content):
    write_description(tmp_path, EncoderConfig(), 32)
    (tmp_path / "2_Normalize").mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    try:
        config = read_description(tmp_path).config
    except GradretError as error:
        assert re.match(rf"{tmp_path}/[^\n]+$", str(error))
    else:
        said = json.loads(content)
        if name == WHOLE:
            assert (config.query_prefix or None) == ((said.get("prompts") or {}).get("query") or None)
            assert config.default_prompt_name == said.get("default_prompt_name")


@pytest.mark.parametrize("content", [b"[" * 99_999, b"\xef\xbb\xbf{}", '{"a": "é"}'.encode("latin-1"), b'{"a": 1}\0'])
def test_bytes_that_are_no_settings_are_one_line(directory, content):
    (directory / WHOLE).write_bytes(content)
    with pytest.raises(GradretError, match=rf"^{directory / WHOLE}: not valid JSON \([^\n]+\)$"):
        read_description(directory)


def test_a_length_above_the_positions_reads_as_many_as_there_are(directory):
    say(directory / SETTINGS, max_seq_length=128)
    ours, theirs = load_encoder(str(directory)), SentenceTransformer(str(directory), device="cpu")
    assert ours.config.document_max_length == 64
    np.testing.assert_allclose(ours.encode(TEXTS[:3]), theirs.encode(TEXTS[:3]), atol=1e-5)
    with pytest.raises(RuntimeError):
        theirs.encode(TEXTS)


@pytest.mark.parametrize(("said", "read"), [(128, 128), (None, 64)])
def test_where_positions_are_computed_the_directory_may_say_more_than_the_model(tiny_encoder, tmp_path, said, read):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = Qwen2Model(Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, **small))
    Encoder(model, tokenizer, EncoderConfig()).save(tmp_path)
    edit(tmp_path / TOKENIZER, model_max_length=10**30)
    say(tmp_path / SETTINGS, max_seq_length=said)
    ours, theirs = load_encoder(str(tmp_path)), SentenceTransformer(str(tmp_path), device="cpu")
    assert ours.config.document_max_length == read
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=1e-5)


def test_own_code_for_a_known_type_is_told_of(directory, capsys):
    edit(directory / "config.json", auto_map={"AutoModel": "own.Model"})
    (directory / "own.py").write_text("raise SystemExit")
    load_encoder(str(directory))
    line = "model: its own model code is not run, transformers' BertModel is; for the former, --trust-remote-code\n"
    assert capsys.readouterr().err.endswith(line)


def test_an_adapter_alone(directory, tmp_path):
    peft = pytest.importorskip("peft")
    model = SentenceTransformer(str(directory), device="cpu")
    model.add_adapter(peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["query"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    result = CliRunner().invoke(main, ["bench", "eval", "--model", str(tmp_path / "adapter"), "--dataset", "sample"])
    assert result.exit_code == 1
    assert re.search("Error: .*an adapter of .*merge_and_unload", result.stderr)
