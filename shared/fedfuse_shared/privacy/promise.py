"""Whether an offer that shares noise keeps what docs/privacy-aggregate.md presumes; sites and audits ask the same.

Only what privacy rests on is here. That a sum fits its ring is a matter of accuracy (``aggregate.check_ring``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from fedfuse_shared import limits
from fedfuse_shared.errors import ConfigError
from fedfuse_shared.offer import Offer
from fedfuse_shared.privacy import aggregate
from fedfuse_shared.privacy.integer_noise import LEAST_DEVIATION, SMOOTH

_ROUNDED: Final = 1e-12
"""Relative rounding of the float64 arithmetic that makes shares of a multiplier."""
_MOST_WORDS: Final = aggregate.MOST_DIMENSION - limits.MAX_COUNTS


class Broken(NamedTuple):
    """One way in which shared noise would not be worth what is charged for it."""

    what: str
    advice: str


def broken(offer: Offer) -> Iterator[Broken]:
    """Yield what keeps an offer of ``trust = "aggregate"`` from being accounted; nothing where it can be."""
    asked, counted = offer.privacy, offer.evaluation
    sites, honest = asked.noise_sites, offer.min_survivors - offer.colluders
    if not 1 <= sites <= honest:
        yield Broken(
            f"counts on the noise of {sites} sites, only {honest} survivors are sure to be honest",
            "report it: fewer shares than that may be in the sum",
        )
        return
    if asked.steps != 1:
        yield Broken(
            f"shares noise over {asked.steps} local steps",
            "report it: a second step would start from weights that one share alone protects",
        )
    # Both ways: what a site adds follows from the multiplier, and a share overstated would make the epsilon against
    # all others together look smaller than it is.
    share = asked.noise_multiplier / math.sqrt(sites)
    if abs(asked.noise_share - share) > share * _ROUNDED:
        yield Broken(
            f"has {sites} shares of {asked.noise_share} for noise {asked.noise_multiplier}",
            f"report it: they do not add up, a share is {share:.6g}",
        )
    if counted is not None and sites * counted.noise_share**2 - SMOOTH**2 < counted.noise**2 * (1 - _ROUNDED):
        yield Broken(
            f"has {sites} shares of {counted.noise_share} for noise {counted.noise} on counts",
            "report it: they do not add up",
        )
    if offer.dimension() > _MOST_WORDS:
        yield Broken(
            f"shares noise over {offer.dimension()} coordinates, reckoned with are at most {_MOST_WORDS}",
            "ask the coordinator for a smaller model, or trust = site",
        )
    yield from _coarse(offer)


def _coarse(offer: Offer) -> Iterator[Broken]:
    """Is the grid one that scaling is exact on, fine enough for the noise and coarse enough to draw it?"""
    asked = offer.privacy
    try:
        least = aggregate.least_scale(asked.clip, offer.dimension())
        share = aggregate.share_deviation(
            asked.noise_multiplier, asked.noise_sites, asked.clip, offer.scale, offer.dimension()
        )
    except ConfigError as problem:
        yield Broken(f"shares noise, and {problem.message}", "ask the coordinator for other settings")
        return
    if offer.scale < least:
        yield Broken(
            f"has a grid of {offer.scale} steps per unit, at least {least} keep rounding small",
            "ask the coordinator for a finer grid",
        )
    if share < LEAST_DEVIATION:
        yield Broken(
            f"asks for noise of {share:.3g} steps, at least {LEAST_DEVIATION:g} add up smoothly",
            "ask the coordinator for a finer grid",
        )
    if not share <= aggregate.MOST_SHARE:
        yield Broken(
            f"asks for noise of {share:.3g} steps, at most {aggregate.MOST_SHARE:.3g} can be drawn closely enough",
            "ask the coordinator for a coarser grid",
        )
