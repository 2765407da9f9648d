"""ir_datasets: its datasets by id, and one process at a time while it downloads and unpacks them."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, islice
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps processes apart
    fcntl = None  # type: ignore[assignment]

from gradret.console import say
from gradret.errors import GradretError

LOCK_FILE = "gradret.lock"


def load_dataset(dataset_id: str) -> Any:
    """The dataset of an ir_datasets id. Raises: GradretError when there is none."""
    import ir_datasets

    ir_datasets.log.easy().logger().setLevel(logging.WARNING)  # its notes on opened files would bury ours
    try:
        return ir_datasets.load(dataset_id)
    except KeyError:
        raise GradretError(
            f"{dataset_id}: no such file or directory, and not an ir_datasets id; "
            "check the path, or pick an id from https://ir-datasets.com"
        ) from None


def iterate_documents(dataset: Any) -> Iterator[Any]:
    """The documents of a dataset of ir_datasets in its order. Raises: GradretError as `reading` does."""
    with reading(dataset):
        with unpacking():
            documents = iter(dataset.docs_iter())
            first = list(islice(documents, 1))
        yield from chain(first, documents)


def open_store(dataset: Any) -> Any:
    """The documents of a dataset of ir_datasets by id: its docs_store. Raises: GradretError as `reading` does."""
    with reading(dataset), unpacking():
        store = dataset.docs_store()
        store.get_many([])  # which for most datasets makes its files, where they are not yet
    return store


@contextmanager
def reading(dataset: Any) -> Iterator[None]:
    """Turns what ir_datasets raises in here into one line.

    That is anything: a download that failed, a licence not yet accepted, and for a damaged file what its format's
    library raises.
    """
    try:
        yield
    except Exception as error:
        import ir_datasets

        raise GradretError(
            f"{dataset.dataset_id()}: ir_datasets could not provide it ({type(error).__name__}: {error}); if a file "
            f"is damaged that it downloaded or made in {ir_datasets.util.home_path()}, remove that file"
        ) from error


@contextmanager
def unpacking() -> Iterator[None]:
    """While no other process is in here: two that have ir_datasets make the same files at once damage them.

    Not to be nested. Without a lock where the home can not be written to, on a network file system that has none, and
    on Windows.
    """
    import ir_datasets

    path = ir_datasets.util.home_path() / LOCK_FILE
    with ExitStack() as stack:
        if fcntl is not None:
            with suppress(OSError):
                file = stack.enter_context(open(path, "a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say(f"waiting for another process that downloads or unpacks a collection ({path})")
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield
