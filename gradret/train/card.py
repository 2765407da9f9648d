"""The model card: what a saved encoder is, how to use it, how it was trained and what was measured on the way."""

import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from gradret.data.sources import BUNDLED
from gradret.encoder.model import Encoder
from gradret.settings import FitSettings, spell_option

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]", re.ASCII)
TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "gradret"]
# In the table of settings whatever they are; others where they differ from the default.
SHOWN = "loss order temperature targets ground batch_lists learning_rate epochs interpolate seed precision lora".split()
# Told elsewhere in the card, or without a say in the outcome.
UNSHOWN = ("data", "exclude", "model", "dev", "dev_measure", "pooling", "normalize", "similarity", "checkpoint_every")
UNSHOWN += ("query_prefix", "document_prefix", "query_max_length", "document_max_length")
TEMPLATE = Path(__file__).with_name("card.md")  # what the card says; filled in by jinja2
POOLINGS = {"mean": "mean of the tokens", "cls": "first token", "last": "last token"}


def write_card(
    directory: str | Path,
    *,
    settings: FitSettings,
    data: str,
    steps: int,
    dev: Sequence[dict[str, Any]],
    best_step: int | None,
    share: float,
    held_out_means: dict[str, float],
    encoder: Encoder,
    where: str,
    seconds: float,
    versions: dict[str, Any],
) -> None:
    """Write README.md, the model card, into a saved encoder's directory. Local paths are shown without their folders.

    Args:
        data: what was trained on, as "416 lists, 1664 passages, grades 0 to 3".
        steps: optimizer steps done.
        dev: a {"step": int, settings.dev_measure: value} for each measurement.
        best_step: the step whose weights were saved, where dev chose; None for the last.
        share: of the way from the encoder's own weights to the trained ones, which was saved.
        held_out_means: share -> mean nDCG@10 of the held-out lists, which chose it; {} where it was given.
        where: what it was trained on, as "cpu, 1 process".
        seconds: that training took.
        versions: names and values; None is left out.
    Raises: OSError.
    """
    is_on_hub = HUB_NAME.fullmatch(settings.model) and not os.path.exists(settings.model)
    card = ModelCard.from_template(
        ModelCardData(
            base_model=settings.model if is_on_hub else None,
            library_name="sentence-transformers",
            pipeline_tag="sentence-similarity",
            tags=TAGS,
        ),
        template_path=str(TEMPLATE),
        title=" ".join(Path(directory).resolve().name.split()) or "model",
        settings=settings,
        encoder=encoder.config,
        data=data,
        measured=[*settings.exclude, *filter(None, [settings.dev])],
        dimension=encoder.dimension,
        pooling=POOLINGS[encoder.config.pooling],
        steps=steps,
        best_step=best_step,
        share=share,
        held_out_means=held_out_means,
        where=where,
        time=timedelta(seconds=math.ceil(seconds)),
        options=_list_options(settings),
        dev=dev,
        versions=versions,
        code=_code,
        cell=lambda value: str(value).replace("|", "\\|"),  # a bar ends a table's cell even inside code
        escape=_escape,
        quote=_spell_json,
        shell_quote=shlex.quote,
        hide_folder=_hide_folder,
        hide_folders=_hide_folders,
    )
    card.save(Path(directory, "README.md"))


def _list_options(settings: FitSettings) -> dict[str, str]:
    """The values to show, by the spelling of the option."""
    defaults, spelled = FitSettings(), {f.name: spell_option(f) for f in fields(settings)}
    options = [f.name for f in fields(settings) if f.name not in (*SHOWN, *UNSHOWN)]
    options = [*SHOWN, *(name for name in options if getattr(settings, name) != getattr(defaults, name))]
    return {spelled[name]: _show_value(getattr(settings, name)) for name in options if settings.takes(name)}


def _show_value(value: object) -> str:
    if isinstance(value, str):
        return _code(_hide_folders(value))
    if isinstance(value, tuple):
        return ", ".join(map(_show_value, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}"


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
    if name in BUNDLED or not (path_like or os.path.exists(name) or (folder and os.path.isdir(folder))):
        return name
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return Path(name).resolve().name if last in ("", ".", "..", "~") else last


def _code(value: object) -> str:
    """Inline code, whatever the text: control characters spelled as in JSON, a longer fence around backticks."""
    text = str(value)
    if not text.isprintable() or text != text.strip():
        text = _spell_json(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _spell_json(text: str) -> str:
    """A JSON string, which is a Python one too; what cannot be printed is spelled out."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))


def _escape(text: str) -> str:
    """Text in which Markdown finds no markup of its own."""
    return re.sub(r"([\\`*<>\[\]#])", r"\\\1", " ".join(text.split()))
