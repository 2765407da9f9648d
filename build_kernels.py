"""Builds gradret._kernels from csrc/: GCC or clang and, when found, nvcc, through ninja; no torch.

GRADRET_CUDA=auto (default) compiles the CUDA side if nvcc is found and goes on without it if that fails; 1 makes it a
must; 0 leaves it out. GRADRET_CUDA_ARCHITECTURES names the architectures, "80;90" for example. A machine without a
compiler gets a package whose losses run in PyTorch.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"
CUDA_ARCHITECTURES = "75;80;90;100;120"
CPU_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"
X86_ROWS = {
    "Baseline": "",
    "Avx2": "-mavx2 -mfma",
    "Avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
}


class BuildFailed(Exception):
    """What could not be built, in one line."""


class BuildKernels(build_ext):
    """build_ext that runs ninja on csrc/."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "kernels"
        wanted = os.environ.get("GRADRET_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"GRADRET_CUDA must be auto, 0 or 1, got '{wanted}'")
        try:
            nvcc = None if wanted == "0" else find_nvcc()
            if nvcc is None and wanted == "1":
                raise SystemExit("GRADRET_CUDA=1, but nvcc is not found: put it on PATH or set CUDA_HOME")
            compiler = find_compiler()
            try:
                compile_module(compiler, build, target, nvcc)
            except BuildFailed as error:
                if nvcc is None or wanted == "1":
                    raise
                print(f"gradret: {error}; building without CUDA", file=sys.stderr)
                compile_module(compiler, build, target, None)
        except BuildFailed as error:
            target.unlink(missing_ok=True)  # of an earlier build
            if wanted == "1":
                raise SystemExit(f"gradret: {error}") from None
            # A package that runs beats a build that fails; `gradret bench loss` names the path that serves a call.
            print(f"gradret: {error}; the losses will run in PyTorch", file=sys.stderr)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):
        built = [ext for ext in self.extensions if Path(self.build_lib, self.get_ext_filename(ext.name)).exists()]
        for ext in self.extensions:
            if ext not in built:  # what an earlier build left there does not fit these sources
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        self.extensions, extensions = built, self.extensions
        super().copy_extensions_to_source()
        self.extensions = extensions


def find_compiler() -> str:
    """A C++ compiler's command. Raises: BuildFailed."""
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None or shutil.which(shlex.split(compiler)[0]) is None:
        raise BuildFailed("no C++ compiler is found")
    return compiler


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for nvcc in [*(Path(home, "bin", "nvcc") for home in homes if home), shutil.which("nvcc"), DEFAULT_NVCC]:
        if nvcc and Path(nvcc).exists():
            return Path(nvcc)
    return None


def find_toolkit(nvcc: Path) -> Path:
    """The folder that nvcc belongs to, by its own word: what is on PATH may be a wrapper."""
    found = re.search(r"^#\$ TOP=(.+)$", run([str(nvcc), "--dryrun", "-c", "none.cu"]), re.MULTILINE)
    return Path(found.group(1)).resolve() if found else nvcc.resolve().parents[1]


def choose_architectures(nvcc: Path) -> list[str]:
    """Those asked for that this nvcc knows, ascending."""
    known = set(re.findall(r"sm_(\d+)", run([str(nvcc), "--list-gpu-code"])))
    named = os.environ.get("GRADRET_CUDA_ARCHITECTURES")
    wanted = {a.strip() for a in (named or CUDA_ARCHITECTURES).split(";") if a.strip()}
    if not all(a.isdecimal() for a in wanted):
        raise BuildFailed(f"GRADRET_CUDA_ARCHITECTURES must be numbers such as 80;90, got '{named}'")
    chosen = sorted(wanted, key=int)
    unknown = [a for a in chosen if a not in known]
    if named and unknown:
        raise BuildFailed(f"GRADRET_CUDA_ARCHITECTURES: {nvcc} does not know {';'.join(unknown)}")
    return [a for a in chosen if a in known]


