"""``dataset.toml``: what a data folder says of itself, and which of its files is the manifest."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedfuse_client.data.rows import MANIFESTS, MODALITIES, Problem, ProblemCode
from fedfuse_shared import limits
from fedfuse_shared.config.base import Label, Modality, ShortText

if TYPE_CHECKING:
    from pathlib import Path

INFO: Final = "dataset.toml"
_PRINTED: Final = r"[^\s\x00-\x1f\x7f-\x9f]"  # neither white space nor a control character
ClassName = Annotated[
    str,
    Field(max_length=100, pattern=rf"^[^=+\-@\s\x00-\x1f\x7f-\x9f]([^\x00-\x1f\x7f-\x9f]*{_PRINTED})?$"),
]
"""Name of a class: one line, no white space around it, and nothing a spreadsheet would calculate."""

_RULES: Final = {
    "name": "a name is letters, digits and . _ / -, at most 100, the first a letter or digit",
    "classes": "a class is one line without white space around it that starts with none of = + - @",
    "record": "this is one line for people",
}
_MAX_INFO: Final = 2**20  # bytes of dataset.toml


class DatasetInfo(BaseModel):
    """What ``dataset.toml`` must say; other keys, such as where the data came from, are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Label
    task: Literal["classification"] = "classification"
    classes: Annotated[tuple[ClassName, ...], Field(min_length=2, max_length=10_000)]
    modalities: Annotated[tuple[Modality, ...], Field(min_length=1, max_length=len(MODALITIES))]
    record: Annotated[ShortText, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
    """What one record is, in a line for people: the unit whose privacy is protected."""

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        for name, values in (("classes", self.classes), ("modalities", self.modalities)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names one twice")
        return self


def read_info(folder: Path) -> DatasetInfo | tuple[Problem, ...]:
    """Return what ``dataset.toml`` says, or everything wrong with it."""
    values = _read_toml(folder / INFO)
    if isinstance(values, Problem):
        return (values,)
    try:
        return DatasetInfo.model_validate(values)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        return tuple(_info_problem(fault["loc"], fault["type"], fault["msg"]) for fault in faults)


def _info_problem(place: tuple[int | str, ...], kind: str, message: str) -> Problem:
    if kind == "string_pattern_mismatch":
        message = _RULES[str(place[0])]
    key = ".".join(map(str, place)) or None
    return Problem(None, key, ProblemCode.BAD_INFO, f"{message[0].lower()}{message[1:]}", INFO)


def _read_toml(path: Path) -> dict[str, Any] | Problem:
    if not path.is_file():
        message = f"there is no such file in {path.parent}; it says name, classes, modalities and record"
        return Problem(None, None, ProblemCode.MISSING_FILE, message, INFO)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_INFO + 1)
        if len(content) > _MAX_INFO:
            return Problem(None, None, ProblemCode.TOO_LARGE, f"is longer than {_MAX_INFO} bytes", INFO)
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        code, message = ProblemCode.NOT_UTF8, f"is not UTF-8 at byte {error.start}; save it as UTF-8"
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        code, message = ProblemCode.BAD_INFO, f"is not valid TOML: {error}"
    except OSError as error:
        code, message = ProblemCode.UNREADABLE, f"cannot be read: {error.strerror}"
    return Problem(None, None, code, message, INFO)


def find_manifest(folder: Path) -> str | tuple[Problem, ...]:
    """Return the name of the one manifest in a folder, or why it cannot be told or read."""
    names = [name for name in MANIFESTS if (folder / name).is_file()]
    if not names:
        message = f"there is neither {' nor '.join(MANIFESTS)} in {folder}"
        return (Problem(None, None, ProblemCode.MISSING_FILE, message, MANIFESTS[0]),)
    if len(names) > 1:
        message = f"there is also {' and '.join(names[1:])}; keep one"
        return (Problem(None, None, ProblemCode.AMBIGUOUS_MANIFEST, message, names[0]),)
    size = (folder / names[0]).stat().st_size
    if size > limits.MAX_MANIFEST:
        message = f"is {size} bytes long, at most {limits.MAX_MANIFEST} are read"
        return (Problem(None, None, ProblemCode.TOO_LARGE, message, names[0]),)
    return names[0]
