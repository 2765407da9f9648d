import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from gradret.encoder.load import load_encoder
from gradret.settings import FitSettings
from gradret.train.card import write_card

VERSIONS = {"gradret": "0.1", "commit": None, "torch": "2.13.0", "threads": 2}
STRANGE = 'In: "x" | `y`\nQ: #1 \u2028é ``` - {a: b} '


def write(directory, encoder, settings=None, **changes) -> str:
    options = {
        "data": "416 lists, 1664 passages, grades 0 to 3",
        "steps": 26,
        "dev": [],
        "best_step": None,
        "share": 0.25,
        "held_out_means": {},
        "where": "cpu, 1 process",
        "seconds": 61.2,
        "versions": VERSIONS,
    }
    directory.mkdir(exist_ok=True)
    write_card(directory, settings=settings or FitSettings(), encoder=encoder, **options | changes)
    return (directory / "README.md").read_text(encoding="utf-8")


def front_matter(text: str) -> dict:
    _, block, _ = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(block)


def table(text: str, heading: str) -> dict[str, str]:
    """The two columns under a heading, without the header."""
    section = text.split(f"{heading}\n")[1].split("\n#")[0]
    rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in section.splitlines() if line.startswith("|")]
    assert all(len(row) == 2 for row in rows)
    return dict(rows[2:])


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    return load_encoder(str(tiny_encoder))


def test_the_card_of_a_run_with_everything_at_its_default(encoder, tmp_path):
    text = write(tmp_path / "model", encoder)
    assert front_matter(text) == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "gradret"],
    }
    assert "\n# model\n" in text
    assert table(text, "# model") == {
        "dimension": "32",
        "pooling": "mean of the tokens",
        "normalized to length 1": "yes",
        "similarity": "cosine",
        "query, maximum length": "64 tokens",
        "document, maximum length": "64 tokens",
    }
    assert table(text, "## Training") == {
        "steps": "26",
        "share of the way saved": "0.25",
        "trained on": "cpu, 1 process",
        "time": "0:01:02",
        "`--loss`": "`wasserstein:.15+contrast:.85`",
        "`--order`": "2",
        "`--temperature`": "0.01",
        "`--targets`": "`sqrt`",
        "`--set ground`": "`sqrt`",
        "`--batch-lists`": "16",
        "`--learning-rate`": "0.0002",
        "`--epochs`": "`auto`",
        "`--set interpolate`": "`auto`",
        "`--seed`": "0",
        "`--precision`": "`auto`",
        "`--lora`": "0",
    }
    assert table(text, "## Versions") == {"gradret": "`0.1`", "torch": "`2.13.0`", "threads": "`2`"}
    assert "416 lists, 1664 passages, grades 0 to 3, from:\n\n- `sample`\n" in text
    assert "gradret bench eval --model model --dataset" in text
    assert 'SentenceTransformer("model")' in text
    assert "Nothing was measured while training" in text
    assert "prompt" not in text and "left out" not in text and "6.2" not in text
    assert "2503.23239" in text


def test_what_differs_from_the_defaults_is_told(tiny_encoder, tmp_path):
    settings = FitSettings(
        loss="infonce",
        lora=8,
        lora_targets=("query", "value"),
        weights="bfloat16",
        in_batch=False,
        max_steps=40,
        gradient_checkpointing=True,
        pooling="last",
    )
    encoder = load_encoder(str(tiny_encoder), pooling="last", query_prefix="query: ", query_max_length=16)
    text = write(tmp_path, encoder, settings)
    shown = table(text, "## Training")
    assert shown["`--lora`"] == "8"
    assert shown["`--set lora_targets`"] == "`query`, `value`"
    assert shown["`--set weights`"] == "`bfloat16`"
    assert shown["`--in-batch`"] == "no"
    assert shown["`--gradient-checkpointing`"] == "yes"
    assert shown["`--max-steps`"] == "40"
    unused = ("order", "ground", "targets")  # infonce has no use for these
    assert not {f"`--{name}`" for name in (*unused, "pooling")} & set(shown)
    assert "last token" in text and '`"query: "`' in text and "put the prompts above" in text and "6.2" in text
    shown = table(write(tmp_path, encoder, replace(settings, loss="kl")), "## Training")
    assert "`--targets`" in shown and "`--order`" not in shown


