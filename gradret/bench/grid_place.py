"""Tables of a grid's TOML file, read as the types of FitSettings; what is wrong names its place."""

import types
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints

from gradret.console import GradretError
from gradret.settings import FitSettings

NOT_HERE = {  # fields of FitSettings that the grid sets in each run
    "data": "name it in [data]",
    "seed": "runs take the seeds 0 to seeds - 1",
    "exclude": "it is one for all runs, under [settings]",
}
HINTS = get_type_hints(FitSettings)
WIDER = {float: (int,)}  # what else a type takes
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "nothing"}


class Place:
    """A part of the file, for messages: where it stands and how what it holds is read.

    Raises: GradretError `FILE: [where]: ...` from every method.
    """

    def __init__(self, path: str | Path, where: str, content: object):
        self.path, self.where = path, where
        if not isinstance(content, dict):
            raise self.error(f"expected a table, got {content!r}")
        self.content = content

    def error(self, message: str) -> GradretError:
        return GradretError(f"{self.path}: {self.where}: {message}" if self.where else f"{self.path}: {message}")

    def know(self, *names: str) -> None:
        """Refuse keys that are not among `names`."""
        for key in self.content:
            if key not in names:
                near = get_close_matches(key, names, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"use {', '.join(names)}"
                raise self.error(f"'{key}' is not known; {hint}")

    def read(self, key: str, hint, default=None):
        """The value of a key, as the type `hint`; `default` where it is not given."""
        return self.convert(key, self.content[key], hint) if key in self.content else default

    def convert(self, key: str, value, hint):
        """A TOML value as a type of FitSettings: whole numbers become floats, lists tuples, where these are meant."""
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        for kind in kinds:
            if get_origin(kind) is tuple:
                item = get_args(kind)[0]
                if isinstance(value, list) and all(type(v) in (item, *WIDER.get(item, ())) for v in value):
                    return tuple(map(item, value))
            elif type(value) in (kind, *WIDER.get(kind, ())):
                return kind(value)
        words = [
            f"a list of {WORDS[get_args(kind)[0]][2:]}s" if get_origin(kind) is tuple else WORDS[kind] for kind in kinds
        ]
        words = [word for word, kind in zip(words, kinds, strict=True) if kind is not type(None)]
        raise self.error(f"{key}: expected {' or '.join(words)}, got {value!r}")

    def read_count(self, key: str, default: int | None = None) -> int | None:
        """A whole number above 0."""
        count = self.read(key, int, default)
        if count is not None and count < 1:
            raise self.error(f"{key}: expected a whole number above 0, got {count}")
        return count

    def read_names(self, key: str, known: Mapping, default: Sequence[str] = ()) -> tuple[str, ...]:
        """A list of names defined elsewhere in the file, each once; empty only where that is the default."""
        names = self.read(key, tuple[str, ...], tuple(default))
        if default and not names:
            raise self.error(f"{key}: names none; leave it out for all there are")
        for name in names:
            self.find(key, name, known)
        if len(set(names)) < len(names):
            raise self.error(f"{key}: a name stands there twice in {list(names)}")
        return names

    def find(self, key: str, name: str | None, known: Mapping) -> str | None:
        """A name, refused unless it is None or defined."""
        if name is not None and name not in known:
            raise self.error(f"{key}: '{name}' is not defined; there are {', '.join(known) or 'none'}")
        return name

    def read_settings(self, allowed: Sequence[str], besides: Sequence[str] = ()) -> dict:
        """The fields of FitSettings among `allowed`; keys in `besides` are left to others."""
        for key, advice in NOT_HERE.items():
            if key in self.content and key not in (*allowed, *besides):
                raise self.error(f"'{key}' can not be set here; {advice}")
        self.know(*besides, *allowed)
        return {k: self.convert(k, v, HINTS[k]) for k, v in self.content.items() if k not in besides}
