"""A run's directory: whose it is, what has been measured, the last checkpoint, and in the end the encoder.

    gradret.json           settings, fingerprints, versions, and whether the run has finished
    metrics.jsonl          a line per step
    dev.jsonl              a line per dev measurement
    mined-0.npy            the passages mined in a round, until the run has finished
    checkpoints/step-...   the last one: model, optimizer and best .safetensors, state.json
    tensorboard/           curves, where they are wanted

A process may be killed at any moment. So what replaces something is written beside it and renamed, a checkpoint is
whole before the one before it goes, and lines of steps after the last checkpoint are dropped when a run is resumed.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradret.console import GradretError, needing
from gradret.data.lists import hash64
from gradret.distributed import Processes
from gradret.encoder.model import Encoder
from gradret.files import PART, read_object, replacing, sync_file, versions, write_json, writing
from gradret.settings import FitSettings

RUN_FILE, LOCK_FILE, BOARD = "gradret.json", "gradret.lock", "tensorboard"
METRICS, DEV = "metrics.jsonl", "dev.jsonl"
CURVES = {METRICS: "train", DEV: "dev"}  # the groups of TensorBoard's curves
FREE_SETTINGS = ("chunk",)  # a resumed run may change them, because memory may be another
CONTENT_NAMES = {"data": "training data", "encoder": "encoder to start from", "pool": "documents to mine from"}


@dataclass
class RunState:
    """Where a run stands: steps done, the best dev value and its step, the step last evaluated on dev.

    waited: dev measurements since the best one. chunk: of gradient caching, as found for "auto". share: of the way from
    the encoder's own weights, of what is to be saved; held_out_means: share -> the mean that chose it.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    dev_step: int | None = None
    waited: int = 0
    chunk: int | None = None
    share: float | None = None
    held_out_means: dict[str, float] = field(default_factory=dict)


