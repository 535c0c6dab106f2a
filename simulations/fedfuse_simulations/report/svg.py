"""A matplotlib figure as inline SVG that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Final
from xml.etree import ElementTree as ET

import matplotlib as mpl
from matplotlib.figure import Figure

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile(r"#00000[0-9a-f]")


class Colour(StrEnum):
    """Colours of the page, by stand-ins that a figure is drawn in and that nothing else uses."""

    INK = "#000001"
    MUTED = "#000002"
    GRID = "#000003"
    FIRST = "#000004"
    SECOND = "#000005"
    BAD = "#000006"

    @property
    def variable(self) -> str:
        """The page's name for it."""
        return f"var(--{self.name.lower()})"


STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's own font
    "svg.hashsalt": "fedfuse",  # the same figure, the same bytes
    "text.parse_math": False,  # a site's name may hold a dollar sign
    "font.size": 11.5,
    "text.color": Colour.INK,
    "axes.edgecolor": Colour.MUTED,
    "axes.labelcolor": Colour.INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": Colour.GRID,
    "grid.linewidth": 0.6,
    "xtick.color": Colour.MUTED,
    "xtick.labelcolor": Colour.INK,
    "ytick.color": Colour.MUTED,
    "ytick.labelcolor": Colour.INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "hatch.linewidth": 1.0,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the page's style within the block."""
    with mpl.rc_context(STYLE):
        yield


def inline(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an ``<svg>`` element without identifiers of its own outside ``name``.

    Args:
        figure: Drawn within ``drawing()``.
        name: Prefix of its identifiers; another for each figure of a page.
        label: What it shows, for those who do not see it.
    """
    written = io.BytesIO()
    # Without these entries it would carry a date and addresses of web pages.
    figure.savefig(
        written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    root = ET.fromstring(written.getvalue())  # noqa: S314 - see the import
    references = {
        found for node in root.iter() for value in node.attrib.values() for found in _referred(value)
    }
    for node in root.iter():
        node.tag = node.tag.removeprefix(_SVG)
        _rewrite(node, name, references)
    for definitions in root.iter("defs"):
        for style in definitions.findall("style"):  # it would hold for the whole page; the page's own does
            definitions.remove(style)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label, "class": f"chart {name}"}
    return ET.tostring(root, encoding="unicode")


def _referred(value: str) -> list[str]:
    return [value[1:]] if value.startswith("#") else _REFERENCE.findall(value)


def _rewrite(node: ET.Element, name: str, references: set[str]) -> None:
    if node.get("id") in references:
        node.set("id", f"{name}-{node.get('id')}")
    else:
        node.attrib.pop("id", None)
    if _HREF in node.attrib:
        node.set("href", f"#{name}-{node.attrib.pop(_HREF)[1:]}")
    for key in ("clip-path", "style"):
        if value := node.get(key):
            value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
            node.set(key, _COLOUR.sub(lambda found: Colour(found[0]).variable, value))
