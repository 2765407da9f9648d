"""The model card: what a saved encoder is, how to use it, how it was trained and what was measured on the way."""

import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from huggingface_hub import ModelCardData

from gradret.encoder.model import Encoder
from gradret.settings import SAMPLE, FitSettings

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]", re.ASCII)
TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "gradret"]
# In the table of settings whatever they are; others where they differ from the default.
SHOWN = (
    "loss",
    "order",
    "temperature",
    "targets",
    "ground",
    "batch_lists",
    "learning_rate",
    "epochs",
    "seed",
    "precision",
    "lora",
)
# Told elsewhere in the card, or without a say in the outcome.
UNSHOWN = ("data", "exclude", "model", "dev", "dev_measure", "pooling", "normalize", "similarity", "checkpoint_every")
UNSHOWN += ("query_prefix", "document_prefix", "query_max_length", "document_max_length")
POOLINGS = {"mean": "mean of the tokens", "cls": "first token", "last": "last token"}


def write_card(
    directory: str | Path,
    *,
    settings: FitSettings,
    data: str,
    steps: int,
    dev: Sequence[dict],
    best_step: int | None,
    encoder: Encoder,
    where: str,
    seconds: float,
    versions: dict,
) -> None:
    """Write README.md, the model card, into a saved encoder's directory. Local paths are shown without their folders.

    Args:
        directory: as written by encoder.save().
        settings: the run's.
        data: what was trained on, as "416 lists, 1664 passages, grades 0 to 3".
        steps: optimizer steps done.
        dev: a {"step": int, MEASURE: value} for each measurement; () when there was none.
        best_step: the step whose weights were saved, where dev chose; None for the last.
        encoder: the one saved.
        where: what it was trained on, as "cpu, 1 process".
        seconds: that training took.
        versions: versions.versions(), or any names and values; None is left out.
    Raises: OSError.
    """
    title = " ".join(Path(directory).resolve().name.split()) or "model"
    parts = [
        _describe(title, settings, encoder),
        _tell_use(title, encoder),
        _tell_data(settings, data),
        _tell_training(settings, steps, best_step, where, seconds),
        _tell_measures(settings, dev, best_step),
        "## Versions\n\n" + _tabulate(["", "version"], [[k, _code(v)] for k, v in versions.items() if v is not None]),
        "## Citation\n\nTraining on lists with several grades of relevance follows SyCL: Esfandiarpoor, Zerveas, "
        "Zhang, Mgonzo, Eickhoff, Bach, *Beyond Contrastive Learning: Synthetic Data Enables List-wise Training with "
        "Multiple Levels of Relevance*, [arXiv 2503.23239](https://arxiv.org/abs/2503.23239).",
        "## Licence\n\nNone is stated here: name one that the base model's and the training data's allow.",
    ]
    text = f"---\n{_front_matter(settings)}\n---\n\n" + "\n\n".join(parts) + "\n"
    (Path(directory) / "README.md").write_text(text, encoding="utf-8", newline="\n")


def _front_matter(settings: FitSettings) -> str:
    base = settings.model if HUB_NAME.fullmatch(settings.model) and not os.path.exists(settings.model) else None
    card = ModelCardData(
        base_model=base, library_name="sentence-transformers", pipeline_tag="sentence-similarity", tags=TAGS
    )
    return card.to_yaml()


def _describe(title: str, settings: FitSettings, encoder: Encoder) -> str:
    config = encoder.config
    rows = [
        ["dimension", encoder.dimension],
        ["pooling", POOLINGS[config.pooling]],
        ["normalized to length 1", "yes" if config.normalize else "no"],
        ["similarity", config.similarity],
        ["query, maximum length", f"{config.query_max_length} tokens"],
        ["document, maximum length", f"{config.document_max_length} tokens"],
    ]
    rows += [
        [f"{kind} prompt", _code(prompt)]
        for kind, prompt in (("query", config.query_prefix), ("document", config.document_prefix))
        if prompt
    ]
    return (
        f"# {_escape(title)}\n\nA dense retriever: it turns queries and documents into vectors, and the similarity of "
        "two vectors ranks documents for a query. "
        f"Trained with gradret from {_code(_hide_folder(settings.model))} on graded ranking lists.\n\n"
        + _tabulate(["", ""], rows)
    )


