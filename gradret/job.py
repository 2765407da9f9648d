"""What each process of a training run loads before the processes meet: lists, encoder, collections, memory."""

import math
from dataclasses import asdict

import torch
from torch import nn

from gradret.adapters import adapt
from gradret.capacity import check_chunk, measure_capacity
from gradret.encoder_load import choose_precision, load_encoder
from gradret.errors import GradretError
from gradret.evaluation import parse_measures
from gradret.lists import query_words
from gradret.mining import Miner
from gradret.mining_spec import Mining, parse_mining
from gradret.mix import SOFTMAX_ADVICE, ListsSummary, MixedLists, check_lists
from gradret.processes import Processes
from gradret.settings import AUTO, FitSettings, count_steps
from gradret.sources import open_collection, parse_source

PROBED_TEXTS = 256  # a batch of more is tried on a few texts first: where a CPU's memory ends, nothing says so
SAMPLED_LISTS = 64  # whose lengths stand for all
ADAM_BYTES = 8  # a parameter, that the optimizer takes in its first step


class Job:
    """A run as one process sees it; loading makes no exchange with the other processes.

    Args:
        resume: whether the settings are those of a run that is gone on with.
    Attributes:
        lists, summary: all lists, and which of them are trained on.
        dev: the collection measured while training, or None.
        miner: finds hard negatives, or None.
        encoder: as it is trained, with adapters if there are any.
        content: fingerprints of what the settings name.
        steps, batch_lists, precision: as they come out of settings, lists and device.
    Raises: GradretError.
    """

    def __init__(self, settings: FitSettings, processes: Processes, device: str | None, *, resume: bool = False):
        self.settings, self.processes = settings, processes
        if settings.batch_lists % processes.size:
            raise GradretError(
                f"--batch-lists {settings.batch_lists} is not a multiple of the {processes.size} processes that share "
                f"it; {_advise_on_sharing(settings.batch_lists, processes.size, resume)}"
            )
        parse_measures([settings.dev_measure])
        mining = parse_mining(settings.mine) if settings.mine else None
        self.lists = MixedLists([parse_source(s) for s in settings.data], seed=settings.seed)
        self.dev = open_collection(parse_source(settings.dev)) if settings.dev else None
        measured = [open_collection(parse_source(s)) for s in settings.exclude] + ([self.dev] if self.dev else [])
        queries = {query_words(text) for collection in measured for text in collection.queries.values()}
        self.summary = check_lists(self.lists, refuse_negative=settings.weighs_from_zero, exclude=queries)
        check_grades(settings, self.summary, mining)
        self.miner = None
        if mining is not None:
            kept, best = self.summary.kept, self.summary.best
            self.miner = Miner(mining, self.lists, kept, kept[best > mining.grade])
        self.encoder = load_encoder(settings.model, device=device, weights=settings.weights, **settings.encoder_options)
        self.content = {"data": self.lists.fingerprint, "encoder": self.encoder.fingerprint()}
        if self.miner is not None:
            self.content["pool"] = self.miner.fingerprint
        adapt(self.encoder, settings)
        self.steps = count_steps(settings, len(self.summary.kept))
        self.batch_lists = min(settings.batch_lists, len(self.summary.kept))
        self.precision = choose_precision(settings.precision, self.encoder.device)

    def describe(self) -> str:
        """The data, for people."""
        text = str(self.summary)
        if self.lists.colliding_ids:
            text += (
                f"; {self.lists.colliding_ids} query ids stand for different queries in different sources: kept apart"
            )
        spared = 0 if self.miner is None else len(self.summary.kept) - len(self.miner.rows)
        if spared:
            grade = self.miner.mining.grade
            text += f"; {spared} lists get no mined passages: their best grade is no higher than {grade:g}"
        return text

    def settings_json(self) -> dict:
        """The settings as they are stored."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.settings).items()}

    def epoch_at(self, step: int) -> float:
        """Epochs done after so many steps."""
        return step * self.batch_lists * self.settings.accumulate / len(self.summary.kept)

    def find_chunk(self, found: int | None = None, *, has_optimizer: bool = False) -> int:
        """Texts to hold in memory at once; 0 for all of a batch. Looks at the memory where that is in question.

        Args:
            found: what "auto" was before: it stays, because dropout depends on it, where it still fits.
            has_optimizer: whether the optimizer has taken its memory already.
        Raises: GradretError when a batch, or its chunks, do not fit, with a chunk to try.
        """
        chunk = self.settings.chunk
        if chunk is None and self.batch_lists * self._texts_per_list() <= PROBED_TEXTS * self.processes.size:
            return 0
        length, texts = self._measure_texts()
        share = math.ceil(texts / self.processes.size)
        trained = sum(p.numel() for p in self.encoder.parameters() if p.requires_grad)
        optimizer_bytes = 0 if has_optimizer else ADAM_BYTES * trained
        capacity = measure_capacity(self.encoder, length, self.precision, optimizer_bytes, self.processes.local_size)
        if found is not None:
            check_chunk(capacity, share, found or None)
            return found
        if chunk == AUTO:
            if capacity is None:
                raise GradretError("--chunk auto: this system does not show its memory; give a number, as --chunk 32")
            check_chunk(capacity, 1, 1)
            return 0 if capacity.chunk >= share else capacity.chunk
        check_chunk(capacity, share, chunk)
        return chunk or 0

    def _texts_per_list(self) -> float:
        mined = min(self.miner.mining.k, self.miner.pool.document_count) if self.miner is not None else 0
        return 1 + self.summary.passages / len(self.summary.kept) + mined

    def _measure_texts(self) -> tuple[int, int]:
        """Tokens of the longest text, and how many so long texts take as much memory as those of a batch do."""
        every = math.ceil(len(self.summary.kept) / SAMPLED_LISTS)
        sample = [self.lists[i] for i in self.summary.kept[::every].tolist()]
        passages = [p.content for entry in sample for p in entry.passages]
        counts = [len(t) for t in self.encoder.tokenize([*passages, self.summary.longest], "document")]
        counts += [len(t) for t in self.encoder.tokenize([entry.query for entry in sample], "query")]
        longest = max(counts)
        if self.miner is not None and self.miner.mining.source is not None:  # other documents, perhaps longer ones
            longest = self.encoder.config.document_max_length
        mean = sum(counts) / len(counts)
        return longest, math.ceil(self.batch_lists * self._texts_per_list() * mean / longest)


def check_grades(settings: FitSettings, summary: ListsSummary, mining: Mining | None) -> None:
    """Whether the grades of lists, and of what is mined for them, suit the loss. Raises: GradretError."""
    if mining is not None and mining.grade < 0 and settings.weighs_from_zero:
        raise GradretError(
            f"mine '{settings.mine}': targets of 2^grade - 1 or sqrt(grade) give the negative grade "
            f"{mining.grade:g} nothing; use a grade of 0 or above, or {SOFTMAX_ADVICE}"
        )
    if mining is not None and mining.grade >= summary.highest:
        raise GradretError(
            f"mine '{settings.mine}': mined passages are negatives, and grade {mining.grade:g} is no lower than "
            f"the best of the lists, {summary.highest:g}; give a lower grade"
        )
    if mining is not None and settings.positive_from is not None and mining.grade >= settings.positive_from:
        raise GradretError(
            f"mine '{settings.mine}': mined passages are negatives, and grade {mining.grade:g} is no lower than "
            f"--positive-from {settings.positive_from:g}; give a lower grade"
        )
    lowest = min(summary.lowest, math.inf if mining is None else mining.grade)
    alone = not settings.in_batch or min(settings.batch_lists, len(summary.kept)) == 1
    if settings.contrasts and alone and lowest > 0:
        where = "a batch of one list" if settings.in_batch else "without --in-batch a list"
        raise GradretError(
            f"{settings.contrasts} sets passages with target mass against those without, and {where} has none here: "
            f"the lowest grade is {lowest:g}; train with --in-batch and two lists a batch or more, or choose another "
            "--loss or, with wasserstein, --contrast-share 0"
        )


def _advise_on_sharing(batch_lists: int, size: int, resume: bool) -> str:
    if not resume:
        return f"try --batch-lists {math.ceil(batch_lists / size) * size}"
    even = [n for n in range(1, batch_lists + 1) if batch_lists % n == 0]
    near = [*[n for n in even if n < size][-1:], *[n for n in even if n > size][:1]]  # a run keeps its batches
    return f"start {' or '.join(map(str, near))} of them" if near != [1] else "start one alone"


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: biases and norm weights are vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0)
