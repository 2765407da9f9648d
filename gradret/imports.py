"""Importing a package without others that it would load where they are installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Imports in here do not find these packages; what was loaded before stays.

    JAX is such a one: bm25s and POT load it for functions not used here, and it takes most of a GPU's memory at once.
    For the rest of the process they then go on without it.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
