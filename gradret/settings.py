"""The settings of a training run and of a generation, and the names they are chosen from."""

import math
from dataclasses import dataclass
from typing import Any

SAMPLE = "sample"  # the bundled ranking lists
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# What there is of losses: the name of each, and the settings it takes. gradret.loss.functions has NAME_loss of each.
LOSSES: dict[str, tuple[str, ...]] = {
    "wasserstein": ("order", "temperature", "targets", "ground"),
    "gaussian": ("temperature", "targets"),
    "infonce": ("temperature", "positive_from"),
    "kl": ("temperature", "targets"),
    "contrast": ("temperature", "targets"),
    "ranknet": ("temperature",),
}
DEFAULT_LOSS = "wasserstein:.15+contrast:.85"
DEFAULT_ORDER = 2
DEFAULT_TEMPERATURE = 0.05
DEFAULT_TARGETS = "sqrt"
DEFAULT_GROUND = "sqrt"
TARGETS = ("gain", "softmax", "sqrt")
GROUNDS = ("grade", "gain", "sqrt")
SCHEDULES = ("linear", "cosine")
PRECISIONS = ("auto", "float32", "bfloat16")
WEIGHTS = ("float32", "bfloat16")
AUTO = "auto"
POOLINGS = ("mean", "cls", "last")
SIMILARITIES = ("cosine", "dot")
DEFAULT_MEASURES = ("nDCG@10", "R@100", "RR@10")


def parse_loss(spelling: str) -> dict[str, float]:
    """The weights of the losses that are added up, by name, in the order of LOSSES.

    Args:
        spelling: NAME, or NAME:WEIGHT+NAME:WEIGHT+... with weights above 0 that sum to 1, as
            "wasserstein:.15+contrast:.85".

    Raises: ValueError.
    """
    found: dict[str, float] = {}
    for term in spelling.split("+"):
        name, colon, number = (part.strip() for part in term.partition(":"))
        if name not in LOSSES:
            known = ", ".join(LOSSES)
            raise ValueError(f"loss '{spelling}': '{name}' is not one of {known}; mix them as {DEFAULT_LOSS}")
        if name in found:
            raise ValueError(f"loss '{spelling}': '{name}' stands there twice")
        try:
            found[name] = float(number) if colon else 1.0
        except ValueError:
            raise ValueError(f"loss '{spelling}': the weight '{number}' is not a number") from None
        if not 0 < found[name] < math.inf:
            raise ValueError(f"loss '{spelling}': the weight of '{name}' must be above 0, got {number}")
        if not colon and "+" in spelling:
            raise ValueError(f"loss '{spelling}': '{name}' has no weight; mix losses as {DEFAULT_LOSS}")
    total = sum(found.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"loss '{spelling}': the weights must sum to 1, got {total:g}")
    return {name: found[name] for name in LOSSES if name in found}


def spell_loss(weights: dict[str, float]) -> str:
    """The one spelling of what parse_loss gave."""
    if len(weights) == 1:
        return next(iter(weights))
    return "+".join(f"{name}:{repr(weight).removeprefix('0')}" for name, weight in weights.items())


def find_takers(setting: str) -> set[str]:
    """The losses that the setting is for; none where it is no setting of losses."""
    return {name for name, taken in LOSSES.items() if setting in taken}


