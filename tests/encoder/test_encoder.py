import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from gradret.console import GradretError
from gradret.encoder.directory import EncoderConfig
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder, pool_tokens
from gradret.settings import DEFAULT_ENCODER

TEXTS = ["Bread needs yeast.", "", "The moon pulls the sea. " * 30, "tea"]


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0], [2], [4]], [[9], [3], [5]]])  # (2, 3, 1)
    right = torch.tensor([[1, 1, 0], [1, 1, 1]])
    left = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert pool_tokens(hidden, right, "mean").ravel().tolist() == pytest.approx([1.5, 17 / 3])
    assert pool_tokens(hidden, left, "mean").ravel().tolist() == pytest.approx([3, 17 / 3])
    assert pool_tokens(hidden, right, "cls").ravel().tolist() == [1, 9]
    assert pool_tokens(hidden, left, "cls").ravel().tolist() == [2, 9]
    assert pool_tokens(hidden, right, "last").ravel().tolist() == [2, 5]
    assert pool_tokens(hidden, left, "last").ravel().tolist() == [4, 5]


@pytest.mark.parametrize(
    ("pooling", "normalize", "similarity"),
    [("mean", True, "cosine"), ("mean", False, "dot"), ("cls", True, "dot"), ("last", False, "cosine")],
)
def test_a_saved_encoder_is_a_sentence_transformer(tiny_encoder, tmp_path, pooling, normalize, similarity):
    encoder = load_encoder(
        str(tiny_encoder),
        pooling=pooling,
        normalize=normalize,
        similarity=similarity,
        query_prefix="query : ",
        document_prefix="passage : ",
        query_max_length=24,
        document_max_length=40,
    )
    encoder.save(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    for kind, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        np.testing.assert_allclose(encoder.encode(TEXTS, kind), encode(TEXTS), atol=1e-5)
        # the prompt's name alone, without the task, where the length does not matter
        np.testing.assert_allclose(
            encoder.encode(TEXTS[:1], kind), theirs.encode(TEXTS[:1], prompt_name=kind), atol=1e-5
        )
    assert theirs.similarity_fn_name == similarity
    assert theirs.max_seq_length == 40
    queries, documents = (torch.from_numpy(encoder.encode(TEXTS, kind)) for kind in ("query", "document"))
    torch.testing.assert_close(encoder.score(queries, documents), theirs.similarity(queries, documents))

    again = load_encoder(str(tmp_path))
    assert again.config == encoder.config
    assert again.fingerprint() == encoder.fingerprint()
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_what_sentence_transformers_saves_is_read(tiny_encoder, tmp_path):
    load_encoder(str(tiny_encoder), query_prefix="q: ", query_max_length=20).save(tmp_path / "ours")
    theirs = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    theirs.save(str(tmp_path / "theirs"))
    encoder = load_encoder(str(tmp_path / "theirs"))
    assert encoder.config == load_encoder(str(tmp_path / "ours")).config
    np.testing.assert_allclose(encoder.encode(TEXTS, "query"), theirs.encode_query(TEXTS), atol=1e-5)


def test_a_plain_transformers_directory_reads_as_far_as_its_tokenizer_says(tiny_encoder):
    assert load_encoder(str(tiny_encoder)).config == EncoderConfig(query_max_length=64, document_max_length=64)


def test_the_default_encoder_is_the_demo_copy():
    encoder = load_encoder()
    assert (encoder.dimension, encoder.config.document_max_length) == (384, 256)
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(TEXTS), axis=1), 1, atol=1e-6)


def test_embeddings_do_not_depend_on_the_batch(tiny_encoder):
    encoder = load_encoder(str(tiny_encoder))
    one_by_one = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode(TEXTS, batch_size=3), one_by_one, atol=1e-6)
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "text",
    [
        "The moon pulls the sea. " * 5000,
        "tea " + " " * 30_000 + "the sea and the bread " * 100 + " " * 30_000 + " the moon",
        "月亮" * 5000,
        "0123456789abcdef" * 3000,
    ],
)
def test_a_long_text_is_cut_before_it_is_tokenized_and_nothing_changes(tiny_encoder, monkeypatch, text, side):
    """A tokenizer takes some 70 bytes for each character that it looks at."""
    for name, longest in ((str(tiny_encoder), 64), (DEFAULT_ENCODER, 256)):
        encoder = load_encoder(name, document_prefix="bread: ")
        tokenizer = encoder.tokenizer
        monkeypatch.setattr(tokenizer, "truncation_side", side)
        whole = tokenizer(["bread: " + text], truncation=True, max_length=longest)["input_ids"][0]
        seen = []

        def look(texts, seen=seen, tokenizer=tokenizer, **options):
            seen.append(sum(map(len, [texts] if isinstance(texts, str) else texts)))
            return tokenizer(texts, **options)

        look.truncation_side = side
        encoder.tokenizer = look
        np.testing.assert_array_equal(encoder.tokenize([text], "document")[0], whole)
        assert max(seen) < 2**17
        if text.startswith("The moon"):
            assert sum(seen) < 16 * longest + 5000


