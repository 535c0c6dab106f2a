"""Deliberately weakened copies of product code: a test of an attack is proven by the attack succeeding there."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from types import FunctionType, ModuleType
from typing import NamedTuple

import pytest


class Weakening(NamedTuple):
    """A check taken out of a module.

    Attributes:
        module: Its name, whole or below ``fedfuse_shared``.
        old: Source that occurs exactly once in it.
        new: What stands there instead.
    """

    module: str
    old: str
    new: str


def weaken(patch: pytest.MonkeyPatch, weakenings: Sequence[Weakening]) -> None:
    """Give every function of the modules named the code it has in a weakened copy of its module."""
    by_module: dict[str, list[Weakening]] = {}
    for weakening in weakenings:
        name = weakening.module
        whole = name if name.startswith("fedfuse_") else f"fedfuse_shared.{name}"
        by_module.setdefault(whole, []).append(weakening)
    for name, changes in by_module.items():
        real = importlib.import_module(name)
        source = inspect.getsource(real)
        for change in changes:
            if source.count(change.old) != 1:
                raise LookupError(
                    f"{name} holds {change.old!r} {source.count(change.old)} times: adapt the weakening"
                )
            source = source.replace(change.old, change.new)
        copy = ModuleType(name)
        exec(compile(source, f"<weakened {name}>", "exec"), vars(copy))
        weaker = dict(_functions(copy))
        for qualified, function in _functions(real):
            patch.setattr(function, "__code__", weaker[qualified].__code__)


def _functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """Return a module's own functions and methods by their qualified names."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, FunctionType):
            yield value.__qualname__, value
        elif isinstance(value, type):
            for member in vars(value).values():
                plain = getattr(member, "__func__", getattr(member, "fget", member))
                if isinstance(plain, FunctionType) and plain.__module__ == module.__name__:
                    yield plain.__qualname__, plain