def test_dev_measures(encoder, tmp_path):
    dev = [{"step": 0, "nDCG@10": 0.5}, {"step": 100, "nDCG@10": 0.61239}, {"step": 200, "nDCG@10": 0.6}]
    settings = FitSettings(dev="beir/scifact/test", exclude=("nfcorpus/test",))
    text = write(tmp_path, encoder, settings, dev=dev, best_step=100)
    assert "While training on `beir/scifact/test`:" in text
    assert (
        "| step | nDCG@10 |\n| --- | --- |\n| 0 | 0.5000 |\n| **100 (best, saved)** | **0.6124** |\n| 200 | 0.6" in text
    )
    assert "left out:\n\n- `nfcorpus/test`\n- `beir/scifact/test`\n" in text
    assert table(text, "## Training")["step saved, the best on dev"] == "100"


def test_local_paths_are_shown_by_their_last_part(encoder, tmp_path):
    secret = tmp_path / "secret"
    (secret / "beir").mkdir(parents=True)
    (secret / "lists.jsonl").touch()
    settings = FitSettings(
        model=str(secret / "beir"),
        data=(
            f"{secret}/lists.jsonl?grades=1:3,0&queries={secret}/ids",
            f"{secret}/beir:train",
            f"{secret}/gone.jsonl",
            "../secret/gone.jsonl",
            r"C:\secret\gone",
            "beir/scifact/train?queries=even",
        ),
        exclude=(f"{secret}/beir/",),
        dev=f"{secret}/beir:dev",
        mine=f"k=2,grade=1,from={secret}/lists.jsonl?grades=1,0,skip=5",
    )
    text = write(tmp_path / "out", encoder, settings)
    assert "secret" not in text and str(tmp_path) not in text
    sources = text.split("from:\n\n")[1].split("\n\n")[0].splitlines()
    assert sources == [
        "- `lists.jsonl?grades=1:3,0&queries=ids`",
        "- `beir:train`",
        "- `gone.jsonl`",
        "- `gone.jsonl`",
        "- `gone`",
        "- `beir/scifact/train?queries=even`",
    ]
    assert "left out:\n\n- `beir`\n- `beir:dev`\n" in text
    assert table(text, "## Training")["`--mine`"] == "`k=2,grade=1,from=lists.jsonl?grades=1,0,skip=5`"
    assert "from `beir` on graded" in text
    assert "base_model" not in front_matter(text)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("Qwen/Qwen3-Embedding-0.6B", "Qwen/Qwen3-Embedding-0.6B"),
        ("1e5/2", "1e5/2"),  # a number to a careless YAML writer
        ("bert-base-uncased", None),
        ("./owner/name", None),
        ("a/b/c", None),
        ("a: b/c\n- d", None),
    ],
)
def test_the_base_model_is_named_only_where_it_is_a_hub_repository(encoder, tmp_path, model, base):
    assert front_matter(write(tmp_path, encoder, FitSettings(model=model))).get("base_model") == base


def test_a_local_directory_that_looks_like_a_hub_repository(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    text = write(tmp_path / "out", encoder, FitSettings(model="owner/name"))
    assert "base_model" not in front_matter(text)
    assert "from `name` on" in text


def test_any_string_leaves_the_card_whole(tiny_encoder, tmp_path):
    encoder = load_encoder(str(tiny_encoder), query_prefix=STRANGE, document_prefix="--- | ---")
    settings = FitSettings(model=STRANGE, data=(STRANGE,), dev=STRANGE, mine=STRANGE, lora=2, lora_targets=(STRANGE,))
    directory = tmp_path / 'a "b" | c: `d` #e $f'
    text = write(directory, encoder, settings, dev=[{"step": 1, "nDCG@10": 1}], where="a | b\n# c", data="*x*\n## y")
    card = ModelCard.load(directory / "README.md")
    assert card.data.to_dict()["tags"][0] == "sentence-transformers"
    table(text, "## Training"), table(text, "## Versions")  # every row has its two cells
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [h.split(" ")[0] for h in headings] == ["#"] + ["##"] * 7
    code = text.split("```python\n")[1].split("```\n")[0]
    compile(code, "README.md", "exec")
    assert repr(directory.name)[1:-1] in code.replace('\\"', '"')
    for line in text.splitlines():
        if not line.startswith("```"):  # every backtick belongs to inline code, which ends as it begins, or is escaped
            assert "`" not in re.sub(r"\\`|(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", line)
    assert "\u2028" not in text


def test_the_card_is_one_to_the_hub_and_the_directory_one_to_sentence_transformers(encoder, tmp_path):
    encoder.save(tmp_path)
    write(tmp_path, encoder)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.license is None
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(theirs.encode_document(["tea"]), encoder.encode(["tea"]), atol=1e-5)
    assert load_encoder(str(tmp_path)).fingerprint() == encoder.fingerprint()


def test_the_example_in_the_card_runs(encoder, tmp_path, monkeypatch):
    encoder.save(tmp_path / "model")
    text = write(tmp_path / "model", encoder)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec"), names)
    assert tuple(names["scores"].shape) == (1, 2)
