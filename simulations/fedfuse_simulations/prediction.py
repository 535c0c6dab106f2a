"""One record classified by a run's published model; its files are decoded as a site decodes them for training."""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from pydantic import Field
from pydantic_core import to_json
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedfuse_client.data.cells import Record
from fedfuse_client.data.tensors import RecordTensors
from fedfuse_server.home import RunHome
from fedfuse_shared.config.base import Frozen, Modality
from fedfuse_shared.errors import ConfigError, DataError
from fedfuse_shared.models import MODALITIES, load_model

_MOST_SHOWN = 10
"""Rows of the table before the rest is summed up."""


class Prediction(Frozen):
    """What a model says of one record."""

    best: str = Field(serialization_alias="class")
    """The most probable class."""
    probabilities: dict[str, float]
    """Of every class, in the model's order; they add up to 1."""
    modalities: tuple[Modality, ...]
    """What the model was shown."""


def predict(model_file: Path, record: Record) -> Prediction:
    """Return what a model says of a record.

    Args:
        model_file: As ``RunHome.publish`` writes it.
        record: Its paths are relative to the working directory; site, split and label do not matter.

    Raises:
        ConfigError: the record has nothing, or a modality that the model does not read.
        DataError: the model or one of the record's files cannot be used.
    """
    shown = tuple(m for m in MODALITIES if getattr(record, m.value) is not None)
    if not shown:
        raise ConfigError("there is nothing to classify", advice="give --text, --image or --audio")
    model, card = load_model(model_file)
    for modality in shown:
        if modality not in card.model.encoders:
            raise ConfigError(
                f"the model reads no {modality.value}",
                who=str(model_file),
                advice=f"it reads {', '.join(m.value for m in model.modalities)}",
            )
    batch = RecordTensors(Path(), (record,), card.model).batch([0])
    with torch.no_grad():
        logits = model(batch["text"], batch["image"], batch["audio"], batch["present"])[0]
    probabilities = logits.to(torch.float64).softmax(dim=0).tolist()
    named = dict(zip(card.model.classes, probabilities, strict=True))
    return Prediction(best=max(named, key=named.__getitem__), probabilities=named, modalities=shown)


def run_prediction(
    run: Path, *, text: str | None, image: Path | None, audio: Path | None, json: bool
) -> None:
    """Classify one record with a run's published model and print what it says.

    Raises:
        FedfuseError: nothing was given, or the run or a file cannot be used.
    """
    home = RunHome(run)
    if not home.model_file.is_file():
        raise ConfigError(
            "holds no model", who=str(run), advice="name a run's folder; a run has one after its first round"
        )
    _check_text(text)
    found = predict(
        home.model_file,
        Record(row=0, id="", site="", split="test", label=0, text=text, image=image, audio=audio),
    )
    if json:
        typer.echo(to_json(found, by_alias=True))
    else:
        Console().print(_table(found))


def _check_text(text: str | None) -> None:
    if text is None:
        return
    if not text.strip():
        raise DataError("is empty", who="--text", advice="leave it out where the record has none")
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps bytes of the command line that are not UTF-8 as lone surrogates
        raise DataError("is not UTF-8", who="--text", advice="set the terminal to UTF-8") from None


def _table(found: Prediction) -> Table:
    table = Table(title=f"From {', '.join(found.modalities)}", title_justify="left")
    table.add_column("class")
    table.add_column("probability", justify="right")
    ordered = sorted(found.probabilities.items(), key=lambda item: -item[1])
    for name, probability in ordered[:_MOST_SHOWN]:
        # Text, not str: what the data's author wrote must not be read as markup.
        table.add_row(Text(name), f"{probability:.4f}", style="bold" if name == found.best else None)
    if rest := ordered[_MOST_SHOWN:]:
        table.add_row(f"{len(rest)} more", f"{sum(p for _, p in rest):.4f}")
    return table
