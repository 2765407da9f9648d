"""What can be set for a training run and for a generation: declared and checked here, once.

The options, `--help`, the refusal of unknown values and the records of runs are made from the declarations.
"""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple, get_args, get_origin

SAMPLE = "sample"  # the bundled ranking lists
MEDQUAD = "medquad"  # the bundled collection with human judgments
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# Apache-2.0, 1.1 GB. Without a revision: lists record a digest of the model's content, and refuse another beside it.
DEFAULT_LLM = "Qwen/Qwen2.5-1.5B-Instruct-GGUF:qwen2.5-1.5b-instruct-q4_k_m.gguf"
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
DEFAULT_TEMPERATURE = 0.01
DEFAULT_TARGETS = "sqrt"
DEFAULT_GROUND = "sqrt"
TARGETS = ("gain", "softmax", "sqrt")
GROUNDS = ("grade", "gain", "sqrt")
PRECISIONS = ("auto", "float32", "bfloat16")
AUTO = "auto"
POOLINGS = ("mean", "cls", "last")
SIMILARITIES = ("cosine", "dot")
DEFAULT_MEASURES = ("nDCG@10", "R@100", "RR@10")

OWN = "the encoder's own"
EMPTY = "must not be empty; give a value or leave it out"

# The groups of options, as --help shows them.
FIRST = "Options to begin with"
DATA, ENCODER, LOSS, OPTIMISATION = "Data", "Encoder", "Loss", "Optimisation"
MEMORY, RUN = "Memory and processes", "Run"
QUERIES, ENGINE, WRITTEN, SAMPLING = "Queries and output", "Model and engine", "What is written", "Sampling"


class Range(NamedTuple):
    """Numbers that a setting can be: in words, and as a test."""

    words: str
    holds: Callable[[float], bool]


ANY_COUNT = Range("0 or above", lambda x: x >= 0)
COUNT = Range("1 or above", lambda x: x >= 1)
POSITIVE = Range("above 0", lambda x: x > 0)
SHARE = Range("0 to 1", lambda x: 0 <= x <= 1)
SHARE_ABOVE_0 = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
SHARE_BELOW_1 = Range("0 or above and below 1", lambda x: 0 <= x < 1)


@dataclass(frozen=True)
class Declaration:
    """What a setting is, besides its name, type and default.

    Attributes:
        group: of options.
        help: what --help says; it begins with a capital and ends with a stop.
        choices: the values that it can have.
        range: the numbers that it can be, besides the choices.
        parse: makes the value from what is given, or raises ValueError; None: see parse_setting.
        has_option: whether it has an option of its own; if not, `--set NAME=VALUE` sets it.
        metavar: stands for its value in --help; None: its type does.
        unset: what its default, None or (), stands for.
        needs: the setting without which it does nothing.
        empty: whether an empty text is a value.
    """

    group: str
    help: str
    choices: tuple[Any, ...] = ()
    range: Range | None = None
    parse: Callable[[str], Any] | None = None
    has_option: bool = True
    metavar: str | None = None
    unset: str | None = None
    needs: str | None = None
    empty: bool = False


def setting(default: Any, group: str, help: str, **more: Any) -> Any:
    """A field of settings with its declaration; `more` as Declaration has it."""
    return field(default=default, metadata={"declaration": Declaration(group, help, **more)})


def rare(default: Any, group: str, help: str, **more: Any) -> Any:
    """The same for a setting without an option of its own."""
    return setting(default, group, help, has_option=False, **more)


def find_declaration(declared: Field[Any]) -> Declaration:
    """What `setting` said of the field."""
    found: Declaration = declared.metadata["declaration"]
    return found


def spell_option(declared: Field[Any]) -> str:
    """How the command line sets it, without the value: `--max-steps`, or `--set layers`."""
    has_option = find_declaration(declared).has_option
    return f"--{declared.name.replace('_', '-')}" if has_option else f"--set {declared.name}"


TYPE_NAMES = {bool: "yes or no", int: "a whole number", float: "a number", str: "text", tuple: "names"}


def list_types(declared: Field[Any]) -> list[type]:
    """Of its values, None left out; tuple for names."""
    if get_origin(declared.type) is tuple:
        return [tuple]
    return [one for one in get_args(declared.type) or (declared.type,) if one is not type(None)]


def parse_setting(declared: Field[Any], text: str) -> Any:
    """The value that a text stands for. Raises: ValueError saying what was expected and what came."""
    declaration = find_declaration(declared)
    if declaration.parse is not None:
        return declaration.parse(text)
    choices = {str(choice): choice for choice in declaration.choices}
    value = choices.get(text, _convert(list_types(declared)[0], text))
    fault = find_fault(declared, value)
    if fault is not None:
        raise ValueError(fault)
    return value


