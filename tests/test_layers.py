"""Imports point down only, and the core never loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradret

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(gradret.__file__).parent
# A file imports only from files below it.
LAYERS = """
    __main__ cli cli_fit cli_gen cli_loss cli_bench cli_bench_fit gen_options options
    fit_speed fit_rivals fit_memory fit_report fit_lists
    engine_speed random_gguf generate summary judge journal queries endpoint chat_protocol llama llama_sampler
    llama_model hub_gguf checks prompts replies scales llm export
    quality_page quality_report quality_compare quality_charts quality_tables significance report
    bench grid_inputs grid_rows grid_file grid_place grid speed memory timers workloads rivals
    train trainer endings job card capacity mining mining_pool mining_spec bm25 checkpoint board claim snapshot
    interpolation contexts objective batches adapters evaluation retrieve runs embedders encoder_load encoder chunks
    encoder_config hub processes peers
    losses retrieval_loss tiles ops pairs reference grades kernels
    mix sources collection ir_home qrels lists console settings versions resident launch files imports errors
""".split()
CORE = [
    "errors",
    "files",
    "settings",
    "console",
    "lists",
    "collection",
    "ir_home",
    "qrels",
    "sources",
    "mix",
    "hub",
    "options",
    "cli",
    "cli_fit",
]
CORE += [
    "scales",
    "prompts",
    "replies",
    "checks",
    "llm",
    "queries",
    "journal",
    "judge",
    "summary",
    "generate",
    "export",
]
CORE += [
    "launch",
    "resident",
    "cli_bench",
    "cli_bench_fit",
    "cli_gen",
    "gen_options",
    "hub_gguf",
    "random_gguf",
    "mining_spec",
    "bm25",
    "grid",
    "grid_file",
    "grid_place",
    "grid_rows",
    "quality_tables",
]


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [node.module] if node.module != "gradret" else [f"gradret.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("gradret.")}
    return found - {"__version__", "_kernels"}  # the compiled module is nobody's layer


def test_every_module_has_a_layer():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {*LAYERS, "__init__"}


@pytest.mark.parametrize("name", LAYERS)
def test_imports_point_down(name):
    allowed = set(LAYERS[LAYERS.index(name) + 1 :])
    assert imported_modules(PACKAGE / f"{name}.py") <= allowed


def test_the_core_loads_without_torch():
    code = "import sys; import " + ", ".join(f"gradret.{m}" for m in CORE) + "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_type_checkers_see_the_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.asname) for node in block.body for alias in node.names}
    assert seen == {(f"gradret.{home}", name) for name, home in gradret._HOMES.items()}


@pytest.mark.slow
def test_types_of_the_public_modules():
    """mypy, strict, on the modules that pyproject.toml names: those of the public names among them."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"] is True
    assert {f"gradret/{home}.py" for home in gradret._HOMES.values()} <= {*settings["files"]}
    result = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_public_names_resolve():
    for name in gradret.__all__:
        assert getattr(gradret, name).__name__ == name
