"""How fast does gradret's llama.cpp engine write beside a loop over llama-cpp-python's chat completion?

    python -m benchmarks.speed.gen [--model FILE.gguf]

The same model (by default random weights of Qwen2-0.5B's size), prompts, sampler and token cap: without a grammar, with
the grammars of `gradret gen`, and so beside a process that keeps a core busy. Rounds of the two take turns. Prints
tokens/s and writes OUT/gen.json, of which `python -m benchmarks.tables gen` makes its table. Needs
the extra gen.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from benchmarks.script import Script, command_line
from benchmarks.speed.random_gguf import write_random_gguf
from gradret.bench.loss import find_percentiles
from gradret.console import GradretError, say
from gradret.data.sources import find_path
from gradret.files import open_folder, versions, write_json
from gradret.generate.engine import Reply, Request
from gradret.generate.llama import LlamaEngine, count_cores, locate_gguf
from gradret.generate.prompts import TREC_DL, Prompts
from gradret.generate.queries import Query, read_queries
from gradret.settings import SAMPLE, GenSettings

# What is measured: its name, whether replies are held to their grammar, whether something else runs.
CONDITIONS = (
    ("without grammar", False, False),
    ("with grammar", True, False),
    ("beside a busy process", True, True),
)
LOOP = "create_chat_completion loop"
SAME_PROMPT = 0.02  # both sides may count a prompt's tokens this differently, by how they cut the text


def measure_engine(
    model: Path,
    prompts: Prompts,
    queries: Sequence[Query],
    settings: GenSettings,
    *,
    sequences: int = 16,
    max_tokens: int = 256,
    loop_queries: int = 3,
    repeats: int = 3,
    gpu_layers: int = -1,
    threads: int | None = None,
) -> dict:
    """Time both on the same model, prompts, sampler and token cap, under each of CONDITIONS.

    Rounds of the loop and of the engine take turns; the ratio is taken within each round. The loop keeps what prompts
    share in its cache, too, and has a process of its own, where OpenMP waits as the user has it.

    Args:
        queries: each round of the engine takes them all, one of the loop the next `loop_queries` of them;
            each asks for a plan and the passages.
        max_tokens: the longest reply; a model with random weights always writes so many without a grammar.
    Returns: a JSON-serialisable document; "rows" hold tokens_per_s, "ratios" the engine's over the loop's, each as
        median, p20 and p80 over the rounds.
    Raises: GradretError when the two do not read the same prompts.
    """
    from llama_cpp import __version__ as llama_version

    threads = threads or count_cores()
    options = {"gpu_layers": gpu_layers, "threads": threads}
    options |= {"temperature": settings.temperature, "top_p": settings.top_p}
    kinds = [replace(kind, max_tokens=max_tokens) for kind in prompts.kinds()]
    engine = LlamaEngine(model, kinds, sequences=sequences, **options)
    shared = [sum(map(len, engine.model.split_prompt(kind.messages))) for kind in kinds]  # tokens of each kind's prompt
    loop = ChatLoop(model, engine.context_tokens, **options)
    written = []
    for query in queries:
        thing = " ".join(query.text.split()[:2])
        written += [prompts.plan(query, part, 1, engine.identity, thing) for part in prompts.plan_parts]
        written += [prompts.write(query, grade, query.text, 1, engine.identity) for grade in prompts.scale.grades]
    loop_requests = loop_queries * len(written) // len(queries)
    rows, ratios = [], {}
    try:
        for name, held, beside in CONDITIONS:
            requests = [replace(r, max_tokens=max_tokens, form=r.form if held else None) for r in written]
            _check_same_prompts(engine, loop, requests)
            speeds: dict[str, list[float]] = {LOOP: [], "gradret": []}
            for repeat in range(repeats):
                turn = [requests[(repeat * loop_requests + i) % len(requests)] for i in range(loop_requests)]
                for system in speeds:
                    with busy_process(beside):
                        began = time.perf_counter()
                        if system == LOOP:
                            tokens = loop.run(turn)
                        else:
                            tokens = sum(reply.tokens for reply in run_engine(engine, requests))
                        speeds[system].append(tokens / (time.perf_counter() - began))
                    say(f"{name}, round {repeat + 1} of {repeats}: {system} {speeds[system][-1]:.1f} tokens/s")
            rows += [{"system": s, "condition": name, "tokens_per_s": _spread(v)} for s, v in speeds.items()]
            ratios[name] = _spread(np.divide(speeds["gradret"], speeds[LOOP]))
    finally:
        engine.close()
        loop.close()
    return {
        "versions": versions() | {"llama_cpp_python": llama_version},
        "model": engine.identity,
        "model_bytes": model.stat().st_size,
        "sequences": sequences,
        "threads": threads,
        "queries": len(queries),
        "loop_queries": loop_queries,
        "repeats": repeats,
        "max_tokens": max_tokens,
        "prompt_tokens": dict(zip((*prompts.plan_parts, "write"), shared, strict=True)),
        "rows": rows,
        "ratios": ratios,
    }


class ChatLoop:
    """benchmarks/speed/chat_loop.py in a process of its own."""

    def __init__(self, model: Path, context: int, *, gpu_layers: int, threads: int, **sampling: float):
        given = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}  # which gradret sets for itself
        command = [sys.executable, "-m", "benchmarks.speed.chat_loop"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=given, cwd=Path(__file__).parents[2], **pipes)
        loading = {"model_path": str(model.resolve()), "n_ctx": context, "n_gpu_layers": gpu_layers}
        self._send(loading | {"n_threads": threads, "n_threads_batch": threads, "sampling": sampling})

    def _send(self, message: dict) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def count_tokens(self, request: Request) -> tuple[int, int]:
        """How many tokens of a prompt it reads, and of a reply it writes."""
        grammar = request.form.grammar if request.form else None
        chat = {"messages": list(request.messages), "max_tokens": request.max_tokens, "seed": request.seed % 2**31}
        self._send(chat | {"grammar": grammar})
        line = self._process.stdout.readline()
        if not line:
            raise GradretError("the loop over llama-cpp-python has ended; see the lines above")
        usage = json.loads(line)
        return usage["prompt_tokens"], usage["completion_tokens"]

    def run(self, requests: Sequence[Request]) -> int:
        """Tokens written for them."""
        return sum(self.count_tokens(request)[1] for request in requests)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """A process that keeps one core busy meanwhile, if it is wanted."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def run_engine(engine: LlamaEngine, requests: Sequence[Request]) -> Iterator[Reply]:
    """The engine's replies, in the order they are done."""
    waiting = list(reversed(requests))
    while True:
        while waiting and engine.free:
            engine.submit(waiting.pop())
        replies = engine.collect()
        if not replies:
            return
        yield from replies


