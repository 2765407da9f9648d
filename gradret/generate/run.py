"""The resumable loop of `gradret gen`: queries to an engine, replies to checked lists or recorded rejects.

A list begins as a plan, a brief for each lower grade (see plans.py), and the passage about the query itself. As soon as
a grade's briefs are there its passage is asked for. What fails a check, a brief or a passage, is asked for again alone.
"""

import random
import signal
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from gradret.console import GivenUp, GradretError, Interrupted, StopRequest, count_of, say, show_bar
from gradret.data.lists import JUDGED, Passage, RankingList, grades_agree
from gradret.generate.engine import Engine, Reply, Request
from gradret.generate.journal import Journal
from gradret.generate.plans import DRAWN, content_words, find_brief_fault, pick, split_sentences, trim, weave
from gradret.generate.prompts import PROMPT_VERSION, Prompts, Scale, draw_seed
from gradret.generate.queries import Query
from gradret.generate.replies import MARKUP, Checks, Unusable, clean_text, drop_thoughts, parse_object, quote_reply
from gradret.settings import DEFAULT_LLM, GenSettings

# Why a query got no list, besides the reasons of replies.Unusable.
NO_REPLY = "no reply"  # the one reason that a later run tries again
EMPTY_QUERY = "empty query"
REFUSED = "refused by the engine"
NOT_JUDGED = "not judged"

LEAST_GRADES = 3  # a list without any others is kept, the best one among them; scales of two need both


def open_engine(
    kinds: Sequence[Request], settings: GenSettings, model: str | None, endpoint: str | None = None, **options
) -> Engine:
    """The engine that is asked for: a server where an endpoint is named, otherwise llama.cpp.

    Args:
        kinds: of Prompts.kinds.
        model: a GGUF file or hub repository, see llama.locate_gguf, None for the default one; with an endpoint, the
            name it is served by.
        options: of endpoint.Endpoint or llama.LlamaEngine.

    Raises: GradretError when the engine cannot be used, or its package is not installed.
    """
    options |= {"temperature": settings.temperature, "top_p": settings.top_p}
    if endpoint:  # either import needs a package that those who use the other engine may lack
        from gradret.generate.endpoint import Endpoint

        return Endpoint(endpoint, model=model, **options)
    from gradret.generate.llama import LlamaEngine, locate_gguf

    return LlamaEngine(locate_gguf(DEFAULT_LLM if model is None else model), kinds, **options)


def settings_record(prompts: Prompts, model: str, request_options: dict | None = None) -> dict:
    """What lists of one file have in common, JSON-serialisable; not how often and how long a model may try."""
    chosen = {k: v for k, v in asdict(prompts.settings).items() if k not in ("attempts", "max_tokens")}
    scale = {f"{grade:g}": definition for grade, definition in prompts.scale.levels}
    more = {"request_options": request_options} if request_options else {}
    return {"model": model, "prompt": f"{PROMPT_VERSION}-{prompts.fingerprint}", "scale": scale, **chosen, **more}


def generate(queries: Sequence[Query], engine: Engine, prompts: Prompts, checks: Checks, journal: Journal) -> "Summary":
    """Write a list for each query that the journal has neither a list nor a final reject of.

    Args:
        queries: no id twice.
        engine: made for prompts.kinds().
        journal: takes each list as soon as it is whole.
    Returns: what this run did.
    Raises: GradretError when the engine or the journal gives up; Interrupted on SIGINT or SIGTERM. What is in the
        journal stays, and the same call goes on from there.
    """
    began = time.monotonic()
    generation = Generation(engine.identity, prompts, checks, journal)
    summary = generation.summary
    left = [query for query in queries if query.key not in journal.done and query.key not in journal.rejected]
    summary.skipped = sum(query.key in journal.done for query in queries)
    summary.rejected_before = len(queries) - len(left) - summary.skipped
    waiting = iter(left)
    with StopRequest() as stop, show_bar(total=len(left), unit="list") as bar:
        try:
            while True:
                while stop.signal is None and engine.free > 0:
                    request = generation.next_request(waiting)
                    if request is None:
                        break
                    engine.submit(request)
                replies: Sequence[Reply] = []
                # A signal may cut the wait short: what is under way then is asked again by the next run. It never cuts
                # `take` short, so that a list that is whole is written.
                with suppress(GivenUp), stop.give_up(0):
                    replies = engine.collect()
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
            rejected = count_of(sum(summary.rejected.values()), "query", "queries")
            say(f"{count_of(summary.lists, 'list')} written, {rejected} rejected, all saved")
            raise