def _tell_use(title: str, encoder: Encoder) -> str:
    config, name = encoder.config, _quote(title)
    text = f"""## Use

With [sentence-transformers](https://sbert.net); the name is that of this directory, put its path or its name on a hub:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name})
queries = model.encode_query(["a query"])
documents = model.encode_document(["a document", "another document"])
scores = model.similarity(queries, documents)
```"""
    if config.query_prefix or config.document_prefix:
        text += "\n\n`encode_query` and `encode_document` put the prompts above before each text; `encode` does not."
    if config.query_max_length != config.document_max_length:
        text += "\n\nQueries and documents differ in maximum length: that needs sentence-transformers 6.2 or later."
    command = f"gradret bench eval --model {shlex.quote(title)} --dataset beir/scifact/test"
    return f"{text}\n\nWith gradret, to measure it on a collection:\n\n```sh\n{command}\n```"


def _tell_data(settings: FitSettings, data: str) -> str:
    text = f"## Training data\n\n{_escape(data)}, from:\n\n" + _list_sources(settings.data)
    if settings.exclude or settings.dev:
        measured = [*settings.exclude, *([settings.dev] if settings.dev else [])]
        text += "\n\nLists whose query is one of these collections' were left out:\n\n" + _list_sources(measured)
    return text


def _tell_training(settings: FitSettings, steps: int, best_step: int | None, where: str, seconds: float) -> str:
    rows = [["steps", steps]]
    if best_step is not None:
        rows.append(["step saved, the best on dev", best_step])
    rows += [["trained on", _escape(where)], ["time", _show_time(seconds)]]
    defaults = FitSettings()
    options = [f.name for f in fields(settings) if f.name not in (*SHOWN, *UNSHOWN)]
    options = [*SHOWN, *(name for name in options if getattr(settings, name) != getattr(defaults, name))]
    for name in options:
        if settings.takes(name):
            rows.append([f"`--{name.replace('_', '-')}`", _show_value(getattr(settings, name))])
    return (
        "## Training\n\nThe options are those of `gradret fit`; what is not named had its default value.\n\n"
        + _tabulate(["", "value"], rows)
    )


def _tell_measures(settings: FitSettings, dev: Sequence[dict], best_step: int | None) -> str:
    if not dev:
        return "## Measures\n\nNothing was measured while training: there was no `--dev` collection."
    names = list(dict.fromkeys(key for line in dev for key in line if key != "step"))
    rows = []
    for line in dev:
        best = line["step"] == best_step
        cells = [f"{line['step']} (best, saved)" if best else line["step"]]
        cells += [f"{line[name]:.4f}" if name in line else "" for name in names]
        rows.append([f"**{cell}**" for cell in cells] if best else cells)
    source = f" on {_code(_hide_folders(settings.dev))}" if settings.dev else ""
    return f"## Measures\n\nWhile training{source}:\n\n" + _tabulate(["step", *names], rows)


def _tabulate(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    # A bar ends a cell even inside code, unless a backslash stands before it.
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


def _list_sources(sources: Sequence[str]) -> str:
    return "\n".join(f"- {_code(_hide_folders(source))}" for source in sources)


def _show_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return _code(_hide_folders(value))
    if isinstance(value, tuple):
        return ", ".join(map(_show_value, value))
    return "none" if value is None else str(value)


def _show_time(seconds: float) -> str:
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _hide_folders(text: str) -> str:
    """A source or a setting that holds some, each local path in it without its folders."""
    if mined := re.search(r"(?:^|,\s*)from=(.+?)(?=,\s*[a-z]+=|$)", text):  # --mine k=2,grade=1,from=SOURCE
        return text[: mined.start(1)] + _hide_folders(mined[1]) + text[mined.end(1) :]
    name, mark, options = text.partition("?")
    parts = [
        key + equals + _hide_folder(value) for key, equals, value in (o.partition("=") for o in options.split("&"))
    ]
    return _hide_folder(name) + mark + "&".join(parts)


def _hide_folder(name: str) -> str:
    """The last part of a local path, with its `:SPLIT` if it has one; other names as they are."""
    folder = name.rpartition(":")[0]
    path_like = re.match(r"[./~\\]|[A-Za-z]:[\\/]", name) or name.endswith((".jsonl", ".json", ".tsv", ".txt"))
    if name == SAMPLE or not (path_like or os.path.exists(name) or (folder and os.path.isdir(folder))):
        return name
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return Path(name).resolve().name if last in ("", ".", "..", "~") else last


def _code(value: object) -> str:
    """Inline code, whatever the text: control characters spelled as in JSON, a longer fence around backticks."""
    text = str(value)
    if not text.isprintable() or text != text.strip():
        text = _quote(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _quote(text: str) -> str:
    """A JSON string, which is a Python one too; what can not be printed is spelled out."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))


def _escape(text: str) -> str:
    """Text in which Markdown finds no markup of its own."""
    return re.sub(r"([\\`*<>\[\]#])", r"\\\1", " ".join(text.split()))