def _convert(kind: type, text: str) -> Any:
    """The text as a value of the type; as it is where it stands for none."""
    if kind is bool:
        return {"yes": True, "true": True, "no": False, "false": False}.get(text.lower(), text)
    if kind is tuple:
        return tuple(filter(None, map(str.strip, text.split(",")))) or text
    try:
        return kind(text)
    except ValueError:
        return text


def find_fault(declared: Field[Any], value: Any) -> str | None:
    """What is wrong with a value, as "must be above 0, got 0"; None if nothing is."""
    declaration = find_declaration(declared)
    if value is None and declared.default is None:
        return None
    if value in declaration.choices and not isinstance(value, bool):
        return None
    if value == "" and not declaration.empty:
        return EMPTY
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, got {value!r}"
    choices = ", ".join(map(repr, declaration.choices))
    if choices and declaration.range is None:
        return f"must be one of {choices}; got {value!r}"
    types = [kind for kind in list_types(declared) if not (choices and kind is str)]
    if not any(_is_of(value, kind) for kind in types):
        expected = [*(TYPE_NAMES[kind] for kind in types), *([choices] if choices else [])]
        return f"must be {' or '.join(expected)}, got {value!r}"
    if declaration.range is not None and not declaration.range.holds(value):
        return f"must be {declaration.range.words}, got {value!r}"
    return None


def _is_of(value: Any, kind: type) -> bool:
    """Whether it is of the type: a whole number is a number, too, yes and no are none; names are texts."""
    if kind is tuple:
        return isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def check_settings(settings: Any) -> None:
    """Raises: ValueError naming the first setting whose value its declaration does not allow."""
    for declared in fields(settings):
        fault = find_fault(declared, getattr(settings, declared.name))
        if fault is not None:
            raise ValueError(f"{declared.name} {fault}")


def parse_loss(spelling: str) -> dict[str, float]:
    """The weights of the losses that are added up, by name, in the order of LOSSES.

    Args:
        spelling: NAME, or NAME:WEIGHT+NAME:WEIGHT+... with weights above 0 that sum to 1, as
            "wasserstein:.15+contrast:.85".

    Raises: ValueError.
    """
    if not isinstance(spelling, str):
        raise ValueError(f"loss must be text, such as {DEFAULT_LOSS}, got {spelling!r}")
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


def spell_loss(spelling: str) -> str:
    """The one spelling of a loss, of all that parse_loss takes. Raises: ValueError."""
    weights = parse_loss(spelling)
    if len(weights) == 1:
        return next(iter(weights))
    return "+".join(f"{name}:{repr(weight).removeprefix('0')}" for name, weight in weights.items())


def find_takers(name: str) -> list[str]:
    """The losses that a setting is for; none where it is no setting of losses."""
    return [loss for loss, taken in LOSSES.items() if name in taken]


def takes_setting(loss: str, name: str) -> bool:
    """Whether the setting is one for this loss, as parse_loss takes it: each loss of a mixture counts."""
    takers = find_takers(name)
    return not takers or not parse_loss(loss).keys().isdisjoint(takers)


def find_unused(settings: "FitSettings", names: Container[str], losses: Sequence[str]) -> str | None:
    """Why one of these settings does nothing with the others and any of the losses, and what to do; None if all do."""
    for declared in fields(settings):
        if declared.name not in names:
            continue
        needed = find_declaration(declared).needs
        if needed and not getattr(settings, needed):
            option = next(spell_option(other) for other in fields(settings) if other.name == needed)
            return f"{spell_option(declared)} has no use without {option}; leave it out"
        if not any(takes_setting(loss, declared.name) for loss in losses):
            takers = ", ".join(find_takers(declared.name))
            return f"{spell_option(declared)} is for --loss {takers}, not {', '.join(losses)}; leave it out"
    return None