@dataclass(slots=True)
class Draft:
    """A query on its way to a list.

    Attributes:
        plan: the good briefs by name.
        attempts: of each part, a plan's or a grade's, from 1; replies to earlier ones no longer count.
        came: passages that are not checked yet, or why there is none, by grade.
        texts: the good passages, by grade.
        failed: why the other grades have none.
        borrowed: the id of the query whose passage is the lowest grade's.
        judged: judged grades, by the passage's number.
        replies: of all attempts, as they came.
    """

    query: Query
    plan: dict[str, str] = field(default_factory=dict)
    attempts: dict[object, int] = field(default_factory=dict)
    came: dict[float, str | Unusable] = field(default_factory=dict)
    texts: dict[float, str] = field(default_factory=dict)
    failed: dict[float, Unusable] = field(default_factory=dict)
    borrowed: str | None = None
    judged: dict[int, float] = field(default_factory=dict)
    replies: list[str] = field(default_factory=list)


class Generation:
    """One run over queries, as what to ask next and what a reply changes; see generate."""

    def __init__(self, model: str, prompts: Prompts, checks: Checks, journal: Journal):
        self._model, self._prompts, self._checks, self._journal = model, prompts, checks, journal
        self._settings, self._scale = prompts.settings, prompts.scale
        self._drafts: dict[str, Draft] = {}  # by query id
        self._waiting: deque[Request] = deque()
        self.summary = Summary(self._scale.grades, self._settings.judge)

    def next_request(self, queries: Iterator[Query]) -> Request | None:
        """What to submit next; None when nothing waits and no query is left."""
        while True:
            # First what a begun list still needs: so one sequence writes the same file however often it is stopped.
            while self._waiting:
                request = self._waiting.popleft()
                if self._find_draft(request):  # or its list was rejected while it waited
                    return request
            query = next(queries, None)
            if query is None:
                return None
            draft = self._drafts[query.query_id] = Draft(query)
            if query.text.strip():
                self._begin(draft)
            else:
                self._reject(draft, EMPTY_QUERY, "there is nothing to write passages for")

    def take(self, reply: Reply) -> None:
        """Move a reply's draft on: to its passages, to the judge, to another attempt, or into the journal."""
        self.summary.tokens += reply.tokens
        self.summary.prompt_tokens += reply.prompt_tokens
        draft = self._find_draft(reply.request)
        if draft is None:
            return
        part = reply.request.key.part
        if reply.finish == "error":
            self.summary.lasting += reply.lasting
            self._reject(draft, NO_REPLY, reply.error)
        elif reply.finish == "refused" and reply.request.choices:
            self._reject(draft, NOT_JUDGED, reply.error)
        elif reply.finish == "refused":
            self._fail(draft, part, Unusable(REFUSED, reply.error))
        elif reply.request.choices:
            draft.judged[part[1]] = expected_grade(reply.probabilities, self._scale)
            if len(draft.judged) == len(draft.texts):
                self._write(draft)
        else:
            draft.replies.append(reply.text)
            if part in self._prompts.plan_parts:
                self._read_plan(draft, part, reply.text)
            else:
                draft.came[part] = self._read_passage(draft, part, reply)
                self._settle(draft)

    def _find_draft(self, request: Request) -> Draft | None:
        """The draft that a request is for; None when it is decided, or its part at another attempt."""
        query_id, attempt, part = request.key
        draft = self._drafts.get(query_id)
        return draft if draft and draft.attempts.get(part, 1) == attempt else None

    def _begin(self, draft: Draft) -> None:
        lowest = self._scale.grades[-1]
        if self._settings.borrow and (lender := self._find_lender(draft.query)):
            draft.borrowed, draft.came[lowest] = lender.query_id, lender.passages[0].text
        if "plan" in self._prompts.plan_parts:
            self._ask_plan(draft, "plan")
        else:
            self._ask_drawn(draft)
        self._ask_passage(draft, self._scale.grades[0])

    def _find_lender(self, query: Query) -> RankingList | None:
        """One of the lists written last, about something else."""
        words = content_words(query.text)
        lists = [found for found in self._journal.recent if not words & content_words(found.query)]
        draw = random.Random(draw_seed(query, self._settings.seed, self._model, 1, "borrow"))
        return pick(lists, draw) if lists else None

    def _read_plan(self, draft: Draft, part: str, text: str) -> None:
        """Keep the good briefs of a reply, ask for their passages, and ask again for the other briefs."""
        names = self._prompts.plan_parts[part]
        problem = None
        try:
            found = parse_object(text, names)
        except Unusable as unusable:
            found, problem = {}, unusable
        new = set()
        for name, brief in found.items():
            if name in draft.plan:
                continue
            # Of the other request's briefs some may have come, or not.
            others = {other: draft.plan[other] for other in (*names, "thing") if other in draft.plan}
            longest, shown = self._prompts.longest(name), self._prompts.shown
            if fault := find_brief_fault(draft.query.text, name, brief, others, longest=longest, shown=shown):
                problem = problem or Unusable("bad plan", f"the brief '{name}' {fault}: {quote_reply(brief)}")
            else:
                draft.plan[name] = brief
                new.add(name)
        if "thing" in new:
            self._ask_drawn(draft)
        for grade, briefs in self._scale.briefs.items():
            if {*briefs} & new and {*briefs} <= {*draft.plan}:
                self._ask_passage(draft, grade)
        if problem and not self._ask_again(draft, part, problem):
            self._fail(draft, part, problem)

    def _fail(self, draft: Draft, part: object, problem: Unusable) -> None:
        """Go on without the grades for which a part is needed."""
        missing = {*self._prompts.plan_parts.get(part, ())} - {*draft.plan}
        if "thing" in missing:
            missing |= {*DRAWN}
        for grade, briefs in self._scale.briefs.items():
            if grade == part or (grade not in draft.came and {*briefs} & missing):
                draft.failed[grade] = problem
        self._settle(draft)

    def _ask_drawn(self, draft: Draft) -> None:
        """Ask for the briefs that are made from the thing, if there is one."""
        for grade, briefs in self._scale.briefs.items():
            if grade not in draft.came and {*briefs} & {*DRAWN}:
                self._ask_plan(draft, briefs[-1])

    def _ask_plan(self, draft: Draft, part: str) -> None:
        attempt = draft.attempts.get(part, 1)
        self._waiting.append(self._prompts.plan(draft.query, part, attempt, self._model, draft.plan.get("thing", "")))

    def _ask_passage(self, draft: Draft, grade: float) -> None:
        briefs = self._scale.briefs[grade]
        subject = draft.plan[briefs[-1]] if briefs else draft.query.text
        attempt = draft.attempts.get(grade, 1)
        self._waiting.append(self._prompts.write(draft.query, grade, subject, attempt, self._model))

    def _ask_again(self, draft: Draft, part: object, problem: Unusable) -> bool:
        """Ask for a plan or a passage with another seed; False when it was asked for often enough."""
        if draft.borrowed and part == self._scale.grades[-1]:
            return self._write_borrowed(draft, part, problem)
        attempt = draft.attempts.get(part, 1) + 1
        # At temperature 0 the reply would be the same again, but where another aspect or field is drawn.
        if attempt > self._settings.attempts or (self._settings.temperature == 0 and part not in DRAWN):
            return False
        self.summary.retries[problem.reason] += 1
        draft.attempts[part] = attempt
        if part in self._prompts.plan_parts:
            self._ask_plan(draft, part)
        else:
            draft.came.pop(part)
            brief = self._scale.briefs[part][-1:]
            if problem.reason == "language" and {*brief} & {*DRAWN}:  # the brief may be in that language, too
                (name,) = brief
                del draft.plan[name]
                draft.attempts[name] = draft.attempts.get(name, 1) + 1
                self._ask_plan(draft, name)
            else:
                self._ask_passage(draft, part)
        return True

    def _write_borrowed(self, draft: Draft, grade: float, problem: Unusable) -> bool:
        """Ask for a passage in the place of a borrowed one; False where the plan has no thing for its brief."""
        draft.borrowed = None
        if "plan" in self._prompts.plan_parts and "thing" not in draft.plan:
            return False
        del draft.came[grade]
        self.summary.retries[problem.reason] += 1
        self._ask_plan(draft, self._scale.briefs[grade][-1])
        return True

    def _read_passage(self, draft: Draft, grade: float, reply: Reply) -> str | Unusable:
        """The passage of a reply, whole sentences of about the target's length; or what is wrong."""
        target = self._prompts.target(draft.query)
        try:
            text = drop_thoughts(reply.text)
            if markup := MARKUP.search(text):
                raise Unusable("markup", f"it holds '{markup[0].strip()}'")
            text = clean_text(text)
        except Unusable as problem:
            return problem
        sentences = split_sentences(text)
        if not sentences:
            return Unusable("cut off", f"no sentence ends: '{text[-40:]}'; it had {reply.tokens} tokens")
        if "answer" in self._scale.briefs[grade]:
            return weave(sentences, draft.plan["answer"], target)
        return trim(sentences, target)

    def _settle(self, draft: Draft) -> None:
        """Check what came, the best grade first, each beside the good ones above it; go on when nothing is missing."""
        for grade in self._scale.grades:
            if grade in draft.failed and (grade == self._scale.grades[0] or self._settings.strict):
                break  # nothing can become of it
            if grade in draft.texts or grade in draft.failed:
                continue
            if grade not in draft.came:
                return  # those below wait, so that what is checked does not depend on which reply came first
            passage = draft.came[grade]
            try:
                if isinstance(passage, Unusable):
                    raise passage
                self._checks.check(draft.query.text, passage, [*draft.texts.values()])
                draft.texts[grade] = passage
            except Unusable as problem:
                if self._ask_again(draft, grade, problem):
                    return
                draft.failed[grade] = problem
                return self._settle(draft)
        self._finish(draft)

    def _finish(self, draft: Draft) -> None:
        least = len(self._scale.grades) if self._settings.strict else min(LEAST_GRADES, len(self._scale.grades))
        if len(draft.texts) < least or self._scale.grades[0] in draft.failed:
            grade = max(draft.failed)
            self._reject(draft, draft.failed[grade].reason, f"grade {grade:g}: {draft.failed[grade].detail}")
        elif self._settings.judge:
            self._waiting += self._prompts.judge(draft.query, [*draft.texts.values()])
        else:
            self._write(draft)

    def _reject(self, draft: Draft, reason: str, detail: str) -> None:
        del self._drafts[draft.query.query_id]
        self.summary.rejected[reason] += 1
        if reason == NO_REPLY:
            self.summary.last_error = detail
        self._journal.reject(draft.query, reason, detail, draft.replies, final=reason != NO_REPLY)

    def _write(self, draft: Draft) -> None:
        del self._drafts[draft.query.query_id]
        passages = [
            Passage(grade, text, extra={JUDGED: draft.judged[number]} if self._settings.judge else {})
            for number, (grade, text) in enumerate(draft.texts.items())
        ]
        briefs = dict.fromkeys(name for names in self._scale.briefs.values() for name in names)
        meta: dict = {"plan": {name: draft.plan[name] for name in briefs if name in draft.plan}}
        if style := self._prompts.draw_style(draft.query):
            meta["style"] = asdict(style)
        if draft.borrowed:
            meta["borrowed"] = draft.borrowed
        if draft.failed:
            meta["missing"] = {f"{grade:g}": problem.reason for grade, problem in draft.failed.items()}
        ranking_list = RankingList(draft.query.query_id, draft.query.text, passages, meta)
        self._journal.add(ranking_list)
        self.summary.add(ranking_list)


