"""What a run's events add up to: ``progress.jsonl`` while it runs, ``metrics.json`` when it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from fedfuse_server.events import Event, RoundAbandoned, RoundOpened, RunStopped, SiteLeftOut
from fedfuse_shared.config.base import Frozen
from fedfuse_shared.evaluation import Evaluated
from fedfuse_simulations.scoring import Scores

if TYPE_CHECKING:
    from fedfuse_simulations.examiner import Examiner


class RoundMetrics(Frozen):
    """An opened round: who was in it, and the scores after it."""

    round: int
    survivors: tuple[str, ...]
    scores: Scores | None
    """None where the round was not scored."""
    evaluated: Evaluated | None = None
    """What the sites' own noised counts say of the weights the round started from."""


class LeftOut(Frozen):
    """A site that was left out of an exchange, and why."""

    round: int
    site: str
    step: str
    reason: str


class Aborted(Frozen):
    """An attempt that was not opened."""

    round: int
    attempt: int
    reason: str


class Metrics(Frozen):
    """The content of ``metrics.json``."""

    rounds: tuple[RoundMetrics, ...]
    left_out: tuple[LeftOut, ...]
    aborted: tuple[Aborted, ...]
    final: Scores
    stopped: str
    """Why the run ended before its last planned round; empty when it did not."""
    seconds: float
    """Time spent in rounds, over all processes that worked on the run."""

    def evaluated(self) -> list[tuple[int, Evaluated]]:
        """Return what the sites' counts say, each with the round whose outcome they are about."""
        return [(each.round - 1, each.evaluated) for each in self.rounds if each.evaluated is not None]


Entry = RoundMetrics | LeftOut | Aborted
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


class Watcher:
    """Takes a run's events: scores the model now and then, notes them on disk, shows them.

    Args:
        path: ``progress.jsonl``; what an earlier process noted there counts.
        examiner: Scores published weights.
        every: Rounds between two scorings.
        show: Told of every event, with the scores if there are new ones.
    """

    def __init__(
        self, path: Path, examiner: Examiner, every: int, show: Callable[[Event, Scores | None], None]
    ) -> None:
        self._path = path
        self._examiner = examiner
        self._every = every
        self._show = show
        self.entries = _read(path)
        self.stopped = ""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        scores = None
        match event:
            case RoundOpened() if any(
                isinstance(e, RoundMetrics) and e.round == event.round for e in self.entries
            ):
                pass  # a resumed run tells its last round again
            case RoundOpened():
                if event.round % self._every == 0:
                    scores = self._examiner.examine(event.published)
                self._note(
                    RoundMetrics(
                        round=event.round,
                        survivors=event.survivors,
                        scores=scores,
                        evaluated=event.evaluated,
                    )
                )
            case SiteLeftOut():
                self._note(LeftOut(round=event.round, site=event.site, step=event.step, reason=event.reason))
            case RoundAbandoned():
                self._note(Aborted(round=event.round, attempt=event.attempt, reason=event.reason))
            case RunStopped():
                self.stopped = event.reason
            case _:
                pass
        self._show(event, scores)

    def _note(self, entry: Entry) -> None:
        self.entries.append(entry)
        with self._path.open("ab") as file:
            file.write(to_json(entry) + b"\n")

    def metrics(self, final: Scores, seconds: float) -> Metrics:
        """Return everything noted, by all processes that worked on the run."""
        return Metrics(
            rounds=tuple(e for e in self.entries if isinstance(e, RoundMetrics)),
            left_out=tuple(e for e in self.entries if isinstance(e, LeftOut)),
            aborted=tuple(e for e in self.entries if isinstance(e, Aborted)),
            final=final,
            stopped=self.stopped,
            seconds=seconds,
        )


def _read(path: Path) -> list[Entry]:
    """Return what was noted; a torn last line is cut off, so that the next note starts on a line of its own."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    entries: list[Entry] = []
    whole = b""
    for line in lines:
        try:
            entries.append(_ENTRY.validate_json(line))
        except ValidationError:
            break
        if not line.endswith(b"\n"):
            break
        whole += line
    path.write_bytes(whole)
    return entries[: whole.count(b"\n")]
