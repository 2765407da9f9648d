"""The rows of the training benchmark: their names, what is made of their times, and how that is shown."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gradret.bench import format_table
from gradret.bench.loss import find_percentiles
from gradret.settings import DEFAULT_LOSS

RIVAL = "sentence-transformers"
LOSSES = {"infonce": "infonce", "default loss": DEFAULT_LOSS}  # as a row names them -> as fit spells them


class System(NamedTuple):
    """A row: whose trainer with which loss, with or without gradient caching."""

    trainer: str
    loss: str  # a key of LOSSES; infonce is what sentence-transformers calls multiple negatives ranking
    cached: bool

    @property
    def name(self) -> str:
        return (RIVAL if self.trainer == RIVAL else f"gradret {self.loss}") + ", cached" * self.cached


# What is compared stands next to each other, so that little time passes between.
SYSTEMS = [
    System(trainer, loss, cached)
    for cached in (False, True)
    for trainer, loss in ((RIVAL, "infonce"), ("gradret", "infonce"), ("gradret", "default loss"))
]


def summarize_times(times: dict[str, list[list[float]]], passages: int) -> dict:
    """The "rows" and ratios of measure_fit, from each row's milliseconds by round and step.

    Args:
        passages: of a batch.
    """
    ms = {name: np.array(found) for name, found in times.items()}  # (rounds, steps)
    rows, speeds, steps = [], {}, {}
    for system in SYSTEMS:
        rival, infonce = (system._replace(trainer=name, loss="infonce").name for name in (RIVAL, "gradret"))
        own = ms[system.name]
        rows.append(
            {
                "row": system.name,
                "passages_per_s": find_percentiles(1e3 * passages / own.mean(1)),
                "step_ms": find_percentiles(own.ravel()),
            }
        )
        if system.trainer != RIVAL:
            speeds[f"{system.name} / {rival}"] = find_percentiles(ms[rival].mean(1) / own.mean(1))
        if system.loss == "default loss":
            steps[f"{system.name} / {infonce}"] = find_percentiles((own / ms[infonce]).ravel())
    return {"rows": rows, "speed_ratios": speeds, "step_ratios": steps}


def describe_lengths(tokens: Sequence[int]) -> dict[str, float]:
    """Mean, 10, 50 and 90 percentile and highest of the passages' lengths in tokens."""
    p10, p50, p90 = np.percentile(tokens, [10, 50, 90])
    mean, longest = float(np.mean(tokens)), int(max(tokens))
    return {"mean": round(mean, 1), "p10": float(p10), "p50": float(p50), "p90": float(p90), "max": longest}


def format_fit_speed(result: dict) -> str:
    """The document of measure_fit as lines for a terminal."""
    load, tokens = result["other_load"], result["tokens"]
    lines = [
        f"{result['model']}, {result['precision']} on {result['device']}, {result['threads']} threads, "
        f"{result['batch_lists']} lists of {result['passages_a_list']} passages per batch, chunks of {result['chunk']}",
        f"tokens per passage: mean {tokens['mean']:.0f}, 10 % {tokens['p10']:.0f}, median {tokens['p50']:.0f}, "
        f"90 % {tokens['p90']:.0f}, longest {tokens['max']}"
        + ("" if load is None else f"; {load:.0%} of the processors' time went to others"),
    ]
    ratios = {name.split(" / ")[0]: ratio for name, ratio in result["speed_ratios"].items()}
    cells = [
        [
            row["row"],
            _show(row["passages_per_s"], 1),
            f"{row['step_ms']['median']:.0f}",
            _show(ratios[row["row"]], 2) if row["row"] in ratios else "",
        ]
        for row in result["rows"]
    ]
    lines.append(format_table(["", "passages/s [20-80 %]", "step ms", f"x {RIVAL}"], cells))
    lines += [f"time of a step, {name}: {_show(ratio, 3)}" for name, ratio in result["step_ratios"].items()]
    alone = {name: times["median"] for name, times in result["loss_alone"].items()}
    step_ms = next(row["step_ms"]["median"] for row in result["rows"] if row["row"] == "gradret infonce")
    lines.append(
        "of it the loss alone, forward and backward: "
        + ", ".join(f"{name} {ms:.2f} ms ({ms / step_ms:.2%})" for name, ms in alone.items())
    )
    if result["memory"]:
        cells = [
            [f"{row['lists']} lists", str(row["chunk"] or "none"), f"{row['peak_mib']:.0f}", f"{row['ratio']:.2f}"]
            for row in result["memory"]
        ]
        lines += ["", format_table(["one step", "chunk", "peak MiB", "ratio"], cells)]
    return "\n".join(lines)


def _show(spread: dict[str, float], digits: int) -> str:
    return "{:.{d}f} [{:.{d}f}-{:.{d}f}]".format(spread["median"], spread["p20"], spread["p80"], d=digits)