def _check_same_prompts(engine: LlamaEngine, loop: ChatLoop, requests: Sequence[Request]) -> None:
    """Both warm up on one short reply, and have read equally many tokens for it."""
    short = [Request(0, r.messages, 1, r.seed) for r in requests[:1]]
    (ours,), (theirs, _) = run_engine(engine, short), loop.count_tokens(short[0])
    if abs(ours.prompt_tokens - theirs) > SAME_PROMPT * theirs:
        raise GradretError(
            f"the engine reads {ours.prompt_tokens} tokens where llama-cpp-python reads {theirs} for the "
            "same chat; measure with a model whose chat template both read alike"
        )


def _spread(values) -> dict:
    return {name: round(value, 2) for name, value in find_percentiles(values).items()}


def format_engine_speed(document: dict) -> str:
    """The document of measure_engine as lines for a terminal."""
    lines = [f"{document['model']}: {document['sequences']} sequences, {document['max_tokens']} tokens per reply"]
    lines.append(f"{'tokens/s':<30}" + "".join(f"{name:>24}" for name in document["ratios"]))
    for system in dict.fromkeys(row["system"] for row in document["rows"]):
        speeds = [row["tokens_per_s"]["median"] for row in document["rows"] if row["system"] == system]
        lines.append(f"{system:<30}" + "".join(f"{speed:>24.1f}" for speed in speeds))
    lines.append(f"{'gradret / loop':<30}" + "".join(f"{r['median']:>24.2f}" for r in document["ratios"].values()))
    return "\n".join(lines)


POSITIVE = click.IntRange(min=1)


@click.command(cls=Script)
@click.option("--model", metavar="FILE|HUB_REPO[:FILE]", help="[default: random weights, Qwen2-0.5B's size]")
@click.option("--sequences", default=16, show_default=True, type=POSITIVE, help="Replies the engine writes at once.")
@click.option("--queries", default=32, show_default=True, type=click.IntRange(1, 96), help="Of the sample, per round.")
@click.option("--loop-queries", default=3, show_default=True, type=POSITIVE, help="The same for the loop.")
@click.option("--max-tokens", default=256, show_default=True, type=POSITIVE, help="Of a reply.")
@click.option("--repeats", default=3, show_default=True, type=POSITIVE, help="Rounds.")
@click.option("--gpu-layers", default=-1, show_default=True, type=click.IntRange(min=-1), help="-1 for all.")
@click.option("--threads", type=POSITIVE, help="[default: the processor's cores]")
@click.option("--out", default="gradret-bench", show_default=True, type=click.Path(), help="Where gen.json goes.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def main(model, queries, out, as_json, **given):
    """Time the llama.cpp engine against a loop over llama-cpp-python's create_chat_completion."""
    open_folder(out, "gen.json")
    settings = GenSettings()
    prompts = Prompts(settings, TREC_DL)
    sample = read_queries(str(find_path(SAMPLE)))
    with tempfile.TemporaryDirectory(prefix="gradret-") as temporary:
        path = locate_gguf(model) if model else Path(temporary, "random.gguf")
        if not model:  # a vocabulary with the prompts' words, so that they are as long as in a real one
            texts = [prompts.instructions, Path(find_path(SAMPLE)).read_text(encoding="utf-8")]
            write_random_gguf(path, words=sorted(set(re.findall("[A-Za-z]+", " ".join(texts)))))
        command = {"command": command_line("benchmarks.speed.gen")}
        result = command | measure_engine(path, prompts, sample[:queries], settings, **given)
    write_json(Path(out, "gen.json"), result)
    click.echo(json.dumps(result) if as_json else format_engine_speed(result))
    say(f"written: {out}/gen.json")


if __name__ == "__main__":
    main()
