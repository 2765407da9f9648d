"""What a generation did: counts, lengths, agreement with the judge, as JSON and as text."""

import statistics
from collections import Counter
from dataclasses import dataclass, field

from gradret.judge import Agreement


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
