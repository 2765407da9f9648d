from gradret.data.words import make_shingles, split_words


def test_words():
    assert split_words("Cats' Purring, 2nd_go") == ["cats", "purring", "2nd", "go"]
    assert split_words("हिन्दी में, Ünïted na\u0308rrow ไท") == ["हिन्दी", "में", "ünïted", "närrow", "ไ", "ท"]


def test_shingles():
    assert make_shingles(["a", "b", "c", "d"]) == {("a", "b", "c"), ("b", "c", "d")}
    assert make_shingles(["a", "b"]) == set()
