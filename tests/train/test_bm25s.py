"""What bm25s brings along: JAX, which is kept from a GPU's memory."""

import pytest
from forked import run_forked


def test_jax_does_not_take_a_gpus_memory_because_bm25s_loads_it(tmp_path):
    pytest.importorskip("bm25s")
    (tmp_path / "jax").mkdir()
    told = "import os; print('memory taken at once:', os.environ.get('XLA_PYTHON_CLIENT_PREALLOCATE', 'true'))"
    (tmp_path / "jax" / "__init__.py").write_text(told)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, os.path.dirname(__file__))\n"
        "os.environ.pop('XLA_PYTHON_CLIENT_PREALLOCATE', None)\n"
        "from gradret.train.mining import import_bm25s; import_bm25s().BM25; import jax"
    )
    done = run_forked([script])
    assert (done.returncode, done.stdout) == (0, "memory taken at once: false\n"), done.stderr
