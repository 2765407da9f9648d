"""Weights between those that an encoder began with and those that training gave it."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradret.console import GradretError
from gradret.data.lists import hash64
from gradret.distributed import Processes
from gradret.encoder.model import Encoder
from gradret.files import drop_after, link_file, read_object, read_steps, replace_json, sync_file, versions
from gradret.settings import AUTO, FitSettings

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

RUN_FILE = "gradret.json"
FREE_SETTINGS = ("chunk",)  # a resumed run may change them, because memory may be another
CONTENT_NAMES = {"data": "training data", "encoder": "encoder to start from", "pool": "documents to mine from"}


class Claim:
    """A run's directory, claimed for these settings and held until close().

    DIR/gradret.json says whose it is: settings, fingerprints, versions, and whether the run has finished.

    Args:
        directory: made if needed; must be empty or hold this very run.
        settings: JSON-serialisable; must equal those of the run found there.
        content: fingerprints of what the settings name, "data" and "encoder"; likewise.
        resume: go on with the run found there; without it any run found is an error.
        precision: what the setting comes to on this machine; likewise, if it is known of both.
    Raises: GradretError.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        settings: dict,
        content: dict[str, str],
        *,
        resume: bool,
        precision: str | None = None,
    ):
        self.directory = Path(directory)
        self._checkpoints = self.directory / "checkpoints"
        self._lock()  # before anything is read: who had it may have written just now
        try:
            self._claim(settings, content, resume, precision)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        """Make the directory and hold it: two runs would overwrite each other's checkpoints."""
        self._held: int | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._no_access(error) from error
        if fcntl is None:
            return
        self._held = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise GradretError(f"{self.directory}: another process is training here; wait for it or stop it") from None
        except OSError:  # a network file system without locks
            pass

    def close(self) -> None:
        """Let go of the directory."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _claim(self, settings: dict, content: dict[str, str], resume: bool, precision: str | None) -> None:
        found = self._read_record()
        if not found:
            # A run killed while it claimed the directory leaves no more than its half-written claim.
            if any(p.name != "gradret.part" for p in self.directory.iterdir()):
                raise GradretError(f"{self.directory}: is not empty and holds no gradret run; choose another --out")
            self._record = {"settings": settings, "content": content, "precision": precision}
            self._record |= {"run": _name_run(settings, content), "versions": versions(), "finished": False}
        else:
            self._record = found
            before = found["settings"]["precision"]
            if AUTO in (before, settings.get("precision")) and precision == found.get("precision"):
                settings = settings | {"precision": before}  # the same, however it is spelled
            changed = self._check(settings, content, resume, precision)
            # The name stays: with options that came later it would be another.
            name = _name_run(settings, content) if changed else found["run"]
            self._record = found | {"run": name, "settings": settings, "content": content, "precision": precision}
            for stale in self.directory.glob("mined-*.npy*") if changed else ():
                stale.unlink()
        if found != self._record and not self.finished:
            self._write_record()
        for folder in self._find_checkpoints():
            if self.finished or folder.suffix == ".part":
                shutil.rmtree(folder)

    def _read_record(self) -> dict:
        """What gradret.json says, {} before there is one; options that came later have what was done then."""
        path = self.directory / RUN_FILE
        found = read_object(path)
        for name, kind in (("settings", dict), ("content", dict), ("finished", bool)) if found else ():
            if not isinstance(found.get(name), kind):
                raise GradretError(f"{path}: has no '{name}'; choose another --out")
        if found:
            found.setdefault("run", _name_run(found["settings"], found["content"]))
            found["settings"] = json.loads(json.dumps(asdict(FitSettings()))) | found["settings"]
        return found

    def _write_record(self) -> None:
        try:
            replace_json(self.directory / RUN_FILE, self._record)
        except OSError as error:
            raise self._no_access(error) from error

    def _no_access(self, error: OSError) -> GradretError:
        return GradretError(f"{self.directory}: can not be written ({error.strerror})")

    def _check(self, settings: dict, content: dict, resume: bool, precision: str | None) -> bool:
        """Refuse another run, or this one where it is not to be resumed.

        Returns: whether it is another all the same, where one ended before its first step: there is nothing to lose.
        """
        before, found = self._record["settings"], self._record["content"]
        changed = [k for k in settings if settings[k] != before.get(k) and k not in FREE_SETTINGS]
        computed = self._record.get("precision") or precision
        if not (resume or self.finished or self.last_checkpoint or (self.directory / "metrics.jsonl").exists()):
            return bool(changed) or content != found or computed != precision
        if (
            computed != precision
            and before["precision"] == AUTO
            and set(changed) <= {"precision"}
            and not self.finished
        ):
            raise GradretError(
                f"{self.directory}: was computed in {computed}, and --precision {settings['precision']} is {precision} "
                f"here; continue it with --precision {computed}"
            )
        if changed:
            name = changed[0]
            raise GradretError(
                f"{self.directory}: holds another run, with {name}={_show(before.get(name))} where "
                f"{_show(settings[name])} is asked for; choose another --out"
            )
        for name, fingerprint in content.items():
            if fingerprint != found[name]:
                raise GradretError(
                    f"{self.directory}: the {CONTENT_NAMES[name]} has changed since this run began; "
                    "restore it, or start again in another --out"
                )
        if not resume:
            how = "a finished" if self.finished else "an unfinished"
            advice = "choose another --out" + ("" if self.finished else ", or continue it with --resume")
            raise GradretError(f"{self.directory}: holds {how} run with these settings; {advice}")
        return False

    @property
    def name(self) -> str:
        """What the run's files are marked with."""
        return self._record["run"]

    @property
    def finished(self) -> bool:
        """Whether the encoder has been saved."""
        return self._record["finished"]

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint's directory."""
        return max((folder for folder in self._find_checkpoints() if folder.suffix != ".part"), default=None)

    def _find_checkpoints(self) -> list[Path]:
        """Whole and torn ones; whatever else lies there is nobody's."""
        return [path for path in self._checkpoints.glob("step-*") if path.is_dir()]


