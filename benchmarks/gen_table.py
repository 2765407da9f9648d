"""The table of docs/generate.md from a result of `gradret bench gen`: python benchmarks/gen_table.py FILE.json"""

import json
import sys
from pathlib import Path


def make_table(result: dict) -> list[str]:
    """Lines of a Markdown table: tokens a second by system, without and with a grammar, and their ratio."""
    lines = [f"| tokens/s, {result['sequences']} sequences | without grammar | with grammar |", "|---|---:|---:|"]
    for system in dict.fromkeys(row["system"] for row in result["rows"]):
        speeds = [row["tokens_per_s"]["median"] for row in result["rows"] if row["system"] == system]
        lines.append(f"| {system} | " + " | ".join(f"{speed:.1f}" for speed in speeds) + " |")
    ratios = " | ".join(f"{ratio['median']:.2f}" for ratio in result["ratios"].values())
    return [*lines, f"| gradret / loop | {ratios} |"]


if __name__ == "__main__":
    print("\n".join(make_table(json.loads(Path(sys.argv[1]).read_text()))))
