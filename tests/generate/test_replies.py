import ctypes
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradret.generate.replies import Unusable, clean_text, drop_thoughts, make_form, make_text_form, parse_object

KEYS = ("grade_3", "grade_0")
FORM = make_form(dict.fromkeys(KEYS, (1, 20)))
GOOD = '{"grade_3": "a b", "grade_0": "c"}'


@pytest.mark.parametrize(
    "reply",
    [
        GOOD,
        f"<think>\n{{}} perhaps {GOOD}</think>\n\n{GOOD}",
        f"```json\n{GOOD}\n```",
        f"Here you are: {GOOD} Is that {{fine}}?",
        '{"grade_0": "c", "grade_3": "a b"}',
        '{"grade_3": "a b", "grade_0": "c", "grade_1": 7, "note": {"grade_3": "x"}}',
        '{"grade_3": " a\\n\\tb ", "grade_0": "\\u0000c\\ud83d\\ufffd"}',
        f'{{"thoughts": "none"}} {GOOD}',
        f'{GOOD} {{"grade_3": "and a seco',
    ],
)
def test_the_strings_are_found_cleaned_and_ordered(reply):
    assert list(parse_object(reply, KEYS).items()) == [("grade_3", "a b"), ("grade_0", "c")]


@pytest.mark.parametrize(
    ("reply", "reason", "detail"),
    [
        ("", "empty reply", "nothing was written"),
        ("<think> well, then", "empty reply", "nothing was written"),
        ("I would rather not.", "not JSON", "no JSON object in 'I would rather not.'"),
        ('["grade_3", "grade_0"]', "not JSON", """no JSON object in '["grade_3", "grade_0"]'"""),
        (f"{GOOD} or {GOOD}", "not JSON", "2 objects with the keys asked for, expected 1"),
        ('{"grade_3": "a b", "grade_0": "c', "cut off", "the JSON object does not end"),
        ('{"grade_3": "a b",', "cut off", "the JSON object does not end"),
        ('{"grade_3": {"text": "x"}, "gra', "cut off", "the JSON object does not end"),
        ('{"grade_3": "a b"}', "wrong keys", "grade_0 is there 0 times, expected once"),
        ('{"answer": "a b"}', "wrong keys", "grade_3 is there 0 times, expected once"),
        ("{}", "wrong keys", "grade_3 is there 0 times, expected once"),
        ('{"grade_3": "a", "grade_3": "b", "grade_0": "c"}', "wrong keys", "grade_3 is there 2 times, expected once"),
        ('{"grade_3": ["a"], "grade_0": "c"}', "no text", "grade_3 is not a string"),
        ('{"grade_3": {"text": "a"}, "grade_0": "c"}', "no text", "grade_3 is not a string"),
        ('{"grade_3": "a", "grade_0": null}', "no text", "grade_0 is not a string"),
        ('{"grade_3": "a", "grade_0": " \\n"}', "no text", "grade_0 is empty"),
    ],
)
def test_what_is_wrong_has_a_reason(reply, reason, detail):
    with pytest.raises(Unusable) as problem:
        parse_object(reply, KEYS)
    assert (problem.value.reason, problem.value.detail[: len(detail)]) == (reason, detail)


@pytest.mark.parametrize(
    "reply", ['{"a":' * 20_000, "{" * 50_000, '{"' * 20_000, '{"a": ' + "9" * 5000, "<think>" * 9000]
)
def test_much_of_nothing_is_refused_soon(reply):
    with pytest.raises(Unusable):
        parse_object(reply, KEYS)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner),
    max_leaves=6,
)


@given(st.text() | json_values.map(json.dumps), st.integers(0, 200))
def test_whatever_comes_gives_clean_strings_or_a_reason(reply, end):
    for text in (reply, reply[:end], GOOD[: end % len(GOOD)] + reply):
        try:
            passages = parse_object(text, KEYS)
        except Unusable as problem:
            problem.detail.encode()
        else:
            assert tuple(passages) == KEYS
            assert all(p and p == clean_text(p) and p.encode() for p in passages.values())


@given(st.dictionaries(st.sampled_from(KEYS), st.text(), min_size=2))
def test_what_json_dumps_writes_comes_back_cleaned(strings):
    wanted = {key: clean_text(strings[key]) for key in KEYS}
    if all(wanted.values()):
        assert parse_object(json.dumps(strings), KEYS) == wanted


def test_thoughts_are_dropped():
    assert drop_thoughts("<think>\nWell. </think>\nRust is an oxide.") == "\nRust is an oxide."
    with pytest.raises(Unusable, match="nothing was written"):
        drop_thoughts("<think>\nWell")