def _name_run(settings: dict, content: dict[str, str]) -> str:
    kept = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    return f"{hash64(json.dumps([kept, content], sort_keys=True)):016x}"


def _show(value: object) -> str:
    return json.dumps(value)


FOLDER = "tensorboard"
CURVES = {"metrics.jsonl": "train", "dev.jsonl": "dev"}


def check_board() -> None:
    """Whether TensorBoard's writer is installed. Raises: GradretError that says how to."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "tensorboard":
            raise
        raise GradretError("--tensorboard needs the package tensorboard: pip install 'gradret[tensorboard]'") from None


def has_board(directory: Path) -> bool:
    """Whether a run there has written curves before."""
    return (directory / FOLDER).is_dir()


class Board:
    """The curves of the run in `directory`, those of its earlier steps first."""

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / FOLDER
        shutil.rmtree(folder, ignore_errors=True)  # steps after the last checkpoint are done again
        self._writer = SummaryWriter(str(folder))
        for name in CURVES:
            for record in read_steps(directory / name):
                self.add(name, record)

    def add(self, name: str, record: dict) -> None:
        """A line of metrics.jsonl or dev.jsonl as points of curves."""
        for key, value in record.items():
            if key != "step":
                self._writer.add_scalar(f"{CURVES[name]}/{key}", value, record["step"])
        if name == "dev.jsonl":
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """What a run changes: the parameters that are trained (a tied one once) and, unless some are frozen, buffers."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    whole = len(trained) == sum(1 for _ in module.parameters())
    return trained + list(module.named_buffers()) * whole


def get_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of named_tensors, without gradients."""
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
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)


def share_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Give the optimizers of all processes what the first one's knows, tensor by tensor."""
    found = get_optimizer(module, optimizer)
    forms = processes.broadcast({place: (value.shape, value.dtype) for place, value in found.items()})
    if not processes.is_first:
        put_optimizer(
            module, optimizer, {place: torch.empty(shape, dtype=dtype) for place, (shape, dtype) in forms.items()}
        )
        found = get_optimizer(module, optimizer)
    processes.share_tensors(list(found.values()))


