"""The package from its sdist and wheel, with and without a compiler."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

_spec = importlib.util.spec_from_file_location("build_kernels", REPOSITORY / "build_kernels.py")
build_kernels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_kernels)


def run(*command, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout: setuptools makes a folder beside setup.py and removes it, while other tests read it."""
    ignored = shutil.ignore_patterns(".*", "build", "gradret-*", "results")
    return shutil.copytree(REPOSITORY, tmp_path_factory.mktemp("source") / "gradret", ignore=ignored)


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    """The sdist, unpacked somewhere else: what it lacks is not found by accident."""
    folder = tmp_path_factory.mktemp("sdist")
    result = run("-m", "build", "--sdist", "--outdir", folder, source, cwd=folder)
    assert result.returncode == 0, result.stdout
    (archive,) = folder.glob("gradret-*.tar.gz")
    with tarfile.open(archive) as opened:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python below 3.11.4 has none
        opened.extractall(folder / "unpacked", **safe)
    (root,) = (folder / "unpacked").iterdir()
    return root


def install_wheel(sdist: Path, folder: Path, **environment) -> tuple[Path, str]:
    """Builds a wheel of the sdist and unpacks it into a folder for PYTHONPATH; also what the build printed."""
    result = run("-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, sdist, cwd=folder, **environment)
    assert result.returncode == 0, result.stdout
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder / "site")
    return folder / "site", result.stdout


def run_loss_tests(site: Path, *arguments):
    """The losses' tests on the package in `site`."""
    # Where the checkout is installed in place, its kernels would be found for a package that has none.
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__editable__')]\n"
    )
    code = "import gradret, gradret.loss.kernels as k; print(gradret.__file__, getattr(k.compiled, '__file__', None))"
    printed = run("-c", code, cwd=site.parent, PYTHONPATH=str(site)).stdout
    where = printed.splitlines()[-1].split()
    kernels = [str(path) for path in site.glob("gradret/_kernels.*")] or ["None"]
    assert where == [str(site / "gradret" / "__init__.py"), *kernels], printed
    tests = [REPOSITORY / "tests" / "loss" / f"test_{name}.py" for name in ("losses", "kernels", "retrieval_loss")]
    flags = ["-q", "-rs", "-p", "no:cacheprovider", "--rootdir", REPOSITORY / "tests", *arguments]
    return run("-m", "pytest", *tests, *flags, cwd=site.parent, PYTHONPATH=str(site))


@pytest.mark.nightly
def test_sdist_and_wheel_pass_the_loss_tests(sdist, tmp_path):
    site, _ = install_wheel(sdist, tmp_path, GRADRET_CUDA="0")
    assert list(site.glob("gradret/_kernels.*"))
    result = run_loss_tests(site)
    assert result.returncode == 0, result.stdout
    skipped = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert [line for line in skipped if "this processor has no" not in line] == []


@pytest.mark.nightly
def test_without_a_compiler_the_losses_run_in_pytorch(sdist, tmp_path):
    site, output = install_wheel(sdist, tmp_path, CXX="no-such-compiler")
    lines = [line for line in output.splitlines() if line.strip().startswith("gradret: ")]
    assert len(lines) == 1
    assert "no C++ compiler is found; the losses will run in PyTorch" in lines[0]
    assert not list(site.glob("gradret/_kernels.*"))
    result = run_loss_tests(site, "-k", "torch or hand_worked or reductions or any_length")
    assert result.returncode == 0, result.stdout


def test_cuda_as_a_must_fails_without_nvcc(source):
    code = (
        "import runpy, sys, build_kernels; build_kernels.find_nvcc = lambda: None\n"
        "sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run("-c", code, cwd=source, GRADRET_CUDA="1")
    assert result.returncode != 0
    assert "GRADRET_CUDA=1, but nvcc is not found" in result.stdout.splitlines()[-1]


def test_cuda_says_auto_1_or_0(source):
    result = run("setup.py", "-q", "build_ext", cwd=source, GRADRET_CUDA="yes")
    assert result.returncode != 0
    assert "GRADRET_CUDA must be auto, 0 or 1, got 'yes'" in result.stdout


def test_architectures_that_nvcc_does_not_know(monkeypatch):
    monkeypatch.setattr(build_kernels, "run", lambda command: "sm_80\nsm_90\nsm_121\n")
    assert build_kernels.choose_architectures(Path("nvcc")) == ["80", "90"]
    monkeypatch.setenv("GRADRET_CUDA_ARCHITECTURES", "90; 121")
    assert build_kernels.choose_architectures(Path("nvcc")) == ["90", "121"]
    monkeypatch.setenv("GRADRET_CUDA_ARCHITECTURES", "42")
    with pytest.raises(build_kernels.BuildFailed, match="does not know 42"):
        build_kernels.choose_architectures(Path("nvcc"))


def test_this_installation_has_kernels():
    """Where a compiler is, an installation without kernels is a broken build."""

    from gradret.loss import kernels

    if not any(shutil.which(c) for c in ("g++", "c++", "clang++")):
        pytest.skip("no C++ compiler here")
    assert kernels.compiled is not None, kernels.missing
    if build_kernels.find_nvcc() and os.environ.get("GRADRET_CUDA", "auto") != "0":
        assert kernels.compiled.CUDA_ARCHITECTURES, "nvcc is here, but the installation has no CUDA side"


def test_arm64_compiles(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ here")
    defines = ["-DGRADRET_ISA=kBaselineRows", '-DGRADRET_ISA_NAME="baseline"', "-Wno-psabi", "-fopenmp", "-Werror"]
    for name in ("cpu_rows.cpp", "cpu.cpp"):
        source = REPOSITORY / "csrc" / name
        build_kernels.run([compiler, *build_kernels.CPU_FLAGS.split(), *defines, "-c", str(source), "-o", "/dev/null"])


def test_a_failed_build_in_place_leaves_no_older_module(source):
    stale = source / "gradret" / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"of other sources")
    result = run("setup.py", "-q", "build_ext", "--inplace", cwd=source, CXX="no-such-compiler")
    assert result.returncode == 0, result.stdout
    assert "no C++ compiler is found; the losses will run in PyTorch" in result.stdout
    assert not stale.exists()


def test_clang_compiles(tmp_path):
    compiler = shutil.which("clang++")
    if compiler is None:
        pytest.skip("no clang++ here")
    for isa in build_kernels.X86_ROWS.values() if platform.machine() == "x86_64" else [""]:
        defines = ["-DGRADRET_ISA=kBaselineRows", '-DGRADRET_ISA_NAME="baseline"', "-Werror", *isa.split()]
        source = REPOSITORY / "csrc" / "cpu_rows.cpp"
        build_kernels.run([compiler, *build_kernels.CPU_FLAGS.split(), *defines, "-c", str(source), "-o", "/dev/null"])