def test_the_schema_is_what_strict_servers_take():
    assert make_form({"grade_2.5": (1, 9), "grade_-1": (1, 9)}).schema == {
        "type": "object",
        "properties": {"grade_2.5": {"type": "string"}, "grade_-1": {"type": "string"}},
        "required": ["grade_2.5", "grade_-1"],
        "additionalProperties": False,
    }


@pytest.fixture(scope="module")
def vocabulary(tiny_gguf):
    """The tiny model's vocabulary, which has every byte as a token."""
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(tiny_gguf).encode(), parameters)
    yield llama_cpp.llama_model_get_vocab(model)
    llama_cpp.llama_model_free(model)


def takes(vocabulary, grammar: str, text: str, end: bool = True) -> bool:
    """Whether llama.cpp's grammar takes the text, token by token, and then, with `end`, the end of the reply."""
    import llama_cpp as api

    sampler = api.llama_sampler_init_grammar(vocabulary, grammar.encode(), b"root")
    assert sampler, "llama.cpp cannot read the grammar"
    content = text.encode("utf-8", "surrogatepass")
    tokens = (api.llama_token * (len(content) + 8))()
    count = api.llama_tokenize(vocabulary, content, len(content), tokens, len(tokens), False, False)
    row = (api.llama_token_data * 1)()
    try:
        for token in [*tokens[:count], *([api.llama_vocab_eos(vocabulary)] if end else [])]:
            row[0].id, row[0].logit = token, 0.0
            api.llama_sampler_apply(sampler, ctypes.byref(api.llama_token_data_array(row, 1, -1, False)))
            if row[0].logit == float("-inf"):
                return False
            api.llama_sampler_accept(sampler, token)
        return True
    finally:
        api.llama_sampler_free(sampler)


def test_the_grammar_takes_the_form_and_nothing_else(vocabulary):
    grammar = FORM.grammar
    for text in (
        GOOD,
        json.dumps({"grade_3": 'say "no" \\ ü', "grade_0": "猫は 🐈 <|im_end|>{}[]"}, ensure_ascii=False),
    ):
        assert takes(vocabulary, grammar, text)
        assert not takes(vocabulary, grammar, text[:-1])
        assert not takes(vocabulary, grammar, text + " ", end=False)
    for text in (
        " {",
        "{ ",
        '{"grade_0',
        '{"grade_3":"',
        '{"grade_3": ""',
        '{"grade_3": " ',
        '{"grade_3": "a\n',
        '{"grade_3": "a\\n',
        '{"grade_3": "a\\u',
        '{"grade_3": "a\x7f',
        '{"grade_3": "a",\n',
        '{"grade_3": "a"}',
        '{"grade_3": "a", "grade_3',
        GOOD[:-1] + ",",
    ):
        assert not takes(vocabulary, grammar, text, end=False), text


@pytest.mark.parametrize(
    ("low", "high"),
    [(1, 1), (1, 2), (5, 5), (100, 1000), (1999, 2000)],
)
def test_the_grammar_bounds_the_characters(vocabulary, low, high):
    grammar = make_form(dict.fromkeys(KEYS, (low, high))).grammar
    for count in {low - 1, low, (low + high) // 2, high, high + 1, high + 2000}:
        text = json.dumps(dict.fromkeys(KEYS, ('x"é\\ 猫' * count)[:count]), ensure_ascii=False)
        assert takes(vocabulary, grammar, text) == (low <= count <= high), count


def test_above_what_llama_cpp_can_count_the_grammar_leaves_the_length_to_the_checks(vocabulary):
    grammar = make_form(dict.fromkeys(KEYS, (2100, 6500))).grammar
    for count in (1, 6500):
        assert takes(vocabulary, grammar, json.dumps(dict.fromkeys(KEYS, "x" * count)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text().map(clean_text).filter(bool), min_size=2, max_size=2))
def test_the_grammar_takes_whatever_cleaned_text_json_dumps_writes(vocabulary, texts):
    text = json.dumps(dict(zip(KEYS, texts, strict=True)), ensure_ascii=False)
    assert takes(vocabulary, make_form(dict.fromkeys(KEYS, (1, 1000))).grammar, text)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (5, 9), (1999, 2000), (2100, 6500)])
def test_plain_prose_has_its_length_and_no_markup(vocabulary, low, high):
    form = make_text_form(low, high)
    assert form.schema is None
    for count in {low - 1, low, high, high + 1} if high <= 2000 else {1, high}:
        text = ('x"é\\ 猫{1}' * high)[:count]
        assert takes(vocabulary, form.grammar, text) == (1 <= count and (high > 2000 or low <= count <= high)), count
    for text in ("a\nb", "a*b", "`a", "# a", "{", "[a]", " a", "- a", '"a"', "a\x7f"):
        assert not takes(vocabulary, make_text_form(1, 9).grammar, text, end=False), text
