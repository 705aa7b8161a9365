"""Flags from settings: every field of a settings model becomes a flag, with its default and its help from there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from understudy.recipe import settings_from

Settings = type[BaseModel]
_LISTS = dict.fromkeys(("data", "train", "test"), "SPEC") | dict.fromkeys(("ratios", "end_ratio"), "R,..")
_LISTS |= {"tasks": "T,..", "methods": "M,..", "seeds": "S,.."}


def settings_of(function: Callable[..., Any]) -> dict[str, Settings]:
    """Return the parameters of a function that are settings, by name."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return {p.name: p.annotation for p in parameters if _is_settings(p.annotation)}


def flags(models: Iterable[Settings]) -> dict[str, inspect.Parameter]:
    """Return the flags of several settings; a name that two of them share is one flag for both."""
    found: dict[str, inspect.Parameter] = {}
    helps: dict[str, str] = {}
    for model in models:
        for name, field in model.model_fields.items():
            kind, metavar = _type(name, field)
            text = f"{helps[name]}; {field.description}" if name in helps else str(field.description)
            helps[name] = text
            option = typer.Option(f"--{name.replace('_', '-')}", help=text, metavar=metavar)
            value = list(field.default) if isinstance(field.default, tuple) else field.default
            found[name] = keyword(name, Annotated[kind, option], value)
    return found


def keyword(name: str, annotation: Any, value: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """Return a parameter that is given by name."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


def build(models: Mapping[str, Settings], given: dict[str, Any]) -> dict[str, BaseModel]:
    """Take the flags of each settings model out of what was given, and build it.

    Raises:
        UnderstudyError: a value out of range.
    """
    built = {}
    for parameter, model in models.items():
        mine = {name: given[name] for name in model.model_fields}
        built[parameter] = settings_from(model, None, mine)  # type: ignore[type-var]  # of settings, as `models` says
    for model in models.values():
        for name in model.model_fields:
            given.pop(name, None)
    return built


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type(name: str, field: FieldInfo) -> tuple[Any, str | None]:
    """Return the type that typer reads, and a metavar where the type does not say enough."""
    kind = field.annotation
    if get_origin(kind) is tuple:
        return list[str], _LISTS.get(name)
    if get_origin(kind) is Literal:
        return str, "|".join(get_args(kind))  # pydantic refuses the others, in one line
    if get_origin(kind) in (Union, UnionType):
        inner = next(arm for arm in get_args(kind) if arm is not type(None))
        if get_origin(inner) is Literal:
            return str | None, "|".join(get_args(inner))
        return inner | None, None
    return kind, None
