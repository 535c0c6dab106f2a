"""Settings from and to TOML, with errors that name the key and the nearest one that exists."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from fedfuse_shared.config.base import Frozen
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.files import write_durably

C = TypeVar("C", bound=Frozen)

_MAX_CONFIG = 2**20


def load_toml(path: Path, config_type: type[C]) -> C:
    """Return checked settings from a TOML file.

    Raises:
        ConfigError: unreadable, not TOML, unknown key, or a value out of bounds.
    """
    return check(read_toml(path), config_type, who=str(path))


def read_toml(path: Path) -> dict[str, object]:
    """Return the plain values in a TOML file, not yet checked.

    Raises:
        ConfigError: unreadable, too large, or not TOML.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_CONFIG + 1)
    except OSError as problem:
        raise ConfigError(
            f"cannot be read ({problem.strerror})", who=str(path), advice="check the path"
        ) from problem
    if len(raw) > _MAX_CONFIG:
        raise ConfigError(f"is larger than {_MAX_CONFIG} bytes", who=str(path))
    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"is not TOML ({problem})", who=str(path), advice="correct it") from problem


def check(values: Mapping[str, object], config_type: type[C], *, who: str) -> C:
    """Return checked settings from plain values.

    Raises:
        ConfigError: unknown key, missing key, or a value out of bounds.
    """
    try:
        # By way of JSON: strict mode then takes text for an enumeration or path, and nothing else loosely.
        return config_type.model_validate_json(json.dumps(values))
    except (TypeError, RecursionError) as problem:
        raise ConfigError(f"holds a value settings cannot have ({problem})", who=who) from problem
    except ValidationError as problem:
        # Unknown keys before all others: a misspelt key is also a missing one.
        errors = problem.errors(include_url=False)
        first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
        place = tuple(part for part in first["loc"] if part != "[key]")
        name = ".".join(str(part)[:40] for part in place)
        if first["type"] == "extra_forbidden":
            advice = _nearest(config_type, place)
            raise ConfigError(f"unknown key {name}", who=who, advice=advice) from problem
        if first["type"] == "missing":
            raise ConfigError(f"key {name} is missing", who=who, advice="add it") from problem
        given = first["input"]
        shown = f" (it is {str(given)[:40]})" if isinstance(given, str | int | float) else ""
        raise ConfigError(f"key {name}: {first['msg']}{shown}", who=who, advice="correct it") from problem


def save_toml(path: Path, config: Frozen) -> None:
    """Write settings to a TOML file, durably.

    Raises:
        OSError: the folder cannot be written.
    """
    write_durably(path, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)).encode())


def _nearest(config_type: type[BaseModel], place: tuple[int | str, ...]) -> str:
    known: type[BaseModel] = config_type
    for part in place[:-1]:
        field = known.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return "remove it"
        known = field.annotation
    close = difflib.get_close_matches(str(place[-1]), known.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known.model_fields)}"
