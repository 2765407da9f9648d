"""Options of the command line: shown in groups, made from what settings declare, and the types of their values."""

from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from difflib import get_close_matches
from functools import partial
from math import inf
from typing import Any

import click
from click.shell_completion import CompletionItem

from gradret.console import GradretError
from gradret.settings import EMPTY, LOSSES, RUN, find_declaration, list_types, parse_setting, spell_option

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
METAVARS = {bool: "yes|no", int: "INTEGER", float: "NUMBER", str: "TEXT", tuple: "NAME,..."}


class Option(click.Option):
    """An option of a group, a heading under which --help shows it.

    Attributes:
        described: what --help tells at its end of the values that the option takes: rows of two columns.
        empty: whether an empty text is a value; else it is refused, as of a shell's variable that is not set.
    """

    def __init__(
        self,
        *names: Any,
        group: str = RUN,
        described: list[tuple[str, str]] | None = None,
        empty: bool = False,
        **more: Any,
    ):
        super().__init__(*names, **more)
        self.group, self.described, self.empty = group, described, empty

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        if not self.empty and (value == "" or (isinstance(value, list | tuple) and "" in value)):
            raise click.BadParameter(EMPTY, ctx, self)
        return super().type_cast_value(ctx, value)


class Command(click.Command):
    """A command whose help has its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        described = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                group = getattr(parameter, "group", RUN)  # click's own --help has none
                groups.setdefault(group, []).append(record)
            if rows := getattr(parameter, "described", None):
                described[f"Values of {parameter.opts[0]}"] = rows
        last = {RUN: groups.pop(RUN)}
        for heading, rows in (groups | last | described).items():
            with formatter.section(heading):
                formatter.write_dl(rows)


class Parsed(click.ParamType):  # type: ignore[type-arg]  # which has arguments from click 8.4 on
    """What a function makes of the text; it raises ValueError or GradretError where it cannot."""

    def __init__(self, name: str, parse: Callable[[str], Any], choices: Iterable[str] = ()) -> None:
        self.name, self._parse, self._choices = name, parse, tuple(choices)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value  # a default
        try:
            return self._parse(value)
        except (ValueError, GradretError) as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(choice) for choice in self._choices if choice.startswith(incomplete)]


def option(*names: str, group: str = RUN, **more: Any) -> Decorator:
    """An option that --help shows in a group, with its default where that says something."""
    return click.option(*names, cls=Option, group=group, **{"show_default": "default" in more, **more})


def options(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in the order in which they are shown."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def setting_options(kind: type, *, only: Iterable[str] = (), without: Iterable[str] = ()) -> Decorator:
    """The options of a settings class, or some of them; None or () is given where one is not spelled out."""
    made = []
    for declared in fields(kind):
        declaration = find_declaration(declared)
        if not declaration.has_option or declared.name in without or (only and declared.name not in only):
            continue
        name, more = spell_option(declared), {"group": declaration.group, "help": tell(declared)}
        if list_types(declared) == [bool]:
            names = f"{name}/--no-{name[2:]}" if declared.default else name
            made.append(option(names, is_flag=True, default=None, show_default=False, **more))
        else:
            many = list_types(declared) == [tuple]
            choices = LOSSES if declared.name == "loss" else map(str, declaration.choices)
            type_ = click.STRING if many else Parsed(declared.name, partial(parse_setting, declared), choices)
            metavar, empty = show_metavar(declared), declaration.empty
            made.append(option(name, multiple=many, type=type_, metavar=metavar, empty=empty, **more))
    return options(*made)


def set_option(kind: type, group: str | None = None, *, without: Iterable[str] = ()) -> Decorator:
    """--set NAME=VALUE, for the settings without an option of their own, all of them or those of a group."""
    rare = {
        declared.name: declared
        for declared in fields(kind)
        if not find_declaration(declared).has_option
        and declared.name not in without
        and group in (None, find_declaration(declared).group)
    }
    rest = () if group else (declared for declared in fields(kind) if find_declaration(declared).has_option)
    own = {declared.name: spell_option(declared) for declared in rest}

    def parse(text: str) -> tuple[str, Any]:
        name, equals, value = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"'{text}' is not NAME=VALUE, such as {next(iter(rare))}=VALUE")
        if name in own:
            raise ValueError(f"'{name}' has an option of its own: {own[name]}")
        if name not in rare:
            near = get_close_matches(name, [*rare, *own], n=1)
            hint = f"did you mean {own.get(near[0], near[0])}?" if near else "see the end of --help"
            raise ValueError(f"'{name}' is not a setting here; {hint}")
        try:
            return name, parse_setting(rare[name], value)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    return option(
        "--set",
        "assigned",
        multiple=True,
        type=Parsed("assignment", parse, [f"{name}=" for name in rare]),
        metavar="NAME=VALUE",
        help="One of the settings at the end of this help; again for more of them.",
        described=[(f"{name}={show_metavar(declared)}", tell(declared)) for name, declared in rare.items()],
    )


def collect_settings(given: dict[str, Any]) -> dict[str, Any]:
    """What was spelled out, with the options of settings and with --set."""
    found = {name: value for name, value in given.items() if value not in (None, ()) and name != "assigned"}
    found |= dict(given.get("assigned", ()))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def make_settings(kind: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The settings. Raises: click.UsageError."""
    try:
        return kind(**given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def show_metavar(declared: Field[Any]) -> str:
    """What stands for the value in --help."""
    declaration = find_declaration(declared)
    return declaration.metavar or "|".join(map(str, declaration.choices)) or METAVARS[list_types(declared)[0]]


def tell(declared: Field[Any]) -> str:
    """The help of a setting, its default, and its range."""
    declaration, default = find_declaration(declared), declared.default
    if default in (None, ()):
        shown = declaration.unset
    elif isinstance(default, bool):
        shown = "yes" if default else None
    else:
        shown = ", ".join(default) if isinstance(default, tuple) else str(default)
    notes = [f"default: {shown}"] if shown else []
    if declaration.range is not None and not declaration.range.holds(inf):  # others say nothing new
        notes.append(declaration.range.words)
    return f"{declaration.help} [{'; '.join(notes)}]" if notes else declaration.help