class RunDirectory:
    """A run's directory, claimed for its settings and held until close().

    Args:
        directory: made if needed; must be empty or hold this very run.
        settings: must equal those of the run found there; its precision is the one that "auto" comes to.
        content: fingerprints of what the settings name: "data", "encoder" and, with mining, "pool"; likewise.
        resume: go on with the run found there; without it any run found that has begun is an error.
    Raises: GradretError; what fails later leaves the last checkpoint as it is.
    """

    def __init__(
        self, directory: str | os.PathLike[str], settings: FitSettings, content: dict[str, str], *, resume: bool
    ):
        self.directory = Path(directory)
        self._checkpoints = self.directory / "checkpoints"
        self._record: dict[str, Any] = {}
        self._board: Any = None
        self._lock = FileLock(self.directory / LOCK_FILE)
        self._hold()  # before anything is read: who had it may have written just now
        try:
            self._claim(json.loads(json.dumps(asdict(settings))), content, resume)
        except BaseException:
            self.close()
            raise

    def _hold(self) -> None:
        """Make the directory and lock it: two runs would overwrite each other's checkpoints."""
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise GradretError(
                    f"{self.directory}: another process is training here; wait for it or stop it"
                ) from None
            except NotImplementedError:  # a network file system without locks
                pass

    def close(self) -> None:
        """Let go of the directory."""
        if self._board is not None:
            self._board.close()
        if self.finished or not (self.directory / RUN_FILE).exists():
            # No trace in a saved encoder or in what is somebody else's. Who opened the file before it went finds that
            # out when it locks it, and what it would then read there is finished.
            with suppress(OSError):  # Windows removes no file that is open, and there the release does it
                (self.directory / LOCK_FILE).unlink()
        self._lock.release()

    def _claim(self, settings: dict[str, Any], content: dict[str, str], resume: bool) -> None:
        found = self._record = self._read_record()
        if found:
            if resume or self.finished or self.last_checkpoint or (self.directory / METRICS).exists():
                self._refuse_another(settings, content)
                if not resume:
                    how = "a finished" if self.finished else "an unfinished"
                    advice = "choose another --out" + ("" if self.finished else ", or continue it with --resume")
                    raise GradretError(f"{self.directory}: holds {how} run with these settings; {advice}")
        elif any(path.name not in (f"{RUN_FILE}{PART}", LOCK_FILE) for path in self.directory.iterdir()):
            # A run killed while it claimed the directory leaves no more than its half-written claim.
            raise GradretError(f"{self.directory}: is not empty and holds no gradret run; choose another --out")
        # A run that ended before its first step has nothing to lose: another one may take its place.
        self.name = _name_run(settings, content)
        if found and self.name != _name_run(found["settings"], found["content"]):
            self._remove_mined()
        self._record = {"versions": versions(), "finished": False} | found
        self._record |= {"settings": settings, "content": content}
        if found != self._record and not self.finished:
            with writing(self.directory):
                write_json(self.directory / RUN_FILE, self._record)
        for folder in self._find_checkpoints():
            if self.finished or folder.suffix == ".part":
                shutil.rmtree(folder)

    def _read_record(self) -> dict[str, Any]:
        """What gradret.json says, {} before there is one."""
        path = self.directory / RUN_FILE
        found = read_object(path)
        for name in ("settings", "content", "finished") if found else ():
            if name not in found:
                raise GradretError(f"{path}: has no '{name}'; choose another --out")
        return found

    def _refuse_another(self, settings: dict[str, Any], content: dict[str, str]) -> None:
        """Refuse to go on as another run than the one that is here. Raises: GradretError."""
        before = self._record["settings"]
        changed = [k for k in settings if settings[k] != before.get(k) and k not in FREE_SETTINGS]
        if changed:
            name = changed[0]
            raise GradretError(
                f"{self.directory}: holds another run, with {name}={json.dumps(before.get(name))} where "
                f"{json.dumps(settings[name])} is asked for; choose another --out"
            )
        for name, fingerprint in content.items():
            if fingerprint != self._record["content"].get(name):
                raise GradretError(
                    f"{self.directory}: the {CONTENT_NAMES[name]} has changed since this run began; "
                    "restore it, or start again in another --out"
                )

    @property
    def finished(self) -> bool:
        return bool(self._record.get("finished"))

    @property
    def share(self) -> float:
        """Of the way from the encoder's own weights, of the saved ones."""
        return float(self._record["share"])

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint's directory."""
        return max((folder for folder in self._find_checkpoints() if folder.suffix != ".part"), default=None)

    def checkpoint_of(self, step: int) -> Path:
        """Where a step's is, or will be; names sort as steps do."""
        return self._checkpoints / f"step-{step:09d}"

    def _find_checkpoints(self) -> list[Path]:
        """Whole and torn ones; whatever else lies there is nobody's."""
        return [path for path in self._checkpoints.glob("step-*") if path.is_dir()]

    # What a run appends and keeps beside its checkpoints

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of METRICS or DEV; [] before there are any."""
        return read_steps(self.directory / name)

    def append(self, name: str, record: dict[str, Any]) -> None:
        try:
            with open(self.directory / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self._board is not None:
                self._draw(name, record)
        except OSError as error:
            raise self._write_error(error) from error

    def open_board(self) -> None:
        """From now on draw TensorBoard's curves, too, those of the steps that are there first."""
        shutil.rmtree(self.directory / BOARD, ignore_errors=True)  # steps after the last checkpoint are done again
        self._board = import_board()(str(self.directory / BOARD))
        for name in CURVES:
            for record in self.read_lines(name):
                self._draw(name, record)

    def _draw(self, name: str, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step":
                self._board.add_scalar(f"{CURVES[name]}/{key}", value, record["step"])
        if name == DEV:
            self._board.flush()

    def read_array(self, name: str) -> np.ndarray | None:
        """An array of the run, None if it is not there whole."""
        try:
            return np.load(self.directory / name)
        except (OSError, EOFError, ValueError):
            return None

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Keep an array until the run has finished."""
        try:
            with replacing(self.directory / name) as file:
                np.save(file, array)
        except OSError as error:
            raise self._write_error(error) from error

    def _remove_mined(self) -> None:
        for stale in self.directory.glob("mined-*.npy*"):
            stale.unlink()

    # Checkpoints

    def save_checkpoint(self, encoder: Encoder, optimizer: torch.optim.Optimizer, state: RunState) -> None:
        """Write a checkpoint beside the last one, then put it in its place in one rename.

        Raises: GradretError when it cannot be written; the last one is then untouched.
        """
        previous = self.last_checkpoint
        target = self.checkpoint_of(state.step)
        part = target.with_suffix(".part")
        try:
            if previous == target:  # this step's weights are there; what changed is what dev made of them
                self._record_best(state, target, target)
                return
            part.mkdir(parents=True)
            owner = {"run": self.name}
            save_file(get_tensors(encoder), part / "model.safetensors", owner)
            save_file(get_optimizer(encoder, optimizer), part / "optimizer.safetensors", owner)
            self._record_best(state, part, previous)
            for file in part.iterdir():
                sync_file(file)
            os.rename(part, target)
            sync_file(self._checkpoints)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise self._write_error(error) from error
        for stale in self._find_checkpoints():
            if stale != target:
                shutil.rmtree(stale)

    def _record_best(self, state: RunState, checkpoint: Path, previous: Path | None) -> None:
        """Put the best weights so far and then the state, which names their step, into a checkpoint."""
        best = checkpoint / "best.safetensors"
        if state.best_step == state.step:
            link_file(checkpoint / "model.safetensors", best)
        elif state.best_step is not None and previous is not None and previous != checkpoint:
            link_file(previous / "best.safetensors", best)
        write_json(checkpoint / "state.json", vars(state) | {"run": self.name})

    def restore(self, encoder: Encoder, optimizer: torch.optim.Optimizer) -> RunState:
        """Put the last checkpoint into encoder and optimizer; metrics written after it are dropped."""
        checkpoint = self.last_checkpoint
        state = RunState()
        if checkpoint is not None:
            found = read_object(checkpoint / "state.json")
            self._check_owner(checkpoint / "state.json", found.pop("run", None))
            try:
                state = RunState(**found)
                put_tensors(encoder, self._read_tensors(checkpoint / "model.safetensors"))
                put_optimizer(encoder, optimizer, self._read_tensors(checkpoint / "optimizer.safetensors"))
                if state.best_step is not None:  # needed at the end
                    with self._open_tensors(checkpoint / "best.safetensors"):
                        pass
            except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
                raise GradretError(
                    f"{checkpoint}: is damaged ({type(error).__name__}: {error}); put it back from a copy, or remove "
                    "it to start from the beginning"
                ) from error
        drop_after(self.directory / METRICS, state.step)
        drop_after(self.directory / DEV, -1 if state.dev_step is None else state.dev_step)
        return state

    def restore_best(self, encoder: Encoder, state: RunState) -> None:
        """Put the weights that were best on dev into the encoder, if dev was measured."""
        checkpoint = self.last_checkpoint
        if checkpoint is not None and state.best_step is not None and state.best_step != state.step:
            put_tensors(encoder, self._read_tensors(checkpoint / "best.safetensors"))

    def _read_tensors(self, path: Path) -> dict[str, Tensor]:
        with self._open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    @contextmanager
    def _open_tensors(self, path: Path) -> Iterator[Any]:
        with safe_open(path, "pt") as file:  # fails where the file is shorter than it says
            self._check_owner(path, (file.metadata() or {}).get("run"))
            yield file

    def _check_owner(self, path: Path, run: str | None) -> None:
        if run != self.name:
            raise GradretError(
                f"{path}: is missing, or belongs to a run with another model, loss, data or other settings; put this "
                "run's own checkpoint back, or remove its directory to start from the beginning"
            )

    def finish(self, encoder: Encoder, write_card: Callable[[Path], None], share: float) -> None:
        """Save the encoder and its card, write down its share of the way, and drop the checkpoints."""
        try:
            encoder.save(self.directory)
            write_card(self.directory)
            for file in self.directory.rglob("*"):
                if file.is_file():
                    sync_file(file)
            self._record |= {"finished": True, "share": share}
            write_json(self.directory / RUN_FILE, self._record)
        except Exception as error:  # the tokenizer's library raises nothing narrower on a full disk
            raise self._write_error(error) from error
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        self._remove_mined()

    def _write_error(self, error: Exception) -> GradretError:
        last = self.last_checkpoint
        kept = f"the last checkpoint, {last.name}, is intact" if last else "there is no checkpoint yet"
        reason = getattr(error, "strerror", None) or str(error)
        return GradretError(
            f"{self.directory}: could not be written ({reason}); {kept}: make room and run again with --resume"
        )


def import_board() -> Any:
    """TensorBoard's writer. Raises: GradretError when it is not installed."""
    with needing("--tensorboard", "tensorboard", "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def _name_run(settings: dict[str, Any], content: dict[str, str]) -> str:
    kept = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    return f"{hash64(json.dumps([kept, content], sort_keys=True)):016x}"


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file in which every line belongs to a step; [] when the file is not there.

    A torn line ends them: a kill leaves one. Raises: GradretError when a line has no step.
    """
    records = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines() if path.is_file() else (), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise GradretError(f"{path}:{number}: expected a JSON object with a step, got {line[:50]}; remove the line")
        records.append(record)
    return records


def drop_after(path: Path, step: int) -> None:
    """Rewrite a file of JSON lines without those of later steps and without a torn last line.

    Raises: GradretError, see read_steps.
    """
    if path.is_file():
        lines = [json.dumps(record) + "\n" for record in read_steps(path) if record["step"] <= step]
        with replacing(path) as file:
            file.write("".join(lines).encode())


def link_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system has no hard links, in one piece."""
    part = target.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    os.replace(part, target)


# The tensors of a checkpoint


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """What a run changes: the parameters that are trained (a tied one once) and, unless some are frozen, buffers."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    whole = len(trained) == sum(1 for _ in module.parameters())
    return [*trained, *(module.named_buffers() if whole else ())]


def get_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in named_tensors(module)}


def put_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite the tensors of named_tensors with those that get_tensors gave."""
    with torch.no_grad():
        for name, target in named_tensors(module):
            target.copy_(tensors[name])


def get_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer knows of each parameter, as `parameter:key`."""
    return {
        f"{name}:{key}": value.contiguous()
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def put_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer what get_optimizer gave."""
    parameters = dict(module.named_parameters())
    for place, value in tensors.items():
        name, key = place.rsplit(":", 1)
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameters[name]][key] = value if key == "step" else value.to(parameters[name].device)


def share_restored(module: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Give all processes the weights and the optimizer that the first one has restored, tensor by tensor."""
    processes.share_tensors([tensor.data for _, tensor in named_tensors(module)])
    known = get_optimizer(module, optimizer)
    forms = processes.broadcast({place: (value.shape, value.dtype) for place, value in known.items()})
    if not processes.is_first:
        empty = {place: torch.empty(shape, dtype=dtype) for place, (shape, dtype) in forms.items()}
        put_optimizer(module, optimizer, empty)
    processes.share_tensors(list(get_optimizer(module, optimizer).values()))
