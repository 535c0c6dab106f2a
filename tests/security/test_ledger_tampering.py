"""Whatever is done to the bytes of a ledger after the server signed its checkpoint, the audit fails.

Four rounds of four sites, without coordinators and with one, whose ledger has commands, a refusal and a site that
leaves. And where the server signs again what it tampered with: every leaf that is missing shows in the others, except
the very last, a site's last word, and a revocation or refusal that it kept back; for those witnesses will be needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.federation import Federation
from support.ledgers import LedgerBuilder, codes, head_of

from fedfuse_shared.commands import Action, CommandRefusal
from fedfuse_shared.envelope import canonical, seal
from fedfuse_shared.ledger.records import Close, Leave
from fedfuse_shared.ledger.verification import verify_ledger
from fedfuse_shared.ledger.verification_report import Report

ROUNDS = 4


@pytest.fixture(scope="module", params=["without coordinators", "with a coordinator"])
def ledger(request: pytest.FixtureRequest) -> LedgerBuilder:
    if request.param == "without coordinators":
        builder = LedgerBuilder().enrol()
        for _ in range(ROUNDS):
            builder.round()
    else:
        builder = LedgerBuilder(Federation.with_officers(6)).enrol()
        builder.command()
        builder.round()
        builder.leave("site05")
        builder.refuse_command(seal(builder.leaves[7].body, "@auditor/eve", builder.federation.auditor))
        builder.revoke("site04")
        for _ in range(ROUNDS - 1):
            builder.round(participants=builder.federation.names[:4])
    assert builder.audit().ok
    return builder


def withheld(builder: LedgerBuilder, index: int) -> bool:
    """Whether a leaf's absence can show only in the ledger's own head."""
    body = builder.leaves[index].body
    return isinstance(body, CommandRefusal | Leave) or getattr(body, "action", None) is Action.REVOKE


def audited(builder: LedgerBuilder, lines: list[bytes]) -> Report:
    """Against the checkpoint of the untouched ledger."""
    return verify_ledger(lines, builder.federation.roster, head_of(builder.lines()))


def resigned(builder: LedgerBuilder, lines: list[bytes]) -> Report:
    """Against a checkpoint the server signed afterwards."""
    return verify_ledger(lines, builder.federation.roster, head_of(lines))


def test_every_deletion_is_found(ledger: LedgerBuilder) -> None:
    lines = ledger.lines()
    for index in range(len(lines)):
        assert "cut-off" in codes(audited(ledger, lines[:index] + lines[index + 1 :])), index


def test_every_duplication_is_found(ledger: LedgerBuilder) -> None:
    lines = ledger.lines()
    for index, line in enumerate(lines):
        found = codes(audited(ledger, [*lines[:index], line, *lines[index:]]))
        assert "beyond-checkpoint" in found, index


def test_every_adjacent_swap_is_found(ledger: LedgerBuilder) -> None:
    lines = ledger.lines()
    for index in range(len(lines) - 1):
        swapped = [*lines[:index], lines[index + 1], lines[index], *lines[index + 2 :]]
        assert "root-mismatch" in codes(audited(ledger, swapped)), index


def test_every_deletion_but_of_the_tail_is_found_even_if_the_server_signs_it(ledger: LedgerBuilder) -> None:
    lines = ledger.lines()
    for index in range(len(lines) - 1):
        found = resigned(ledger, lines[:index] + lines[index + 1 :])
        assert found.ok == withheld(ledger, index), index
    assert resigned(ledger, lines[:-1]).ok, "a shorter ledger is a ledger: hence 'up to this head'"


def test_every_duplication_is_found_even_if_the_server_signs_it(ledger: LedgerBuilder) -> None:
    lines = ledger.lines()
    for index, line in enumerate(lines):
        assert not resigned(ledger, [*lines[:index], line, *lines[index:]]).ok, index


def test_every_swap_of_one_authors_leaves_is_found_even_if_the_server_signs_it(ledger: LedgerBuilder) -> None:
    lines = ledger.lines()
    swaps = 0
    for first, leaf in enumerate(ledger.leaves):
        following = (i for i in range(first + 1, len(lines)) if ledger.leaves[i].author == leaf.author)
        second = next(following, None)
        if second is None:
            continue
        if withheld(ledger, first) or withheld(ledger, second):
            continue  # its place says little, and a site's leaves are numbered
        lines[first], lines[second] = lines[second], lines[first]
        assert not resigned(ledger, lines).ok, (first, second)
        lines[first], lines[second] = lines[second], lines[first]
        swaps += 1
    assert swaps >= len(lines) - len({leaf.author for leaf in ledger.leaves}) - 4


def changed(value: Any) -> Any:
    """Return a value of the same shape that says something else."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2
        case str() if len(value) in {64, 128}:
            return ("0" if value[0] != "0" else "1") + value[1:]
        case str():
            return value + "x"
        case list():
            return [*value, value[0]] if value else ["x"]
        case _:
            return {} if value else "x"


def field_changes(line: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a leaf with each field of it and of its body changed, in canonical form again."""
    leaf = json.loads(line)
    for name in leaf:
        if name != "body":
            yield name, canonical({**leaf, name: changed(leaf[name])})
    for name, value in leaf["body"].items():
        yield f"body.{name}", canonical({**leaf, "body": {**leaf["body"], name: changed(value)}})


def test_every_changed_field_is_found_even_if_the_server_signs_it(ledger: LedgerBuilder) -> None:
    """Checked leaf by leaf: what does not hold by itself is found in a ledger of any length."""
    lines = ledger.lines()
    end = 1 + ledger.find(Close)[1]
    tried = 0
    for index, line in enumerate(lines[:end]):
        for name, forged in field_changes(line):
            short = [*lines[:index], forged]
            assert codes(resigned(ledger, short)) & {
                "malformed",
                "bad-signature",
                "wrong-author",
                "unknown-author",
            }, (index, name)
            tried += 1
    assert tried > 10 * end


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_found(ledger: LedgerBuilder) -> None:
    """In every leaf: its first and last byte, and bytes spread over it; every bit of the byte in turn."""
    lines = ledger.lines()
    for index, line in enumerate(lines):
        for count, place in enumerate(
            sorted({0, len(line) - 1, *range(7, len(line), max(1, len(line) // 5))})
        ):
            forged = bytearray(line)
            forged[place] ^= 1 << (index + count) % 8
            # A flipped byte may become a line's end: the reader then sees two lines.
            seen = [*lines[:index], *bytes(forged).split(b"\n"), *lines[index + 1 :]]
            found = codes(audited(ledger, seen))
            assert found & {"root-mismatch", "beyond-checkpoint"}, (index, place)
            assert found & {"malformed", "bad-signature", "unknown-author", "wrong-author"}, (index, place)