@dataclass(frozen=True)
class FitSettings:
    """Everything that decides a run's outcome.

    How many processes share a run is no part of it: they do the same step together, to rounding.

    Raises: ValueError naming the setting, what was expected and what came.
    """

    data: tuple[str, ...] = setting(
        (SAMPLE,), FIRST, "Training lists; again to merge several, one list per query.", metavar="SOURCE"
    )
    model: str = setting(
        DEFAULT_ENCODER,
        FIRST,
        "Directory or hub repository of a transformers or sentence-transformers encoder.",
        metavar="ENCODER",
    )
    loss: str = setting(
        DEFAULT_LOSS,
        FIRST,
        f"The loss over a list, or several whose weights sum to 1: {', '.join(LOSSES)}.",
        parse=spell_loss,
        metavar="NAME[:WEIGHT+...]",
    )
    dev: str | None = setting(
        None, FIRST, "A collection to measure while training; the best model is kept.", metavar="SOURCE"
    )

    exclude: tuple[str, ...] = setting(
        (),
        DATA,
        "A collection to be measured later: lists with the words of one of its queries, or of dev's, are left out.",
        metavar="SOURCE",
    )
    mine: str | None = setting(
        None,
        DATA,
        "Add K mined passages to each list at grade G; also from=SOURCE, by=encoder|bm25, skip=S, every=EPOCHS.",
        metavar="k=K,grade=G[,...]",
    )
    dev_every: int = setting(100, DATA, "Steps between dev measurements.", range=COUNT, needs="dev")
    dev_measure: str = rare("nDCG@10", DATA, "The ir_measures name by which dev is measured.", needs="dev")
    patience: int | None = setting(
        None, DATA, "End after so many dev measurements without a new best.", range=COUNT, needs="dev"
    )

    query_prefix: str | None = setting(None, ENCODER, "Put before every query.", unset=OWN, empty=True)
    document_prefix: str | None = setting(None, ENCODER, "Put before every document.", unset=OWN, empty=True)
    query_max_length: int | None = setting(None, ENCODER, "Tokens of a query that are read.", range=COUNT, unset=OWN)
    document_max_length: int | None = setting(
        None, ENCODER, "Tokens of a document that are read.", range=COUNT, unset=OWN
    )
    layers: int | None = rare(
        None,
        ENCODER,
        "How many layers are kept, from the first on: fewer are weaker, and faster.",
        range=COUNT,
        unset="all",
    )
    pooling: str | None = rare(None, ENCODER, "How token vectors become one vector.", choices=POOLINGS, unset=OWN)
    normalize: bool | None = rare(None, ENCODER, "Whether embeddings have length 1.", unset=OWN)
    similarity: str | None = rare(
        None, ENCODER, "How a query and a document are compared.", choices=SIMILARITIES, unset=OWN
    )
    trust_remote_code: bool = setting(False, ENCODER, "Run model code that the repository brings along.")

    order: int = setting(DEFAULT_ORDER, LOSS, "The p of wasserstein's W_p^p.", choices=(1, 2))
    temperature: float = setting(
        DEFAULT_TEMPERATURE, LOSS, "Scores are divided by it before the softmax.", range=POSITIVE
    )
    targets: str = setting(
        DEFAULT_TARGETS,
        LOSS,
        "How much relevance belongs to a grade: 2^grade - 1, exp(grade) or the grade's root.",
        choices=TARGETS,
    )
    ground: str = rare(
        DEFAULT_GROUND,
        LOSS,
        "How far wasserstein moves mass between two grades: their difference, that of 2^grade or of roots.",
        choices=GROUNDS,
    )
    positive_from: float | None = setting(
        None, LOSS, "The lowest grade that is positive to infonce.", unset="each list's highest"
    )
    in_batch: bool = setting(True, LOSS, "Whether the other lists' passages join each list.")
    in_batch_grade: float | None = rare(
        None,
        LOSS,
        "Grade of the other lists' passages.",
        unset="0, or the lowest of the data if that is lower",
        needs="in_batch",
    )

    epochs: float | str = setting(
        AUTO,
        OPTIMISATION,
        "Passes over the lists; auto: 2, or with fewer than 160 to train on as many as make 320 of them, at most 8.",
        choices=(AUTO,),
        range=POSITIVE,
    )
    max_steps: int | None = setting(None, OPTIMISATION, "Steps after which the run ends sooner.", range=COUNT)
    batch_lists: int = setting(16, OPTIMISATION, "Lists whose passages share a batch, over all processes.", range=COUNT)
    accumulate: int = rare(1, OPTIMISATION, "Batches per optimizer step.", range=COUNT)
    learning_rate: float = setting(2e-4, OPTIMISATION, "Peak learning rate, of AdamW.", range=POSITIVE)
    weight_decay: float = rare(
        0.01, OPTIMISATION, "Weight decay of matrices; biases and norms have none.", range=ANY_COUNT
    )
    warmup: float = rare(0.1, OPTIMISATION, "Share of the steps in which the learning rate rises.", range=SHARE)
    schedule: str = rare(
        "linear", OPTIMISATION, "How the learning rate falls after the warm-up.", choices=("linear", "cosine")
    )
    clip: float = rare(1.0, OPTIMISATION, "The highest gradient norm; 0 for no limit.", range=ANY_COUNT)
    interpolate: float | str = rare(
        AUTO,
        OPTIMISATION,
        "Share of the way from the encoder's own weights to the trained ones that is saved; auto: .25, or from 50 "
        "lists on .25, .5 or 1, the least that ranks a tenth of them, not trained on, as well to .02 as the best.",
        choices=(AUTO,),
        range=SHARE_ABOVE_0,
    )

    chunk: int | str | None = setting(
        None,
        MEMORY,
        "Gradient caching: so many texts in memory at once, however large the batch; auto: as many as fit.",
        choices=(AUTO,),
        range=COUNT,
        metavar="TEXTS|auto",
        unset="all of a batch",
    )
    precision: str = setting(
        AUTO, MEMORY, "Type of computation; auto is bfloat16 where the device computes in it.", choices=PRECISIONS
    )
    gradient_checkpointing: bool = setting(
        False, MEMORY, "Less memory: activations are computed again in backward, layer by layer."
    )
    lora: int = setting(
        0, MEMORY, "Train low-rank adapters of this rank in place of the weights; 0 trains these.", range=ANY_COUNT
    )
    lora_alpha: float = rare(32.0, MEMORY, "The adapters' scale, times the rank.", range=POSITIVE, needs="lora")
    lora_dropout: float = rare(0.0, MEMORY, "Dropout before the adapters.", range=SHARE_BELOW_1, needs="lora")
    lora_targets: tuple[str, ...] = rare(
        (), MEMORY, "Ends of the names of the linear layers that get adapters.", unset="all", needs="lora"
    )
    weights: str = rare(
        "float32", MEMORY, "Type of the weights that lora leaves as they are.", choices=("float32", "bfloat16")
    )

    seed: int = setting(0, RUN, "Seed of the lists' order, of sampling and of dropout.", range=ANY_COUNT)
    checkpoint_every: int = rare(50, RUN, "Steps between checkpoints.", range=COUNT)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", spell_loss(self.loss))  # equal losses are spelled alike
        check_settings(self)
        # The losses' settings that have a value without being given are shared by runs of several losses.
        given = [
            declared.name
            for declared in fields(self)
            if getattr(self, declared.name) != declared.default
            and (declared.default is None or find_declaration(declared).needs)
        ]
        if unused := find_unused(self, given, [self.loss]):
            raise ValueError(unused)
        if self.weights != "float32" and not self.lora:
            raise ValueError("weights in bfloat16 need lora: rounding would swallow most updates of trained ones")

    @property
    def encoder_options(self) -> dict[str, Any]:
        """What load_encoder takes besides the name and the device."""
        declared = (one for one in fields(self) if find_declaration(one).group == ENCODER)
        return {one.name: getattr(self, one.name) for one in declared}

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss in the sum, by name; see parse_loss."""
        return parse_loss(self.loss)

    def takes(self, name: str) -> bool:
        """Whether the setting is one for this loss."""
        return takes_setting(self.loss, name)

    @property
    def weighs_from_zero(self) -> bool:
        """Whether targets are 2^grade - 1 or the grade's root, which negative grades do not have."""
        return self.takes("targets") and self.targets != "softmax"