@pytest.mark.parametrize(
    "texts", [np.array(["tea", "rye"]), ("tea", "rye"), iter(["tea", "rye"]), {"tea": 1, "rye": 2}]
)
def test_texts_may_be_whatever_gives_strings(tiny_encoder, texts):
    encoder = load_encoder(str(tiny_encoder))
    np.testing.assert_array_equal(encoder.encode(texts), encoder.encode(["tea", "rye"]))


@pytest.mark.parametrize(
    ("texts", "kind", "error", "message"),
    [
        ("why tides", "query", TypeError, r"texts must be several strings, such as \[text\], got 'why tides'"),
        (b"why", "query", TypeError, r"texts must be several strings, such as \[text\], got b'why'"),
        (np.array("why"), "query", TypeError, "texts must be several strings, .* got array"),
        (None, "query", TypeError, "texts must be several strings, .* got None"),
        ({"tea"}, "query", TypeError, "texts must be several strings, .* got {'tea'}"),
        (["tea", 3], "query", TypeError, "texts must be strings, got 3 at position 1"),
        (["tea", None], "query", TypeError, "texts must be strings, got None at position 1"),
        ([["tea"]], "query", TypeError, r"texts must be strings, got \['tea'\] at position 0"),
        (["tea \ud800"], "query", ValueError, "text at position 0 holds half of a surrogate pair"),
        (["tea"], "passage", ValueError, "kind must be 'query' or 'document', got 'passage'"),
        ([], "passage", ValueError, "kind must be 'query' or 'document', got 'passage'"),
        (["tea"], None, ValueError, "kind must be 'query' or 'document', got None"),
        (["tea"], ["query"], ValueError, "kind must be 'query' or 'document', got "),
    ],
)
def test_texts_and_kinds_that_are_none(tiny_encoder, texts, kind, error, message):
    encoder = load_encoder(str(tiny_encoder))
    for call in (encoder.encode, encoder.tokenize, encoder):
        with pytest.raises(error, match=f"^{message}"):
            call(texts, kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number from 1 on, got 1.5"),
        ({"precision": "bf16"}, "precision must be 'float32' or 'bfloat16', got 'bf16'"),
    ],
)
def test_options_of_encoding_that_are_wrong(tiny_encoder, options, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(str(tiny_encoder)).encode(["tea"], **options)


def test_no_texts_and_numpy_numbers(tiny_encoder, tmp_path):
    encoder = load_encoder(tiny_encoder, query_max_length=np.int64(16))
    empty = encoder([], "query")
    assert (empty.shape, empty.dtype, encoder.score(empty, encoder(["tea"], "document")).shape) == (
        (0, 32),
        torch.float32,
        (0, 1),
    )
    assert encoder.encode(["tea"], batch_size=np.int32(2)).shape == (1, 32)
    queries, documents = encoder.encode(["why"], "query"), encoder.encode(["tea", "rye"])
    scores = encoder.score(queries, documents)
    torch.testing.assert_close(scores, torch.from_numpy(queries @ documents.T))
    encoder.save(tmp_path)
    assert load_encoder(tmp_path).config.query_max_length == 16


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (None, {}, TypeError, "name must be a directory or a hub repository's name, got None"),
        ("", {"max_length": 3}, TypeError, "'max_length' is no field of EncoderConfig; those are pooling, norm"),
        ("", {"weights": "int8"}, ValueError, "weights must be 'float32' or 'bfloat16', got 'int8'"),
        ("", {"layers": 0}, ValueError, "layers must be a whole number from 1 on, got 0"),
        ("", {"query_prefix": 3}, TypeError, "query_prefix must be a str, got 3"),
    ],
)
def test_arguments_of_load_encoder_that_are_wrong(tiny_encoder, name, options, error, message):
    with pytest.raises(error, match=message):
        load_encoder(tiny_encoder if name == "" else name, **options)


def test_the_fingerprint_follows_weights_and_settings(tiny_encoder):
    encoder = load_encoder(str(tiny_encoder))
    other = load_encoder(str(tiny_encoder), query_prefix="x")
    before = encoder.fingerprint()
    assert before == load_encoder(str(tiny_encoder)).fingerprint() != other.fingerprint()
    with torch.no_grad():
        next(encoder.parameters())[0, 0] += 1e-3
    assert encoder.fingerprint() != before


