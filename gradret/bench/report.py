"""Results for people: tables for a terminal, charts as PNG."""

import math
from collections.abc import Sequence
from pathlib import Path

from gradret.console import GradretError

OURS = ("gradret", "fused")  # rows whose bars are set off


def require_bench_extra() -> None:
    """Refuse early, before hours of work, when charts or tests could not be made. Raises: GradretError."""
    try:
        import matplotlib
        import scipy  # noqa: F401
    except ImportError as error:
        raise GradretError(f"{error.name} is not installed; install it: pip install 'gradret[bench]'") from None
    matplotlib.use("Agg")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right; a name in the header may have several lines."""
    names = [name.split("\n") for name in header]
    height = max(map(len, names))
    head = list(zip(*([""] * (height - len(lines)) + lines for lines in names), strict=True))
    widths = [max(len(row[i]) for row in [*head, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([*map(line, head), "  ".join("-" * w for w in widths), *map(line, rows)])


def format_speed(result: dict) -> str:
    """One table a shape: times with their 20 and 80 percentiles, relative to cross_entropy, and peak memory.

    Below it, what was skipped and why.
    """
    on_cuda = result["copy_gb_s"] is not None
    blocks = []
    for shape, rows in _group_by_shape(result).items():
        header = ["", "forward ms", "backward ms", "both ms [20-80 %]", "x cross_entropy", "peak MiB"]
        header += ["one call ms", "of copy rate"] if on_cuda else []
        cells, notes = [], []
        for row in rows:
            if row["skipped"]:
                notes.append(f"not measured: {row['row']}: {row['skipped']}")
                continue
            both, ratio = row["both_ms"], row["times_cross_entropy"]
            line = [
                row["row"],
                *(_show_digits(row[time]["median"]) for time in ("forward_ms", "backward_ms")),
                f"{_show_digits(both['median'])} [{_show_digits(both['p20'])}-{_show_digits(both['p80'])}]",
                "" if ratio is None else f"{ratio:.2f}",
                _show_peak(row["peak_mib"], result["peak_resolution_mib"]),
            ]
            if on_cuda:
                share = row["floor_fraction"]
                line += [_show_digits(row["wall_ms"]["median"]), "" if share is None else f"{share:.0%}"]
            cells.append(line)
        notes += [f"peak MiB: {reason}" for reason in dict.fromkeys(row["peak_reason"] for row in rows) if reason]
        load = result["other_load"][shape]
        busy = "" if load is None else f", {load:.0%} of the processors' time went to others"
        title = f"{shape} {result['dtype']}, {result['threads']} threads{busy}"
        blocks.append("\n".join([title, format_table(header, cells), *notes]))
    if on_cuda:
        blocks.append(
            f"copy rate {result['copy_gb_s']:.0f} GB/s: 100 % reads scores and levels and writes gradients once"
        )
    return "\n\n".join(blocks)


def draw_speed(result: dict, path: Path) -> None:
    """A PNG of forward and backward together: a group of bars a shape, a logarithmic axis, whiskers from 20 to 80 %."""
    import matplotlib.pyplot as plt

    groups = {shape: [row for row in rows if not row["skipped"]] for shape, rows in _group_by_shape(result).items()}
    heights = [max(1, len(rows)) for rows in groups.values()]
    figure, panels = plt.subplots(
        len(groups),
        figsize=(8, 1 + 0.25 * sum(heights) + 0.7 * len(groups)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, (shape, rows) in zip(panels[:, 0], groups.items(), strict=True):
        places = range(len(rows))
        medians = [row["both_ms"]["median"] for row in rows]
        spread = [[abs(row["both_ms"][p] - row["both_ms"]["median"]) for row in rows] for p in ("p20", "p80")]
        colors = ["C0" if row["row"].startswith(OURS) else "C7" for row in rows]
        bars = axes.barh(places, medians, 0.8, xerr=spread, color=colors, ecolor="0.3", capsize=2)
        axes.bar_label(bars, [_show_digits(median) for median in medians], padding=6, fontsize=7)
        axes.set_yticks(places, [row["row"] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set_title(f"{shape} {result['dtype']}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel(f"forward + backward, ms ({result['kernels']})")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _group_by_shape(result: dict) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault("x".join(map(str, row["shape"])), []).append(row)
    return groups


def _show_peak(peak_mib: float | None, resolution_mib: float) -> str:
    if peak_mib is None:
        return "?"
    return f"<{resolution_mib:.2g}" if peak_mib < resolution_mib else f"{peak_mib:.1f}"


def _show_digits(value: float) -> str:
    """Three digits, without an exponent: 0.0123, 1.23, 123, 1234."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 6)}f}"
