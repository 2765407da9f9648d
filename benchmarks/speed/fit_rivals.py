"""Driving sentence-transformers' own trainer on the batches and settings of a gradret run.

B is the number of lists per batch. A list's one passage of the highest grade is the positive, its others are negatives.
"""

import importlib.util
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.speed.clock import synchronize
from gradret.console import GradretError
from gradret.data.lists import RankingList
from gradret.encoder.directory import EncoderConfig
from gradret.settings import FitSettings

PACKAGES = ("sentence_transformers", "datasets", "accelerate")
OLDEST = 6  # the first whose loss embeds a batch's passages in one pass, and can be told not to


@dataclass(frozen=True)
class Rival:
    """What sentence-transformers' trainer shares with a gradret run.

    Attributes:
        directory: the model, as sentence-transformers reads it.
        config: of the encoder that was saved there.
        settings: batch_lists, temperature, learning_rate, weight_decay, clip, precision and seed are taken.
        device: cpu, mps or the one CUDA device there is.
        batches: lists of each batch, in order; one more than are trained on, as its loader reads one ahead.
    """

    directory: Path
    config: EncoderConfig
    settings: FitSettings
    device: torch.device
    batches: Sequence[Sequence[RankingList]]


def require_trainer(device: torch.device) -> None:
    """Refuse early where sentence-transformers' trainer is not installed or would use more than `device`.

    Raises: GradretError.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise GradretError(
                f"{name.replace('_', '-')} is not installed, which sentence-transformers' trainer needs; "
                "install it: pip install 'sentence-transformers[train]'"
            )
    found = metadata.version("sentence-transformers")
    if int(found.split(".")[0]) < OLDEST:
        raise GradretError(f"sentence-transformers {found} is not compared with; install {OLDEST} or newer")
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise GradretError(
            f"{torch.cuda.device_count()} CUDA devices are visible, and sentence-transformers' trainer would use all; "
            "show it one: CUDA_VISIBLE_DEVICES=0"
        )


def rival_versions() -> dict[str, str]:
    """Versions of what the trainer is made of."""
    return {name: metadata.version(name) for name in PACKAGES}


def split_positive(ranking_list: RankingList) -> dict[str, str]:
    """A row of the trainer's dataset: the query, the passage of the highest grade, then the others in their order."""
    best = max(ranking_list.passages, key=lambda passage: passage.grade)
    others = [passage for passage in ranking_list.passages if passage is not best]
    negatives = {f"negative_{number}": passage.content for number, passage in enumerate(others, 1)}
    return {"query": ranking_list.query, "positive": best.content, **negatives}


def open_trainer(rival: Rival, chunk: int | None, steps: int, out: Path):
    """A fresh SentenceTransformerTrainer that does `steps` steps on the batches in their order.

    Args:
        chunk: mini_batch_size of CachedMultipleNegativesRankingLoss; None for MultipleNegativesRankingLoss.
        out: its output folder, in which it writes nothing.
    """
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim, dot_score
    from transformers import PrinterCallback

    class Trainer(SentenceTransformerTrainer):
        def add_model_card_callback(self, default_args_dict):
            """None: a model card is no part of training, and making one may ask the hub."""

    settings, config = rival.settings, rival.config
    rows = [split_positive(ranking_list) for batch in rival.batches for ranking_list in batch]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    kinds = {name: "query" if name == "query" else "document" for name in columns}
    prefixes = {"query": config.query_prefix, "document": config.document_prefix}
    model = SentenceTransformer(
        str(rival.directory),
        device=str(rival.device),
        local_files_only=True,
        trust_remote_code=settings.trust_remote_code,
    )
    similarity = cos_sim if config.similarity == "cosine" else dot_score
    options = {"scale": 1 / settings.temperature, "similarity_fct": similarity}
    if chunk is None:
        loss = losses.MultipleNegativesRankingLoss(model, **options)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=chunk, **options)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_lists,
        batch_sampler=_in_order,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        bf16=settings.precision == "bfloat16",
        use_cpu=rival.device.type == "cpu",
        seed=settings.seed,
        prompts={name: prefixes[kind] for name, kind in kinds.items() if prefixes[kind]} or None,
        # Tells it which columns are queries, needed only where they are cut to another length.
        router_mapping=kinds if config.query_max_length != config.document_max_length else {},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _columns(rival: Rival):
    """Entered where its loss is computed: what makes it embed a batch's passages in the way that is faster.

    By itself the loss without caching pads all columns of passages to the longest and embeds them in one pass, to keep
    a GPU busy. On a CPU that took 1.5 times as long as a pass for each column, so there its own switch sets that off.
    """
    from sentence_transformers.base.losses import column_merging_disabled

    return nullcontext() if merges_columns(rival.device) else column_merging_disabled()


def merges_columns(device: torch.device) -> bool:
    """Whether the loss without caching embeds a batch's passages in one pass, not in one for each column."""
    return device.type != "cpu"


def _in_order(dataset, **options):
    """A batch sampler that goes through the dataset once, as the trainer's argument batch_sampler takes it."""
    from sentence_transformers import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    return DefaultBatchSampler(SequentialSampler(dataset), **options)


def time_trainer(rival: Rival, chunk: int | None, steps: int, out: Path, *, warm_up: int = 1) -> list[float]:
    """Milliseconds of each of `steps` steps of the trainer's loop, after `warm_up` (0 or 1) that is not counted.

    A step lasts from the end of the one before to its own end: reading and collating a batch are in it.
    """
    from transformers import TrainerCallback

    ends_s: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *arguments, **keywords):
            if not warm_up:
                ends_s.append(time.perf_counter())

        def on_step_end(self, *arguments, **keywords):
            synchronize(rival.device)
            ends_s.append(time.perf_counter())

    trainer = open_trainer(rival, chunk, steps + warm_up, out)
    trainer.add_callback(Clock())
    with _columns(rival):
        trainer.train()
    return [1e3 * (end - begin) for begin, end in pairwise(ends_s)]


def find_losses(rival: Rival, chunk: int | None, out: Path) -> Iterator[float]:
    """The loss of each batch as the trainer's loader gives it, in evaluation mode and float32."""
    trainer = open_trainer(rival, chunk, len(rival.batches), out)
    trainer.model.eval()
    with torch.no_grad(), _columns(rival):
        for batch in trainer.get_train_dataloader():
            features, labels = trainer.collect_features(batch)
            yield float(trainer.loss(features, labels))
