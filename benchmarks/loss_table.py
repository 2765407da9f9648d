"""The tables of docs/loss.md from a result of `gradret bench loss`: python benchmarks/loss_table.py FILE.json"""

import json
import sys
from pathlib import Path

LISTS = (
    *("cross_entropy", "InfoNCE", "gradret W1", "gradret W1, raw grades", "PyTorch W1", "PyTorch W1, by level"),
    *("torch.compile W1", "POT W1", "gradret W2", "gradret W2, raw grades", "PyTorch W2", "PyTorch W2, by level"),
    *("torch.compile W2", "POT W2", "SyCL Gaussian", "gradret Gaussian"),
)


def make_tables(result: dict) -> list[str]:
    """Lines of two Markdown tables: losses by shape of the lists, and losses from embeddings."""
    found = {("x".join(map(str, row["shape"])), row["row"]): row for row in result["rows"]}
    shapes = list(dict.fromkeys(shape for shape, _ in found))
    lists = [shape for shape in shapes if shape.count("x") == 1]
    lines = [
        "| forward + backward, ms (peak MiB) | " + " | ".join(shape.replace("x", " x ") for shape in lists) + " |",
        "|---|" + "---:|" * len(lists),
    ]
    lines += [f"| {name} | " + " | ".join(show(found[shape, name]) for shape in lists) + " |" for name in LISTS]
    for shape in (shape for shape in shapes if shape.count("x") == 2):
        lines += ["", f"| from embeddings, {shape.replace('x', ' x ')} | forward + backward, ms | peak MiB |"]
        lines += ["|---|---:|---:|"]
        for (other, name), row in found.items():
            if other == shape:
                measured = "– | –" if row["skipped"] else f"{row['both_ms']['median']:.0f} | {row['peak_mib']:.0f}"
                lines.append(f"| {name} | {measured} |")
    return lines


def show(row: dict) -> str:
    if row["skipped"]:
        return "–"
    peak = row["peak_mib"]
    return f"{row['both_ms']['median']:.3g}" + (f" ({peak:.0f})" if peak is not None and peak >= 1 else "")


if __name__ == "__main__":
    print("\n".join(make_tables(json.loads(Path(sys.argv[1]).read_text()))))
