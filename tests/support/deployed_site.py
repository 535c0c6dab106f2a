"""A real site answered for by its executor, over a SuperNode's Runtime API; also a program that reports on torch."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedfuse_client.answers import Answers, Warm
from fedfuse_client.executor import Executor
from fedfuse_client.home import SiteHome
from fedfuse_client.journal import Journal
from fedfuse_client.tasks import Tasks
from fedfuse_shared.bundle import bundle_hash
from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.model import EncoderConfig, ModelConfig
from fedfuse_shared.messages import Step
from fedfuse_shared.offer import Offer, Segment
from fedfuse_shared.parcel import Parcel, pack, unpack
from support.lone_site import NAME, Around, write_home
from support.supernode import SECRET, RunningSuperNode

INFO = """\
name = "animals"
task = "classification"
classes = ["cat", "dog"]
modalities = ["text"]
record = "A line about one animal."
"""
MODEL = ModelConfig(classes=("cat", "dog"), encoders={Modality.TEXT: EncoderConfig(name="hashed-words")})


def write_site(root: Path, around: Around, **changes: object) -> SiteHome:
    """Write a site's folder and six records."""
    data = root / "data"
    data.mkdir(parents=True)
    (data / "dataset.toml").write_text(INFO)
    rows = [f"r{n},{NAME},train,{'cat' if n % 2 else 'dog'},animal number {n},,\n" for n in range(6)]
    (data / "manifest.csv").write_text("id,site,split,label,text,image,audio\n" + "".join(rows))
    return write_home(root / "site", around.federation, data, **{"bundles": (bundle_hash(),), **changes})


@dataclass
class DeployedSite:
    """What a server sees of a site, and the executor behind it."""

    home: SiteHome
    node: RunningSuperNode
    answers: Callable[[SiteHome], Answers] = Warm
    clock: Callable[[], float] = time.time
    shown: io.StringIO = field(default_factory=io.StringIO)
    seconds: list[tuple[Step, float]] = field(default_factory=list)
    after: Callable[[Step], None] = lambda _: None

    def __post_init__(self) -> None:
        self.journal = Journal(NAME, self.home.logs, json_lines=True, shown=self.shown)
        self.executor = Executor(self.answers(self.home), self.journal, self.clock)
        self.executor.attend(Tasks(self.node.address, SECRET))
        self.run = self.node.begin()

    def exchange(self, kind: str, content, **how):
        """Send one message and return the reply."""
        self.node.send(how.pop("run", self.run), kind, content, **how)
        began = time.perf_counter()
        assert self.executor.turn()
        took = time.perf_counter() - began
        (reply,) = self.node.replies()
        assert self.executor.turn()
        assert self.executor.is_idle
        if not reply.has_error():
            self.seconds.append((Step(kind), took))
        return reply

    def ask(self, step: Step, parcel: Parcel) -> Parcel:
        answer = unpack(self.exchange(step.value, pack(parcel)).content, who=NAME)
        self.after(step)
        return answer

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.shown.getvalue().splitlines()]

    def close(self) -> None:
        self.executor.close()
        self.journal.close()


def offer_of(around: Around, layout: tuple[Segment, ...], model_hash: str) -> Offer:
    return around.federation.offer(model=MODEL, layout=layout, model_hash=model_hash)


def main() -> None:
    """Play a round with real training; print, after each step, whether torch is loaded and with how many threads."""
    root, layout, trains = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[4] == "trains"
    around = Around()
    home = write_site(root, around)
    if not trains:
        from security.test_kills_of_a_site import WithoutRecords

        from fedfuse_client import round as site_round

        WithoutRecords.log = root / "trained"
        site_round.Learner = WithoutRecords
        WithoutRecords.check_gradients = lambda *_: None
    offer = offer_of(
        around, tuple(Segment.model_validate_json(json.dumps(each)) for each in layout), sys.argv[3]
    )

    def report(step: Step) -> None:
        threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0
        sys.stdout.write(json.dumps([step.value, threads]) + "\n")

    with RunningSuperNode() as node:
        site = DeployedSite(home, node, after=report)
        for _ in around.greet(site.ask):
            pass
        around.play(offer, site.ask, bytes(4 * offer.dimension()))
        site.close()


if __name__ == "__main__":
    main()