@dataclass(frozen=True)
class GenSettings:
    """Everything that decides what is generated, besides the queries, the model and the scale.

    Raises: ValueError naming the setting, what was expected and what came.
    """

    variety: bool = setting(False, WRITTEN, "Each query draws a length, a genre and a reading level.")
    borrow: bool = setting(False, WRITTEN, "The lowest grade gets the best passage of another query's list.")
    strict: bool = setting(False, WRITTEN, "Reject a query that lacks a passage of any grade.")
    language: str | None = setting(
        None, WRITTEN, "ISO 639-1 code that passages must be in.", unset="each list's best passage's"
    )
    min_chars: int = rare(200, WRITTEN, "Of a passage.", range=COUNT)  # together: --length
    max_chars: int = rare(800, WRITTEN, "Of a passage.", range=COUNT)
    judge: bool = setting(False, WRITTEN, "The model then grades each passage blind; stored as 'judged'.")
    temperature: float = setting(
        0.8, SAMPLING, "Temperature of sampling; 0 takes the likeliest token.", range=ANY_COUNT
    )
    top_p: float = setting(0.95, SAMPLING, "Share of the likeliest tokens that are drawn from.", range=SHARE_ABOVE_0)
    max_tokens: int | None = setting(
        None, SAMPLING, "Tokens of a reply.", range=COUNT, unset="enough for the full length"
    )
    attempts: int = setting(5, SAMPLING, "Replies tried for a plan or a passage before it is given up.", range=COUNT)
    seed: int = setting(0, SAMPLING, "Seed of sampling and of what queries draw.", range=ANY_COUNT)

    def __post_init__(self) -> None:
        if not 1 <= self.min_chars <= self.max_chars:
            raise ValueError(f"length must be MIN:MAX with 1 <= MIN <= MAX, got {self.min_chars}:{self.max_chars}")
        if self.borrow and self.variety:
            raise ValueError("--borrow takes passages of another genre and length; leave it or --variety out")
        check_settings(self)
