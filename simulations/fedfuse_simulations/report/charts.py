"""The charts of a report: figures of 374 points width, so that they are legible on a telephone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from fedfuse_simulations.report.participation import Part, Participation
from fedfuse_simulations.report.svg import Colour, drawing, inline
from fedfuse_simulations.scoring import Score

_WIDTH: Final = 5.2
"""Inches of 72 points."""
_COLUMNS: Final = 100
"""Most columns of the participation chart; beyond that, one stands for several rounds."""
_NAME: Final = 16
"""Longest name on an axis (characters)."""


@dataclass(frozen=True)
class Budget:
    """One bar of the budget chart; None stands for unbounded, and for no cap."""

    name: str
    epsilon: float | None
    cap: float | None

    @property
    def over(self) -> bool:
        """Whether more was spent than the cap allows."""
        return self.epsilon is None or (self.cap is not None and self.epsilon > self.cap)


def short(name: str) -> str:
    """Return a name as it stands on an axis: printable, and a long one without its middle, as ends tell apart."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return shown if len(shown) <= _NAME else f"{shown[:7]}…{shown[7 - _NAME + 1 :]}"


def curve(points: Sequence[tuple[int, Score]], baseline: float) -> str:
    """Return accuracy and F1 after the scored rounds, with the share of the most frequent class."""
    rounds = [number for number, _ in points]
    with drawing():
        figure, axes = _figure(3.1)
        for name, values, colour, marker in (
            ("accuracy", [s.accuracy for _, s in points], Colour.FIRST, "o"),
            ("F1 macro", [s.f1_macro for _, s in points], Colour.SECOND, "s"),
        ):
            axes.plot(rounds, values, color=colour, marker=marker, markersize=4, label=name)
        axes.axhline(
            baseline, color=Colour.MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label="most frequent class"
        )
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.03)
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, handlelength=1.6)
        last = points[-1][1]
        label = (
            f"Line chart over rounds {rounds[0]} to {rounds[-1]}; at the end accuracy is {last.accuracy:.3f}, "
            f"F1 macro {last.f1_macro:.3f}; always naming the most frequent class would reach {baseline:.3f}."
        )
        return inline(figure, "curve", label)


def subsets(scores: Sequence[tuple[str, Score]]) -> str:
    """Return accuracy and F1 per subset of modalities as pairs of bars."""
    with drawing():
        figure, axes = _figure(0.75 + 0.5 * len(scores))
        places = np.arange(len(scores))
        for name, shift, values, colour in (
            ("accuracy", -0.19, [s.accuracy for _, s in scores], Colour.FIRST),
            ("F1 macro", 0.19, [s.f1_macro for _, s in scores], Colour.SECOND),
        ):
            bars = axes.barh(places + shift, values, 0.36, color=colour, label=name)
            axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=10)
        _names(axes, [name for name, _ in scores])
        axes.set_xlim(0, 1.1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.2)
        told = "; ".join(f"{short(name)} {score.accuracy:.2f}" for name, score in scores)
        return inline(
            figure, "subsets", f"Bar chart of accuracy and F1 per modalities shown. Accuracy: {told}."
        )


def budgets(rows: Sequence[Budget]) -> str:
    """Return each site's spent epsilon as a bar, its cap as a mark."""
    bounds = [bound for row in rows for bound in (row.epsilon, row.cap) if bound is not None]
    end = max(bounds, default=1.0) or 1.0
    with drawing():
        figure, axes = _figure(0.85 + 0.36 * len(rows))
        for place, row in enumerate(rows):
            spent = end if row.epsilon is None else row.epsilon
            axes.barh(place, spent, 0.55, color=Colour.BAD if row.over else Colour.FIRST)
            if row.cap is not None:
                axes.plot([row.cap] * 2, [place - 0.4, place + 0.4], color=Colour.INK, linewidth=2)
            text = "unbounded" if row.epsilon is None else f"{math.ceil(row.epsilon * 1000) / 1000:.3f}"
            axes.text(end * 1.04, place, text + (" !" if row.over else ""), va="center", fontsize=10.5)
        _names(axes, [row.name for row in rows])
        axes.set_xlim(0, end * 1.34)
        axes.set_xlabel("epsilon spent")
        told = "; ".join(
            f"{short(row.name)} {'unbounded' if row.epsilon is None else f'{row.epsilon:.3g}'}"
            f" of {'no cap' if row.cap is None else f'{row.cap:g}'}"
            for row in rows
        )
        return inline(figure, "budgets", f"Bar chart of epsilon spent per site against its cap: {told}.")


def participation(seen: Participation) -> str:
    """Return a grid, a row per site and a column per round; many rounds share columns, the worst of them shown."""
    sites = list(seen.parts)
    together = math.ceil(len(seen.rounds) / _COLUMNS)
    columns = math.ceil(len(seen.rounds) / together)
    shown = {
        site: [_worst(parts[c * together : (c + 1) * together]) for c in range(columns)]
        for site, parts in seen.parts.items()
    }
    with drawing():
        figure, axes = _figure(0.95 + 0.26 * len(sites))
        for part, style in _CELLS.items():
            places = [
                (c, r) for r, site in enumerate(sites) for c in range(columns) if shown[site][c] is part
            ]
            if places:
                axes.add_patch(PathPatch(_cells(places), label=part.value, **style))
        _names(axes, sites)
        axes.set_xlim(-0.6, columns - 0.4)
        axes.grid(visible=False)
        ticks = range(0, columns, math.ceil(columns / 10))
        axes.set_xticks(ticks, [str(seen.rounds[tick * together]) for tick in ticks])
        axes.set_xlabel("round" if together == 1 else f"round ({together} in a column, the worst shown)")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.legend(loc="outside upper left", ncols=4, columnspacing=1.2, handlelength=1, handleheight=1)
        counts = {part: sum(parts.count(part) for parts in seen.parts.values()) for part in Part}
        told = ", ".join(f"{count} {part.value}" for part, count in counts.items() if count)
        return inline(
            figure,
            "participation",
            f"Grid of {len(sites)} sites over {len(seen.rounds)} rounds; cells: {told}.",
        )


_CELLS: Final[dict[Part, dict[str, Any]]] = {
    Part.COUNTED: {"facecolor": Colour.FIRST, "edgecolor": "none"},
    Part.LEFT_OUT: {
        "facecolor": "none",
        "edgecolor": Colour.SECOND,
        "hatch": "//////",
        "linewidth": 1.0,
    },
    Part.NOT_OPENED: {"facecolor": Colour.BAD, "edgecolor": "none"},
    Part.NOT_ASKED: {"facecolor": "none", "edgecolor": Colour.MUTED, "linewidth": 0.6},
}
_WORST: Final = (Part.NOT_OPENED, Part.LEFT_OUT, Part.NOT_ASKED, Part.COUNTED)


def _worst(parts: Sequence[Part]) -> Part:
    return min(parts, key=_WORST.index)


def _cells(places: Sequence[tuple[int, int]]) -> Path:
    """Return one path of many squares: a path each would make the page heavy."""
    corners = np.array([(-0.41, -0.39), (0.41, -0.39), (0.41, 0.39), (-0.41, 0.39), (-0.41, -0.39)])
    return Path.make_compound_path(*(Path(corners + place, closed=True) for place in places))


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure((_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    return figure, axes


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a chart, the first on top."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
