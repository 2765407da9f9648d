"""The tables of docs/training.md from a result of `gradret bench fit`: python benchmarks/fit_table.py FILE.json"""

import json
import sys
from pathlib import Path

CACHED = ", cached"


def make_tables(result: dict) -> list[str]:
    """Lines of Markdown tables: passages a second without and with gradient caching, ratios, and peak memory."""
    speeds = {row["row"]: f"{row['passages_per_s']['median']:.1f}" for row in result["rows"]}
    size = f"{result['batch_lists']} lists of {result['passages_a_list']} a batch"
    lines = [f"| passages/s, {size} | plain | gradient caching, {result['chunk']} at once |", "|---|---:|---:|"]
    for name in (name for name in speeds if not name.endswith(CACHED)):
        lines.append(f"| {name} | {speeds[name]} | {speeds[name + CACHED]} |")
    for ratios, form in ((result["speed_ratios"], "{:.2f}"), (result["step_ratios"], "{:.3f}")):
        what = "" if ratios is result["speed_ratios"] else ", time of a step"
        for name, ratio in ratios.items():
            ours, theirs = name.split(" / ")
            if not ours.endswith(CACHED):
                both = (ratio, ratios[f"{ours}{CACHED} / {theirs}{CACHED}"])
                lines.append(f"| {name}{what} | " + " | ".join(form.format(r["median"]) for r in both) + " |")
    if result["memory"]:
        lines += ["", "| one step | peak MiB | ratio |", "|---|---:|---:|"]
        for row in result["memory"]:
            how = f"gradient caching, {row['chunk']} at once" if row["chunk"] else "plain"
            lines.append(f"| {row['lists']} lists, {how} | {row['peak_mib']:.0f} | {row['ratio']:.2f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(make_tables(json.loads(Path(sys.argv[1]).read_text()))))