def test_a_tiny_decoder_with_last_token_pooling_agrees_with_sentence_transformers(tiny_encoder, tmp_path):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, padding_side="left")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    encoder = Encoder(Qwen2Model(config), tokenizer, EncoderConfig("last", query_max_length=64, document_max_length=64))
    encoder.save(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    encoder = load_encoder(str(tmp_path))  # transformers makes another tokenizer of this one for its model type
    np.testing.assert_allclose(encoder.encode(TEXTS), theirs.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS), encoder.encode(TEXTS, batch_size=1), atol=1e-6)


def test_a_directory_without_weights(tiny_encoder, tmp_path):
    shutil.copyfile(tiny_encoder / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")  # never read
    with pytest.raises(GradretError) as error:
        load_encoder(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}: no weights; expected model.safetensors beside config.json "
        "(weights in other formats are not read: convert them with save_pretrained)"
    )


def test_remote_code_needs_the_flag(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder, tmp_path / "remote")
    config = json.loads((tmp_path / "remote" / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "c.C", "AutoModel": "c.M"}}
    (tmp_path / "remote" / "config.json").write_text(json.dumps(config))
    (tmp_path / "remote" / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(
        GradretError,
        match="remote: needs model code of its own; read that code, then allow it with --trust-remote-code",
    ):
        load_encoder(str(tmp_path / "remote"))
    assert not (tmp_path / "ran").exists()


def test_names_that_lead_nowhere():
    with pytest.raises(GradretError, match=r"^\./nowhere: no such directory$"):
        load_encoder("./nowhere")
    with pytest.raises(
        GradretError,
        match="^nobody/nothing: no such directory, not whole in the local cache, and the hub cannot be reached",
    ):
        load_encoder("nobody/nothing")
    with pytest.raises(GradretError, match="^a b: no such directory, and not a hub repository's name"):
        load_encoder("a b")


def test_a_t5_encoder_is_saved_and_loaded(tiny_encoder, tmp_path):
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    settings = EncoderConfig(query_max_length=64, document_max_length=64)
    encoder = Encoder(T5EncoderModel(config), tokenizer, settings).eval()
    encoder.save(tmp_path)
    assert load_encoder(str(tmp_path)).config == settings
    np.testing.assert_allclose(
        load_encoder(str(tmp_path)).encode(TEXTS),
        SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS),
        atol=1e-5,
    )


def test_weights_or_words_that_are_not_there(tiny_encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_encoder, tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layer.1" not in k}, tmp_path / "half" / "model.safetensors")
    with pytest.raises(GradretError, match="half: 16 weights are not in its safetensors, encoder.layer.1"):
        load_encoder(str(tmp_path / "half"))
    (tmp_path / "half" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(GradretError, match="half: cannot be loaded as an encoder"):
        load_encoder(str(tmp_path / "half"))
    shutil.copytree(tiny_encoder, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(GradretError, match="mute: (its tokenizer knows no words|cannot be loaded)"):
        load_encoder(str(tmp_path / "mute"))


def test_the_fingerprint_follows_the_tokenizer_and_for_documents_not_the_query_settings(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder, tmp_path / "cased")
    rules = json.loads((tmp_path / "cased" / "tokenizer.json").read_text())
    (tmp_path / "cased" / "tokenizer.json").write_text(json.dumps(rules | {"normalizer": None}))
    plain = load_encoder(str(tiny_encoder))
    before = plain.fingerprint()
    assert load_encoder(str(tmp_path / "cased")).fingerprint() != before
    plain.encode(TEXTS)
    assert plain.fingerprint() == before
    assert load_encoder(str(tiny_encoder), query_prefix="x").fingerprint(queries=False) == plain.fingerprint(
        queries=False
    )
    assert load_encoder(str(tiny_encoder), document_prefix="x").fingerprint(queries=False) != plain.fingerprint(
        queries=False
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document_max_length": 1000}, "maximum length 1000 is not between 3 and 64 tokens"),
        ({"query_max_length": 2}, "maximum length 2 is not between 3 and 64 tokens"),
        ({"device": "nonsense"}, "device 'nonsense' is not there"),
        ({"pooling": "max"}, "pooling 'max' is not one of mean, cls, last"),
        ({"layers": 9}, "has 2 layers, of which 9 cannot be kept"),
    ],
)
def test_options_that_do_not_fit_the_encoder(tiny_encoder, options, message):
    with pytest.raises(GradretError, match=message):
        load_encoder(str(tiny_encoder), **options)


def test_the_first_layers_alone(tiny_encoder, tmp_path):
    whole, shallow = load_encoder(str(tiny_encoder)), load_encoder(str(tiny_encoder), layers=1)
    assert shallow.transformer.config.num_hidden_layers == 1
    kept = shallow.state_dict()
    assert 0 < len(kept) < len(whole.state_dict())
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in kept.items())
    assert not np.allclose(shallow.encode(TEXTS), whole.encode(TEXTS))
    shallow.save(tmp_path)
    np.testing.assert_array_equal(load_encoder(str(tmp_path)).encode(TEXTS), shallow.encode(TEXTS))