@dataclass(frozen=True)
class FitSettings:
    """Everything that decides a run's outcome. Encoder fields left None are the encoder's own.

    How many processes share a run is no part of it: they do the same step together, to rounding.

    Attributes:
        data: sources, see sources.parse_source; merged into one list per query.
        exclude: collections that will be measured; a list whose query has the words of one of theirs, or of
            dev's, is not trained on.
        loss: a name in LOSSES, or several with their weights, see parse_loss; stored in one spelling. LOSSES says which
            of them order, targets, ground and positive_from are for, and gradret.loss.functions what they mean.
        positive_from: the lowest grade that is positive to infonce; None: each list's highest alone.
        temperature: divides the scores before the softmax.
        in_batch: whether the other lists' documents join each list, with the grade in_batch_grade (None: 0,
            or the lowest grade of the data if that is lower).
        epochs: passes over the lists; max_steps ends a run sooner.
        batch_lists: lists whose documents share a batch, over all processes; accumulate batches make one optimizer
            step.
        chunk: passages encoded at once with gradients, whatever batch_lists is: gradient caching. "auto" finds the
            largest that fits. None keeps the activations of the whole batch, which is faster where they fit.
        warmup: share of the steps over which the learning rate rises; then it falls, "linear" or "cosine".
        clip: highest gradient norm; 0 for no limit.
        interpolate: share of the way from the weights the encoder began with to the trained ones at which they are
            saved, above 0 to 1.
        precision: "float32", "bfloat16" (autocast) or "auto", bfloat16 where the device computes in it.
        dev: collection measured by dev_measure at the start, every dev_every steps and at the end; the best
            model is kept.
        patience: dev measurements without a new best after which the run ends; None for no such end.
        mine: hard negatives added to the lists, see mining.parse_mining; None for none.
        lora: rank of the low-rank adapters trained in place of the weights; 0 trains the weights.
        lora_alpha: the adapters' scale is lora_alpha / lora.
        lora_targets: names of the linear layers that get adapters, as they end; () for all.
        weights: type in which weights that are not trained are held.
        gradient_checkpointing: compute activations again in backward, layer by layer.
        layers: of the encoder that are kept, from the first on; None for all.
    """

    data: tuple[str, ...] = (SAMPLE,)
    exclude: tuple[str, ...] = ()
    model: str = DEFAULT_ENCODER
    loss: str = DEFAULT_LOSS
    order: int = DEFAULT_ORDER
    temperature: float = DEFAULT_TEMPERATURE
    targets: str = DEFAULT_TARGETS
    ground: str = DEFAULT_GROUND
    positive_from: float | None = None
    in_batch: bool = True
    in_batch_grade: float | None = None
    epochs: float = 2.0
    max_steps: int | None = None
    batch_lists: int = 16
    accumulate: int = 1
    chunk: int | str | None = None
    learning_rate: float = 5e-6
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: str = "linear"
    clip: float = 1.0
    interpolate: float = 1.0
    precision: str = "auto"
    seed: int = 0
    dev: str | None = None
    dev_every: int = 100
    dev_measure: str = "nDCG@10"
    patience: int | None = None
    mine: str | None = None
    lora: int = 0
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    weights: str = "float32"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 50
    layers: int | None = None
    pooling: str | None = None
    normalize: bool | None = None
    similarity: str | None = None
    query_prefix: str | None = None
    document_prefix: str | None = None
    query_max_length: int | None = None
    document_max_length: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", spell_loss(parse_loss(self.loss)))  # equal losses are spelled alike
        for name, allowed in (
            ("targets", TARGETS),
            ("ground", GROUNDS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("order", (1, 2)),
            ("weights", WEIGHTS),
            ("pooling", (None, *POOLINGS)),
            ("similarity", (None, *SIMILARITIES)),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(repr(value) for value in allowed if value is not None)
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        for name in ("seed", "lora"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)!r}")
        for name in ("clip", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be 0 to 1, got {self.warmup!r}")
        others = self.in_batch_grade if self.in_batch else None
        if self.contrasts and (self.targets == "softmax" or (others or 0) > 0):
            why = "softmax targets do" if self.targets == "softmax" else f"an in_batch_grade of {others:g} does"
            raise ValueError(
                f"loss {self.loss}: contrast needs documents without target mass, which {why} not leave; choose a loss "
                "without contrast, such as wasserstein"
            )
        if not 0 < self.interpolate <= 1:
            raise ValueError(f"interpolate must be above 0 and at most 1, got {self.interpolate!r}")
        if not 0 <= self.lora_dropout < 1:  # with all of its input dropped, an adapter learns nothing
            raise ValueError(f"lora_dropout must be 0 or above and below 1, got {self.lora_dropout!r}")
        if self.chunk not in (None, AUTO) and not (isinstance(self.chunk, int) and self.chunk > 0):
            raise ValueError(f"chunk must be a number above 0 or 'auto', got {self.chunk!r}")
        for name in ("max_steps", "layers", "query_max_length", "document_max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or above, got {getattr(self, name)!r}")
        if self.patience is not None and (self.patience < 1 or self.dev is None):
            raise ValueError(f"patience must be 1 or above and needs dev, got {self.patience!r} and {self.dev!r}")
        for name, default in (("lora_targets", ()), ("lora_alpha", 32.0), ("lora_dropout", 0.0)):
            if getattr(self, name) != default and not self.lora:
                raise ValueError(f"{name} needs lora, the adapters' rank, above 0")
        if self.positive_from is not None and not self.takes("positive_from"):
            raise ValueError(f"positive_from is for loss infonce, not {self.loss}")
        if self.weights != "float32" and not self.lora:
            raise ValueError("weights in bfloat16 need lora: rounding would swallow most updates of trained ones")
        for name in (
            "temperature",
            "lora_alpha",
            "epochs",
            "learning_rate",
            "batch_lists",
            "accumulate",
            "dev_every",
            "checkpoint_every",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")

    @property
    def encoder_options(self) -> dict[str, Any]:
        """What encoder_load.load_encoder takes besides the name and the device."""
        names = ["layers", "pooling", "normalize", "similarity", "query_prefix", "document_prefix"]
        names += ["query_max_length", "document_max_length", "trust_remote_code"]
        return {name: getattr(self, name) for name in names}

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss in the sum, by name; see parse_loss."""
        return parse_loss(self.loss)

    def takes(self, name: str) -> bool:
        """Whether the setting is one for this loss."""
        takers = find_takers(name)
        return not takers or not takers.isdisjoint(self.loss_weights)

    @property
    def contrasts(self) -> bool:
        """Whether documents with target mass are set against those without."""
        return "contrast" in self.loss_weights

    @property
    def weighs_from_zero(self) -> bool:
        """Whether targets are 2^grade - 1 or the grade's root, which negative grades do not have."""
        return self.takes("targets") and self.targets != "softmax"


@dataclass(frozen=True)
class GenSettings:
    """Everything that decides what is generated, besides the queries, the model, the scale and the examples.

    Attributes:
        separate: one request a grade, instead of one for all, best first.
        variety: whether each query draws a length, a genre and a reading level for its passages.
        shots: example lists in the prompt.
        language: ISO 639-1 code the passages must be in; None for the query's, unchecked.
        min_chars, max_chars: of a passage.
        temperature, top_p: of sampling.
        max_tokens: of a reply; None for enough to write max_chars a passage.
        attempts: replies tried for a query before it is rejected.
        judge: whether the model then grades every passage without knowing the intended grade.
    """

    separate: bool = False
    variety: bool = False
    shots: int = 1
    language: str | None = None
    min_chars: int = 100
    max_chars: int = 1000
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int | None = None
    attempts: int = 3
    seed: int = 0
    judge: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_chars <= self.max_chars:
            raise ValueError(f"length must be MIN:MAX with 1 <= MIN <= MAX, got {self.min_chars}:{self.max_chars}")
        for name in ("temperature", "top_p"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a number of 0 or above, got {getattr(self, name)!r}")
        for name in ("attempts", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or above, got {getattr(self, name)!r}")
        for name in ("seed", "shots"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)!r}")

    def reply_tokens(self, passages: int) -> int:
        """The token cap of a reply that holds so many passages; in Han and kana a token is one or two characters."""
        return self.max_tokens or passages * (self.max_chars // 2 + 24)


def count_steps(settings: FitSettings, lists: int) -> int:
    """Optimizer steps of a run: every list at least `epochs` times, the last step filled up."""
    size = min(settings.batch_lists, lists) * settings.accumulate
    steps = max(1, math.ceil(settings.epochs * lists / size - 1e-9))
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def learning_rate_at(step: int, steps: int, settings: FitSettings) -> float:
    """The learning rate of step `step` (from 0) out of `steps`."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    share = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * share
