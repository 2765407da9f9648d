"""What `gradret bench` measures: the quality that losses train to, and their speed and memory."""

from collections.abc import Sequence

from gradret.console import needing


def require_matplotlib() -> None:
    """Refuse early, before hours of work, when no chart could be drawn. Raises: GradretError."""
    with needing("a chart", "matplotlib", "bench"):
        import matplotlib
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