def expected_grade(probabilities: Mapping[str, float], scale: Scale) -> float:
    """Sum of p(label) grade(label) over the scale, to four decimals; probabilities by label, summing to 1."""
    return round(sum(probabilities[label] * grade for label, grade in zip(scale.labels, scale.grades, strict=True)), 4)


@dataclass
class Summary:
    """What a run did.

    Attributes:
        grades: of the scale, the best first.
        judge: whether passages are judged.
        lists, rejected: queries that became lists, and that did not, by reason.
        incomplete: lists that lack a passage of a grade.
        skipped, rejected_before: queries that had their list, or their reject, from an earlier run.
        retries: replies that failed a check and were asked for again, by reason.
        tokens, prompt_tokens, seconds: written and read by the model, and the run's wall time.
        lengths: characters of each passage, by grade.
        judged: how often a passage of an intended grade was judged nearest to another, by (intended, judged).
        agreed: lists whose judged grades order their passages as the intended ones do.
        last_error: why an engine last gave no reply.
        lasting: queries without a reply that another run would not get either, see engine.Reply.
    """

    grades: tuple[float, ...]
    judge: bool
    lists: int = 0
    incomplete: int = 0
    skipped: int = 0
    rejected_before: int = 0
    rejected: Counter = field(default_factory=Counter)
    retries: Counter = field(default_factory=Counter)
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    lengths: dict[float, list[int]] = field(default_factory=dict)
    judged: Counter = field(default_factory=Counter)
    agreed: int = 0
    last_error: str | None = None
    lasting: int = 0

    def add(self, ranking_list: RankingList) -> None:
        """Count a list."""
        self.lists += 1
        self.incomplete += len(ranking_list.passages) < len(self.grades)
        for passage in ranking_list.passages:
            self.lengths.setdefault(passage.grade, []).append(len(passage.text))
        if self.judge:
            pairs = [(p.grade, p.extra[JUDGED]) for p in ranking_list.passages]
            self.judged.update((grade, min(self.grades, key=lambda g: abs(g - judged))) for grade, judged in pairs)
            self.agreed += grades_agree(*zip(*pairs, strict=True))

    def as_dict(self) -> dict:
        """JSON-serialisable; lengths as mean, median, smallest and largest number of characters."""
        characters = {
            f"{grade:g}": {
                "mean": round(statistics.fmean(self.lengths[grade]), 1),
                "median": statistics.median(self.lengths[grade]),
                "min": min(self.lengths[grade]),
                "max": max(self.lengths[grade]),
            }
            for grade in self.grades
            if grade in self.lengths
        }
        judged = {
            "grades": list(self.grades),
            "confusion": [[self.judged[row, column] for column in self.grades] for row in self.grades],
            "lists": self.lists,
            "agree_in_order": self.agreed,
        }
        return {
            "lists": self.lists,
            "incomplete": self.incomplete,
            "skipped": self.skipped,
            "rejected_before": self.rejected_before,
            "rejected": dict(self.rejected.most_common()),
            "retries": dict(self.retries.most_common()),
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "seconds": round(self.seconds, 1),
            "tokens_per_s": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "characters": characters,
            "judged": judged if self.judge else None,
        }


def format_summary(document: dict) -> str:
    """The document of Summary.as_dict, with `out` and `rejects`, as lines for a terminal."""
    lines = [
        f"{document['out']}: {count_of(document['lists'], 'list')} written"
        + (f" ({document['incomplete']} without a passage of some grade)" if document["incomplete"] else "")
        + (f", {count_of(document['skipped'], 'query', 'queries')} done before" if document["skipped"] else "")
        + (f", {document['rejected_before']} rejected before (--retry-rejects)" if document["rejected_before"] else "")
        + f"; {document['tokens']} tokens in {document['seconds']:.0f} s"
        + (f", {document['tokens_per_s']:.0f} tokens/s" if document["tokens_per_s"] else "")
    ]
    for title, counts in ((document["rejects"], document["rejected"]), ("tried again", document["retries"])):
        if counts:
            lines.append(f"{title}: {', '.join(f'{count} {reason}' for reason, count in counts.items())}")
    if document["characters"]:
        lines += ["", "grade  characters: mean  median   min   max"]
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
            f"judged and intended grades agree in order in {judged['agree_in_order']} of "
            f"{count_of(judged['lists'], 'list')}"
        )
    return "\n".join(lines)
