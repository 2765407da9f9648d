"""Results for people: tables for a terminal, charts as PNG."""

from collections.abc import Sequence
from pathlib import Path

from gradret.errors import GradretError


def require_bench_extra() -> None:
    """Refuse early, before hours of work, when charts or tests could not be made. Raises: GradretError."""
    try:
        import matplotlib
        import scipy  # noqa: F401
    except ImportError as error:
        raise GradretError(f"{error.name} is not installed; install it: pip install 'gradret[bench]'") from None
    matplotlib.use("Agg")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def format_quality(result: dict) -> str:
    """One table a dataset: means with the standard deviation over seeds, and p-values against infonce."""
    blocks = []
    for dataset, size in result["datasets"].items():
        rows = [row for row in result["rows"] if row["dataset"] == dataset]
        measures = list(rows[0]["mean"])
        tested = any(row["p"] for row in rows)
        header = ["system", *measures, *([f"p ({measures[0]})"] if tested else [])]
        cells = []
        for row in rows:
            p = row["p"].get(measures[0])
            values = [_mean_and_spread(row["mean"][m], row["sd"][m]) for m in measures]
            cells.append([row["system"], *values, *(["" if p is None else f"{p:.3f}"] if tested else [])])
        title = f"{dataset}: {size['queries']} queries, {size['documents']} documents, {result['seeds']} seeds"
        blocks.append(f"{title}\n{format_table(header, cells)}")
    note = "p: paired t-test over queries against infonce" if any(row["p"] for row in result["rows"]) else ""
    return "\n\n".join([*blocks, *([note] if note else [])])


def _mean_and_spread(mean: float, sd: float | None) -> str:
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def draw_quality(result: dict, path: Path) -> None:
    """A PNG of the first measure: a group of bars a dataset, a bar a system, whiskers of one standard deviation."""
    import matplotlib.pyplot as plt

    datasets = list(result["datasets"])
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    measure = next(iter(result["rows"][0]["mean"]))
    cells = {(row["system"], row["dataset"]): row for row in result["rows"]}
    figure, axes = plt.subplots(figsize=(2 + 1.1 * len(systems) * len(datasets), 4), layout="constrained")
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        rows = [cells[system, dataset] for dataset in datasets]
        places = [x + (i - (len(systems) - 1) / 2) * width for x in range(len(datasets))]
        means = [row["mean"][measure] for row in rows]
        bars = axes.bar(
            places, means, width * 0.92, label=system, yerr=[row["sd"][measure] or 0 for row in rows], capsize=3
        )
        axes.bar_label(bars, [f"{mean:.3f}" for mean in means], padding=3, fontsize=8)
    axes.set_xticks(range(len(datasets)), datasets)
    axes.set_ylabel(measure)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(systems), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
