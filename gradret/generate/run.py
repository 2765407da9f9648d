"""The resumable loop of `gradret gen`: queries to an engine, replies to checked lists or recorded rejects."""

import signal
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from gradret.console import GradretError, Interrupted, StopRequest, say, show_bar
from gradret.data.lists import JUDGED, Passage, RankingList, grades_agree, hash64
from gradret.generate.engine import Engine, Reply, Request
from gradret.generate.journal import Journal
from gradret.generate.prompts import PROMPT_VERSION, Prompts, Scale, Style
from gradret.generate.queries import Query
from gradret.generate.replies import Checks, Unusable, make_form, parse_reply
from gradret.settings import GenSettings


def expected_grade(probabilities: Mapping[str, float], scale: Scale) -> float:
    """Sum of p(label) grade(label) over the scale, to four decimals; probabilities by label, summing to 1."""
    return round(sum(probabilities[label] * grade for label, grade in zip(scale.labels, scale.grades, strict=True)), 4)


class Agreement:
    """Counts of (intended grade, nearest grade to the judged one), and how many lists agree in order.

    Attributes:
        counts: Counter of (intended, judged) grades.
        lists, agreed: lists seen, and those whose judged grades order them as the intended ones do.
    """

    def __init__(self, scale: Scale):
        self._scale = scale
        self.counts: Counter = Counter()
        self.lists = self.agreed = 0

    def add(self, ranking_list: RankingList) -> None:
        """Count a list whose passages are judged."""
        pairs = [(p.grade, p.extra[JUDGED]) for p in ranking_list.passages]
        self.counts.update((grade, min(self._scale.grades, key=lambda g: abs(g - judged))) for grade, judged in pairs)
        self.lists += 1
        self.agreed += grades_agree(*zip(*pairs, strict=True))

    def table(self) -> list[list[int]]:
        """Counts, a row for each intended grade, a column for each judged one, both best first."""
        return [[self.counts[row, column] for column in self._scale.grades] for row in self._scale.grades]


