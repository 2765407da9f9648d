"""What bm25s brings along: JAX, which is kept from a GPU's memory."""

import os
import subprocess
import sys

import pytest

from gradret.train.memory import fresh_environment


def test_jax_does_not_take_a_gpus_memory_because_bm25s_loads_it(tmp_path):
    pytest.importorskip("bm25s")
    (tmp_path / "jax").mkdir()
    told = "import os; print('memory taken at once:', os.environ.get('XLA_PYTHON_CLIENT_PREALLOCATE', 'true'))"
    (tmp_path / "jax" / "__init__.py").write_text(told)
    environment = {k: v for k, v in fresh_environment().items() if not k.startswith("XLA_")}
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(tmp_path)])
    script = "from gradret.train.mining import import_bm25s; import_bm25s().BM25; import jax"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "memory taken at once: false\n"), done.stderr