def compile_module(compiler: str, build: Path, target: Path, nvcc: Path | None) -> None:
    """Compile and link everything to `target`. Raises: BuildFailed."""
    try:
        import pybind11
    except ImportError:
        raise BuildFailed("pybind11 is not installed") from None
    ninja = shutil.which("ninja")
    if ninja is None:
        raise BuildFailed("ninja is not found")
    build.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (build / "build.ninja").write_text(write_rules(compiler, build, target, nvcc, pybind11.get_include()))
    try:
        run([ninja, "-C", str(build)])
    except BuildFailed as error:
        raise BuildFailed(f"compiling csrc/ failed\n{error}\ncompiling csrc/ failed, see above") from None


def write_rules(compiler: str, build: Path, target: Path, nvcc: Path | None, pybind11_include: str) -> str:
    """The text of build.ninja."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = CPU_FLAGS + (" -DGRADRET_X86" if x86 else "")
    if "clang" not in run([*shlex.split(compiler), "--version"]):
        flags += " -Wno-psabi"  # vectors wider than the baseline's registers never leave a file
    openmp = "-fopenmp" if has_openmp(compiler, build) else ""
    flags += " " + os.environ.get("CXXFLAGS", "")
    includes = f"-isystem {quote(pybind11_include)} -isystem {quote(sysconfig.get_paths()['include'])}"
    objects = []
    lines = [
        f"cxx = {compiler}",
        "rule cxx\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx -shared $in -o $out $flags",
    ]

    def add(rule: str, source: str, name: str, flags: str) -> None:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: {rule} {escape(SOURCES / source)}\n  flags = {flags}")

    for name, isa in (X86_ROWS if x86 else {"Baseline": ""}).items():
        defines = f"-DGRADRET_ISA=k{name}Rows -DGRADRET_ISA_NAME='\"{name.lower()}\"'"
        add("cxx", "cpu_rows.cpp", f"rows_{name.lower()}", f"{flags} {isa} {defines}")
    add("cxx", "cpu.cpp", "cpu", f"{flags} {openmp}")
    link = openmp + (" -undefined dynamic_lookup" if sys.platform == "darwin" else " -Wl,--exclude-libs,ALL")
    bind = f"{flags} {includes}"
    if nvcc is not None:
        toolkit = find_toolkit(nvcc)
        architectures = choose_architectures(nvcc)
        if not architectures:
            raise BuildFailed(f"{nvcc} knows none of the architectures {CUDA_ARCHITECTURES}")
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")  # for later ones
        runtime = next(iter(toolkit.glob("**/libcudart_static.a")), None)
        if runtime is None:
            raise BuildFailed(f"{toolkit} holds no libcudart_static.a")
        command = f"{quote(nvcc)} $flags -MD -MF $out.d -c $in -o $out"
        lines.append(f"rule nvcc\n  command = {command}\n  depfile = $out.d\n  deps = gcc")
        # nvcc takes no launcher and no flags with its host compiler; then it finds one itself.
        host = f"-ccbin {compiler}" if len(shlex.split(compiler)) == 1 else ""
        options = f"-std=c++17 -O3 --threads 2 {host} -Xcompiler -fPIC,-fvisibility=hidden"
        add("nvcc", "launch.cu", "launch", f"{options} {' '.join(codes)}")
        bind += f" -DGRADRET_CUDA='\"{';'.join(architectures)}\"'"
        link += f" -L{quote(runtime.parent)} -lcudart_static -ldl -lrt -lpthread"
    add("cxx", "bind.cpp", "bind", bind)
    lines.append(f"build {escape(target)}: link {' '.join(objects)}\n  flags = {link}")
    return "\n".join(lines) + "\n"


def has_openmp(compiler: str, build: Path) -> bool:
    probe = build / "openmp.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    try:
        run([*shlex.split(compiler), "-fopenmp", str(probe), "-o", str(build / "openmp")])
    except BuildFailed:
        return False
    return True


def quote(path: str | Path) -> str:
    """For a command in build.ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: Path) -> str:
    """For a path that ninja itself reads; it quotes $in and $out."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run(command: list[str]) -> str:
    """What it printed. Raises: BuildFailed with that."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
    except OSError as error:
        raise BuildFailed(f"{command[0]}: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise BuildFailed(error.stdout.strip() or f"{command[0]} failed") from None