@dataclass
class Summary:
    """What a run did.

    Attributes:
        lists, rejected: queries that became lists, and that did not, by reason.
        skipped, rejected_before: queries that had their list, or their reject, from an earlier run.
        retries: replies that failed a check and were asked for again, by reason.
        tokens, prompt_tokens, seconds: written and read by the model, and the run's wall time.
        lengths: characters of each passage, by grade, best first.
        agreement: of intended and judged grades; None without the judge.
        last_error: why an engine last gave no reply.
    """

    lists: int = 0
    skipped: int = 0
    rejected_before: int = 0
    rejected: Counter = field(default_factory=Counter)
    retries: Counter = field(default_factory=Counter)
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    lengths: dict[float, list[int]] = field(default_factory=dict)
    agreement: Agreement | None = None
    last_error: str | None = None

    def as_dict(self) -> dict:
        """JSON-serialisable; lengths as mean, median, smallest and largest number of characters."""
        lengths = {
            f"{grade:g}": {
                "mean": round(statistics.fmean(values), 1),
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
            for grade, values in self.lengths.items()
            if values
        }
        judged = self.agreement and {
            "grades": list(self.lengths),
            "confusion": self.agreement.table(),
            "lists": self.agreement.lists,
            "agree_in_order": self.agreement.agreed,
        }
        return {
            "lists": self.lists,
            "skipped": self.skipped,
            "rejected_before": self.rejected_before,
            "rejected": dict(self.rejected.most_common()),
            "retries": dict(self.retries.most_common()),
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "seconds": round(self.seconds, 1),
            "tokens_per_s": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "characters": lengths,
            "judged": judged,
        }


def format_summary(document: dict) -> str:
    """The document of Summary.as_dict, with `out` and `rejects`, as lines for a terminal."""
    lines = [
        f"{document['out']}: {document['lists']} lists written"
        + (f", {document['skipped']} queries done before" if document["skipped"] else "")
        + (f", {document['rejected_before']} rejected before (--retry-rejects)" if document["rejected_before"] else "")
        + f"; {document['tokens']} tokens in {document['seconds']:.0f} s"
        + (f", {document['tokens_per_s']:.0f} tokens/s" if document["tokens_per_s"] else "")
    ]
    if document["rejected"]:
        lines.append(f"{document['rejects']}: {_join(document['rejected'])}")
    if document["retries"]:
        lines.append(f"tried again: {_join(document['retries'])}")
    if document["characters"]:
        lines.append("")
        lines.append("grade  characters: mean  median   min   max")
        lines += [
            f"{grade:>5}{c['mean']:>18.0f}{c['median']:>8.0f}{c['min']:>6}{c['max']:>6}"
            for grade, c in document["characters"].items()
        ]
    judged = document["judged"]
    if judged and judged["lists"]:
        grades = [f"{grade:g}" for grade in judged["grades"]]
        lines += ["", "intended   judged: " + "".join(f"{grade:>7}" for grade in grades)]
        lines += [
            f"{grade:>8}           " + "".join(f"{count:>7}" for count in row)
            for grade, row in zip(grades, judged["confusion"], strict=True)
        ]
        lines.append(
            f"judged and intended grades agree in order in {judged['agree_in_order']} of {judged['lists']} lists"
        )
    return "\n".join(lines)


def _join(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


NO_REPLY = "no reply"  # the one reason that a later run tries again
EMPTY_QUERY = "empty query"
REFUSED = "refused by the engine"
NOT_JUDGED = "not judged"


@dataclass(slots=True)
class Job:
    """A query on its way to a list."""

    query: Query
    style: Style | None
    attempt: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    judged: dict[int, float] = field(default_factory=dict)
    replies: list[str] = field(default_factory=list)
    over: bool = False  # decided: what is still under way for this attempt no longer counts


class Generation:
    """One run over queries; see generate."""

    def __init__(self, engine: Engine, prompts: Prompts, checks: Checks, journal: Journal, settings: GenSettings):
        self._engine, self._prompts, self._checks, self._journal = engine, prompts, checks, journal
        self._settings, self._scale = settings, prompts.scale
        self._forms = Forms(prompts.scale, settings)
        self._waiting: deque[Request] = deque()
        self.summary = Summary(
            lengths={grade: [] for grade in self._scale.grades},
            agreement=Agreement(self._scale) if settings.judge else None,
        )

    def start(self, query: Query) -> None:
        """Ask for a query's passages, or record at once why not."""
        if not query.text.strip():
            self._reject(Job(query, None), EMPTY_QUERY, "there is nothing to write passages for")
            return
        self._ask(Job(query, self._prompts.draw_style(query.key)))

    def _ask(self, job: Job) -> None:
        job.texts.clear()
        job.attempt += 1
        for grade, keys in self._forms.keys.items():
            self._waiting.append(
                Request(
                    (job, job.attempt, grade),
                    self._prompts.write(job.query.text, job.style, grade),
                    self._settings.reply_tokens(len(keys)),
                    stream_seed(job.query, self._settings.seed, self._engine.identity, job.attempt, grade),
                    self._forms.forms[grade],
                )
            )

    def next_request(self, queries: Iterator[Query]) -> Request | None:
        """What to submit next: first what a begun list still needs."""
        while not self._waiting:
            query = next(queries, None)
            if query is None:
                return None
            self.start(query)
        return self._waiting.popleft()

    def take(self, reply: Reply) -> None:
        """Move its job on: to a retry, to the judge, into the journal."""
        self.summary.tokens += reply.tokens
        self.summary.prompt_tokens += reply.prompt_tokens
        job, attempt, part = reply.request.key
        if job.over or attempt != job.attempt:
            return
        if reply.finish in ("error", "refused"):
            refused = NOT_JUDGED if reply.request.choices else REFUSED
            self._reject(job, NO_REPLY if reply.finish == "error" else refused, reply.error)
        elif reply.request.choices:
            job.judged[part] = expected_grade(reply.probabilities, self._scale)
            if len(job.judged) == len(job.texts):
                self._write(job)
        else:
            job.replies.append(reply.text)
            try:
                self._read(job, reply, part)
            except Unusable as problem:
                self._retry(job, problem)

    def _read(self, job: Job, reply: Reply, grade: float | None) -> None:
        if reply.finish == "length":
            raise Unusable(
                "cut off", f"{reply.tokens} tokens were not enough; raise --max-tokens and pass --retry-rejects"
            )
        job.texts |= parse_reply(reply.text, self._forms.keys[grade])
        if len(job.texts) < len(self._scale.keys):
            return
        job.texts = {key: job.texts[key] for key in self._scale.keys}
        self._checks.check(job.query.text, list(job.texts.values()))
        if not self._settings.judge:
            self._write(job)
            return
        for number, text in enumerate(job.texts.values()):
            messages = self._prompts.judge(job.query.text, text)
            self._waiting.append(Request((job, job.attempt, number), messages, 1, choices=self._scale.labels))

    def _retry(self, job: Job, problem: Unusable) -> None:
        # The likeliest reply is the same again.
        if job.attempt == self._settings.attempts or self._settings.temperature == 0:
            self._reject(job, problem.reason, problem.detail)
            return
        self.summary.retries[problem.reason] += 1
        self._withdraw(job)
        self._ask(job)

    def _withdraw(self, job: Job) -> None:
        """What waits for an attempt that has failed is not asked for."""
        self._waiting = deque(r for r in self._waiting if r.key[0] is not job)

    def _reject(self, job: Job, reason: str, detail: str) -> None:
        job.over = True
        self._withdraw(job)
        self.summary.rejected[reason] += 1
        if reason == NO_REPLY:
            self.summary.last_error = detail
        self._journal.reject(job.query, reason, detail, job.replies, final=reason != NO_REPLY)

    def _write(self, job: Job) -> None:
        job.over = True
        passages = [
            Passage(grade, text, extra={JUDGED: job.judged[number]} if self._settings.judge else {})
            for number, (grade, text) in enumerate(zip(self._scale.grades, job.texts.values(), strict=True))
        ]
        meta = {"attempt": job.attempt} | ({"style": asdict(job.style)} if job.style else {})
        ranking_list = RankingList(job.query.query_id, job.query.text, passages, meta)
        self._journal.add(ranking_list)
        self.summary.lists += 1
        for passage in passages:
            self.summary.lengths[passage.grade].append(len(passage.text))
        if self.summary.agreement:
            self.summary.agreement.add(ranking_list)


class Forms:
    """The replies that make up a list: one for all grades, or one for each."""

    def __init__(self, scale: Scale, settings: GenSettings):
        parts = zip(scale.grades, [(key,) for key in scale.keys], strict=True)
        self.keys = dict(parts) if settings.separate else {None: scale.keys}  # by grade, None for all
        self.forms = {grade: make_form(k, settings.min_chars, settings.max_chars) for grade, k in self.keys.items()}


def stream_seed(query: Query, seed: int, model: str, attempt: int, grade: float | None) -> int:
    """The seed of a reply's sampling stream: the same whatever else is generated, and in whatever order."""
    return hash64(query.query_id, query.text, str(seed), PROMPT_VERSION, model, str(attempt), str(grade))


def request_kinds(prompts: Prompts, settings: GenSettings) -> list[Request]:
    """A request of each kind that a run submits, without a query; engines measure and prepare with them."""
    kinds = [
        Request(grade, prompts.write("", None, grade), settings.reply_tokens(len(keys)))
        for grade, keys in Forms(prompts.scale, settings).keys.items()
    ]
    if settings.judge:
        kinds.append(Request("judge", prompts.judge("", ""), 1, choices=prompts.scale.labels))
    return kinds


def settings_record(settings: GenSettings, prompts: Prompts, model: str, request_options: dict | None = None) -> dict:
    """What lists of one file have in common, JSON-serialisable; neither `attempts` nor `max_tokens` shows in a list."""
    chosen = {k: v for k, v in asdict(settings).items() if k not in ("attempts", "max_tokens")}
    scale = {f"{grade:g}": definition for grade, definition in prompts.scale.levels}
    more = {"request_options": request_options} if request_options else {}
    return {"model": model, "prompt": f"{PROMPT_VERSION}-{prompts.fingerprint}", "scale": scale, **chosen, **more}


def generate(
    queries: Sequence[Query],
    engine: Engine,
    prompts: Prompts,
    checks: Checks,
    journal: Journal,
    settings: GenSettings,
    *,
    progress: bool = True,
) -> Summary:
    """Write a list for each query that the journal has neither a list nor a final reject of.

    Args:
        queries: no id twice.
        engine: made for request_kinds(prompts, settings).
        journal: takes each list as soon as it is whole.
    Returns: what this run did.
    Raises: GradretError when the engine or the journal gives up; Interrupted on SIGINT or SIGTERM. What is in the
        journal stays, and the same call goes on from there.
    """
    began = time.monotonic()
    generation = Generation(engine, prompts, checks, journal, settings)
    summary = generation.summary
    left = [query for query in queries if query.key not in journal.done and query.key not in journal.rejected]
    summary.skipped = sum(query.key in journal.done for query in queries)
    summary.rejected_before = len(queries) - len(left) - summary.skipped
    waiting = iter(left)
    bar = show_bar(shown=progress, total=len(left), unit="list")
    with StopRequest() as stop, bar:
        try:
            while True:
                while stop.signal is None and engine.free > 0:
                    request = generation.next_request(waiting)
                    if request is None:
                        break
                    engine.submit(request)
                replies: list[Reply] = []
                with stop.at_once():
                    replies = engine.collect() if stop.signal is None else []
                summary.seconds = time.monotonic() - began
                if stop.signal is not None:
                    raise Interrupted(f"stopped by {signal.Signals(stop.signal).name}; run the same command to go on")
                for reply in replies:
                    generation.take(reply)
                rejected = sum(summary.rejected.values())
                bar.set_postfix_str(f"{summary.tokens / summary.seconds:.0f} tokens/s, {rejected} rejected", False)
                bar.update(summary.lists + rejected - bar.n)
                if not replies:
                    return summary
        except GradretError:
            say(f"{summary.lists} lists written, {sum(summary.rejected.values())} queries rejected, all saved")
            raise