@dataclass
class RunState:
    """Where a run stands: steps done, the best dev value and its step, the step last evaluated on dev.

    waited: dev measurements since the best one. chunk: of gradient caching, as found for "auto".
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    dev_step: int | None = None
    waited: int = 0
    chunk: int | None = None


class Run(Claim):
    """A run's directory, claimed, with what the run has done so far. See Claim for the arguments.

    Attributes:
        board: gets every line that is appended, too; None for none.
    """

    board: Board | None = None

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        super().close()

    def read_lines(self, name: str) -> list[dict]:
        """The lines of metrics.jsonl or dev.jsonl; [] before there are any."""
        return read_steps(self.directory / name)

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
        drop_after(self.directory / "metrics.jsonl", state.step)
        drop_after(self.directory / "dev.jsonl", -1 if state.dev_step is None else state.dev_step)
        return state

    def _read_tensors(self, path: Path) -> dict[str, torch.Tensor]:
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

    def append(self, name: str, record: dict) -> None:
        """Append one JSON line to a file of the run."""
        try:
            with open(self.directory / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.board is not None:
                self.board.add(name, record)
        except OSError as error:
            raise self._write_error(error) from error

    def read_array(self, name: str) -> np.ndarray | None:
        """An array of the run, None if it is not there whole."""
        try:
            return np.load(self.directory / name)
        except (OSError, EOFError, ValueError):
            return None

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Keep an array until the run has finished."""
        part = self.directory / f"{name}.part"
        try:
            with open(part, "wb") as file:
                np.save(file, array)
            sync_file(part)
            os.replace(part, self.directory / name)
        except OSError as error:
            raise self._write_error(error) from error

    def save_checkpoint(self, encoder: Encoder, optimizer: torch.optim.Optimizer, state: RunState) -> None:
        """Write a checkpoint beside the last one, then put it in its place in one rename.

        Raises: GradretError when it can not be written; the last one is then untouched.
        """
        previous = self.last_checkpoint
        target = self._checkpoints / step_name(state.step)
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
        if state.best_step is not None:
            source = (
                checkpoint / "model.safetensors" if state.best_step == state.step else previous / "best.safetensors"
            )
            if source != checkpoint / "best.safetensors":
                link_file(source, checkpoint / "best.safetensors")
        replace_json(checkpoint / "state.json", vars(state) | {"run": self.name})

    def _write_error(self, error: Exception) -> GradretError:
        last = self.last_checkpoint
        kept = f"the last checkpoint, {last.name}, is intact" if last else "there is no checkpoint yet"
        reason = getattr(error, "strerror", None) or str(error)
        return GradretError(
            f"{self.directory}: could not be written ({reason}); {kept}: make room and run again with --resume"
        )

    def restore_best(self, encoder: Encoder, state: RunState) -> None:
        """Put the weights that were best on dev into the encoder, if dev was measured."""
        if state.best_step is not None and state.best_step != state.step:
            put_tensors(encoder, self._read_tensors(self.last_checkpoint / "best.safetensors"))

    def finish(self, encoder: Encoder, write_card: Callable[[Path], None]) -> None:
        """Save the encoder and its card, and drop the checkpoints."""
        try:
            encoder.save(self.directory)
            write_card(self.directory)
            for file in self.directory.rglob("*"):
                if file.is_file():
                    sync_file(file)
            self._record["finished"] = True
            self._write_record()
        except Exception as error:  # the tokenizer's library raises nothing narrower on a full disk
            raise self._write_error(error) from error
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        for stale in self.directory.glob("mined-*.npy*"):
            stale.unlink()


def step_name(step: int) -> str:
    """The name of a step's checkpoint; names sort as steps do."""
    return f"step-{step:09d}"


class Interpolation:
    """The way from the weights that an encoder has now to those that it will be given, and how far to go it.

    Of low-rank adapters, whose product is 0 at the beginning, the product goes so far.

    Args:
        encoder: as it is before training; its trained weights are copied to the CPU, unless `share` is 1.
        share: of the way, above 0; 1 for all of it.
    Source: Wortsman et al. (2022), Robust fine-tuning of zero-shot models, arXiv 2109.01903.
    """

    def __init__(self, encoder: Encoder, share: float):
        self.share = share
        self._start = _copy(encoder) if share < 1 else {}

    def apply(self, encoder: Encoder) -> None:
        """Take the encoder's weights back from where they are to `share` of the way, in place."""
        parameters = dict(encoder.named_parameters())
        with torch.no_grad():
            for name, start in self._start.items():
                parameters[name].copy_(torch.lerp(start.to(parameters[name].device), parameters[name], self.share))

    @contextmanager
    def applied(self, encoder: Encoder) -> Iterator[None]:
        """While the encoder has those weights; after that it has its own again."""
        own = _copy(encoder) if self._start else {}
        try:
            self.apply(encoder)
            yield
        finally:
            parameters = dict(encoder.named_parameters())
            with torch.no_grad():
                for name, tensor in own.items():
                    parameters[name].copy_(tensor)


def _copy(encoder: Encoder) -> dict[str, Tensor]:
    # B A is what an adapter adds: B, which starts at 0, takes it back alone.
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad and ".lora_A." not in name
    }
