"""Imports point down only, folder by folder, and what needs no torch loads none."""

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
# From the bottom up: a folder or module imports its own files and what stands in lines below its own. Within a folder
# no circle is allowed.
LAYERS = """
    console
    settings files
    data loss distributed
    encoder
    evaluation
    train generate integrations
    bench
    look
    options
    cli
    __main__
"""
TORCHLESS = """
    cli options settings console files data.lists data.collections data.sources data.export encoder.directory
    generate.engine generate.queries generate.plans generate.prompts generate.replies generate.journal generate.run
    generate.endpoint
""".split()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, as `folder.module`.

    Nothing imports the package's root, which loads everything, nor benchmarks/, which is not installed.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        modules = [node.module] if isinstance(node, ast.ImportFrom) else names
        assert [m for m in modules if m == "gradret" or m.split(".")[0] == "benchmarks"] == [], path
        found |= {name.removeprefix("gradret.") for name in names if name.startswith("gradret.")}
    return found


def test_imports_point_down():
    rank = {name: number for number, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
    imports = {module_name(p): imported_modules(p) for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"}
    imports = {name: (found & imports.keys()) - {name} for name, found in imports.items()}
    folder = {name: name.split(".")[0] for name in imports}
    assert {*folder.values()} == {*rank}
    upward = [
        f"{name} imports {other}"
        for name, found in imports.items()
        for other in found
        if folder[name] != folder[other] and rank[folder[name]] <= rank[folder[other]]
    ]
    assert upward == []
    done: set[str] = set()
    while ready := [name for name in imports if name not in done and imports[name] <= done]:
        done.update(ready)
    assert [name for name in imports if name not in done] == []  # what is left is part of a circle


def test_what_needs_no_torch_loads_none():
    code = "import sys; import " + ", ".join(f"gradret.{m}" for m in TORCHLESS) + "; sys.exit('torch' in sys.modules)"
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
    homes = {f"gradret/{home.replace('.', '/')}.py" for home in gradret._HOMES.values()}
    assert homes <= {*settings["files"]}
    result = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_public_names_resolve():
    for name in gradret.__all__:
        assert getattr(gradret, name).__name__ == name
