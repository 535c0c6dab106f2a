"""The ledger's file: durable before announced, healed after a crash, and never shorter than what was signed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.ledgers import LedgerBuilder, head_of

from fedfuse_shared import limits
from fedfuse_shared.envelope import encode
from fedfuse_shared.errors import DataError, ProtocolError, StateError
from fedfuse_shared.ledger import log
from fedfuse_shared.ledger.checkpoint import verify_checkpoint
from fedfuse_shared.ledger.log import LedgerWriter, checkpoint_path, kind_of, read_ledger


@pytest.fixture
def builder() -> LedgerBuilder:
    builder = LedgerBuilder().enrol()
    builder.round()
    return builder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def written(path: Path, builder: LedgerBuilder) -> list[bytes]:
    writer = LedgerWriter(path)
    writer.append(builder.leaves)
    writer.checkpoint("lab", builder.federation.server)
    writer.close()
    return builder.lines()


def test_what_is_appended_is_read_back(path: Path, builder: LedgerBuilder) -> None:
    writer = LedgerWriter(path)
    assert writer.append(builder.leaves[:3]) == range(3)
    assert writer.append([]) == range(3, 3)
    assert writer.append(builder.leaves[3:]) == range(3, len(builder.leaves))
    assert writer.size == len(builder.leaves)
    assert [(entry.index, entry.raw) for entry in read_ledger(path)] == list(enumerate(builder.lines()))
    assert path.read_bytes() == b"".join(line + b"\n" for line in builder.lines())
    writer.close()


def test_checkpoint_is_signed_over_what_is_on_disk(path: Path, builder: LedgerBuilder) -> None:
    lines = written(path, builder)
    public = bytes.fromhex(builder.federation.roster.server)
    assert verify_checkpoint(checkpoint_path(path).read_bytes(), "lab", public) == head_of(lines)


def test_ledger_is_reopened_where_it_ended(path: Path, builder: LedgerBuilder) -> None:
    before = written(path, builder)
    builder.round()
    writer = LedgerWriter(path)
    assert writer.healed == 0
    writer.append(builder.leaves[len(before) :])
    head = writer.checkpoint("lab", builder.federation.server)
    writer.close()
    assert head == head_of(builder.lines())


def test_torn_last_line_is_healed_wherever_it_was_torn(
    path: Path, builder: LedgerBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_CHUNK", 100)  # so that a line spans several reads
    lines = written(path, builder)
    last = encode(builder.leaves[0]) + b"\n"
    whole = path.read_bytes()
    for end in range(1, len(last)):
        path.write_bytes(whole + last[:end])
        with pytest.raises(DataError, match="torn"):
            list(read_ledger(path))
        writer = LedgerWriter(path)
        assert writer.healed == end
        assert writer.size == len(lines)
        writer.close()
        assert path.read_bytes() == whole


def test_file_that_is_one_torn_line_is_healed_to_nothing(path: Path) -> None:
    path.write_bytes(b'{"author":')
    writer = LedgerWriter(path)
    assert (writer.healed, writer.size) == (10, 0)
    writer.close()


def test_ledger_that_lost_signed_leaves_is_refused(path: Path, builder: LedgerBuilder) -> None:
    lines = written(path, builder)
    path.write_bytes(b"".join(line + b"\n" for line in lines[:-2]))
    with pytest.raises(StateError, match="does not contain its own checkpoint"):
        LedgerWriter(path)


def test_ledger_with_a_changed_leaf_is_refused(path: Path, builder: LedgerBuilder) -> None:
    lines = written(path, builder)
    path.write_bytes(b"".join(line + b"\n" for line in [lines[1], lines[0], *lines[2:]]))
    with pytest.raises(StateError, match="lost or changed"):
        LedgerWriter(path)


def test_damaged_checkpoint_is_not_overwritten(path: Path, builder: LedgerBuilder) -> None:
    written(path, builder)
    checkpoint_path(path).write_bytes(b"garbage")
    with pytest.raises(StateError, match="checkpoint cannot be read"):
        LedgerWriter(path)


def test_two_writers_are_one_too_many(path: Path) -> None:
    first = LedgerWriter(path)
    with pytest.raises(StateError, match="open in another process"):
        LedgerWriter(path)
    first.close()
    first.close()
    LedgerWriter(path).close()


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.ledgers import LedgerBuilder
from fedfuse_shared.errors import StateError
from fedfuse_shared.ledger.log import LedgerWriter
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
builder = LedgerBuilder().enrol()
writer = LedgerWriter(Path(sys.argv[1]))
writer.append(builder.leaves[:2])
size = sum(len(line) + 1 for line in builder.lines()[:2])
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
try:
    writer.append(builder.leaves[2:])
except StateError as problem:
    print(problem)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(writer.append(builder.leaves[2:]))
"""


def test_full_disk_leaves_no_half_line_and_can_be_retried(path: Path) -> None:
    """A real write that stops short, by the kernel's limit on file sizes."""
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(tests)], capture_output=True, text=True, check=True
    )
    said, indices = done.stdout.splitlines()
    assert "cannot be written" in said
    assert "free some room" in said
    assert indices == "range(2, 5)"
    assert [entry.raw for entry in read_ledger(path)] == LedgerBuilder().enrol().lines()


def test_reader_refuses_what_it_cannot_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LEDGER_LINE", 100)
    path.write_bytes(b"x" * 100 + b"\n")
    assert [len(entry.raw) for entry in read_ledger(path)] == [100]
    path.write_bytes(b"x" * 101 + b"\n")
    with pytest.raises(DataError, match="over 100 bytes"):
        list(read_ledger(path))


def test_missing_ledger_is_said_plainly(path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_ledger(path))
    with pytest.raises(StateError, match="cannot be written"):
        LedgerWriter(path / "not-a-folder")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"kind":7}', b"\xff", b"[" * 100_000])
def test_kind_of_nothing(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        kind_of(raw)
