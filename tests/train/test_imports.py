"""What gradret keeps other packages from loading."""

import os
import subprocess
import sys

import pytest

from gradret.train.memory import fresh_environment

BM25 = "from gradret.train.mining import import_bm25s; import_bm25s('x').BM25"
POT = """
import torch
from gradret.bench.workloads import pot_wasserstein
assert pot_wasserstein(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), 1, 1.0) == 0.5
"""


@pytest.mark.parametrize(("package", "use"), [("bm25s", BM25), ("ot", POT)])
def test_jax_is_not_loaded(tmp_path, package, use):
    pytest.importorskip(package)
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("print('loaded')")
    environment = {name: value for name, value in fresh_environment().items() if not name.startswith("POT_")}
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(tmp_path)])
    script = f"{use}\nprint('used')\nimport jax"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["used", "loaded"]), done.stderr
