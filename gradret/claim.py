"""Whose a run's directory is: held by one process at a time, and kept from runs with other settings or data."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from gradret.errors import GradretError
from gradret.files import read_object, replace_json
from gradret.lists import hash64
from gradret.settings import AUTO, EARLIER, FitSettings
from gradret.versions import versions

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
            found["settings"] = json.loads(json.dumps(asdict(FitSettings()))) | EARLIER | found["settings"]
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
