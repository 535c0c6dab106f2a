"""Whether a site can take part: each thing that would stop it is looked at, and none stops the others.

What is found is made of settings, hashes and counts of problems: nothing of a record is in it, so that it can be
sent to the operator as it is. Needs no torch.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from fedfuse_client.budget import Statement, statements
from fedfuse_client.code import code_hash
from fedfuse_client.connection import load_connection
from fedfuse_client.data.check import check_folder
from fedfuse_client.home import SiteHome
from fedfuse_client.learner import Learner
from fedfuse_client.policy import SitePolicy
from fedfuse_client.server_probe import LIMIT, Reached, authority_expires, check_clock, probe
from fedfuse_shared.bundle import bundle_hash
from fedfuse_shared.errors import BudgetError, ConfigError, FedfuseError, StateError, VerificationError
from fedfuse_shared.keyfile import load_node_public

ROOM: Final = 2**30
"""Least room on the site's disk (bytes): its store, a masked vector in it, and its logs."""
DAYS_LEFT: Final = 30
"""A certificate that expires sooner is warned of (days)."""


class State(StrEnum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """One line of a preflight.

    Attributes:
        check: What was looked at.
        state: How it ended.
        found: What was found, in a few words.
        advice: What to do; empty where there is nothing to do.
    """

    check: str
    state: State
    found: str
    advice: str = ""


def preflight(
    home: SiteHome, *, offline: bool = False, limit: float = LIMIT, clock: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Yield one finding for each check, in this order: folder, policy, keys, software, data, budget, server.

    Args:
        home: The site's folder.
        offline: Do not connect to the server.
        limit: Longest that the server is waited for (seconds).
        clock: This machine's (seconds since 1970).
    """
    yield _checked("files", lambda: _files(home))
    yield _checked("disk", lambda: _disk(home))
    policies: list[SitePolicy] = []
    yield _checked("policy", lambda: _policy(home, policies))
    of_policy: tuple[tuple[str, Callable[[SitePolicy], Finding]], ...] = (
        ("roster", lambda policy: _roster(home, policy)),
        ("node key", lambda policy: _node_key(home, policy)),
        ("code", _code),
        ("bundle", _bundle),
        ("data", _data),
        ("budget", lambda policy: _budget(home, policy)),
    )
    for name, check in of_policy:
        if policies:
            yield _checked(name, lambda check=check: check(policies[0]))  # type: ignore[misc]
        else:
            yield Finding(name, State.SKIP, "not checked: needs a policy that holds")
    if offline:
        yield Finding("tls", State.SKIP, "not checked: offline")
        yield Finding("clock", State.SKIP, "not checked: offline")
        return
    reached: list[Reached] = []
    yield _checked("tls", lambda: _tls(home, reached, limit, clock))
    if reached:
        yield _checked("clock", lambda: _clock(reached[0]))
    else:
        yield Finding("clock", State.SKIP, "not checked: needs a safe connection")


def _checked(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except FedfuseError as problem:
        found = f"{problem.who}: {problem.message}" if problem.who else problem.message
        return Finding(name, State.FAIL, found, problem.advice or "")
    except Exception as problem:  # noqa: BLE001 - one check that cannot be done must not hide what the others find
        # Its own words may hold a value of a record.
        return Finding(
            name, State.FAIL, f"could not be checked ({type(problem).__name__})", "report this as a bug"
        )


# --- the folder ---------------------------------------------------------------------------------------------
def _files(home: SiteHome) -> Finding:
    """Are all files there, real ones, the owner's, and closed to everybody else?"""
    if not home.root.is_dir():
        raise StateError(
            "is not a folder", who=str(home.root), advice="make it with fedfuse site init, or check the path"
        )
    required = (
        home.policy,
        home.key,
        home.roster,
        home.store,
        home.connection,
        home.node_key,
        home.authority,
    )
    optional = (
        home.store.with_name("store.db.lock"),
        home.store.with_name("store.db-wal"),
        home.logs,
        *(sorted(home.logs.iterdir()) if home.logs.is_dir() and not home.logs.is_symlink() else ()),
    )
    faults: list[str] = []
    modes: list[str] = []
    for path in (home.root, *required, *optional):
        name = str(path.relative_to(home.root)) if path != home.root else str(home.root)
        try:
            # The folder itself may be reached by a link: what lies in it may not.
            found = path.stat() if path == home.root else path.lstat()
        except FileNotFoundError:
            faults += [f"{name} is missing"] if path in required else []
            continue
        if stat.S_ISLNK(found.st_mode):
            faults.append(f"{name} is a link")
        elif found.st_uid != os.getuid():
            faults.append(f"{name} belongs to another user")
        elif found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            faults.append(f"{name} is open to other users")
            modes.append(f"chmod {700 if stat.S_ISDIR(found.st_mode) else 600} {path}")
    if not faults:
        return Finding("files", State.PASS, "all there, open to their owner alone")
    advice = [
        *modes,
        *(["put the file itself where the link is"] if any("is a link" in fault for fault in faults) else []),
        *(
            ["join the federation first (fedfuse site join)"]
            if any("missing" in fault for fault in faults)
            else []
        ),
        *(["run as the site's own user"] if any("another user" in fault for fault in faults) else []),
    ]
    return Finding("files", State.FAIL, ", ".join(faults), "; ".join(advice))


def _disk(home: SiteHome) -> Finding:
    try:
        free = shutil.disk_usage(home.root).free
    except OSError as problem:
        raise StateError(
            f"cannot be looked at ({problem.strerror})", who=str(home.root), advice="check the path"
        ) from problem
    if free < ROOM:
        return Finding(
            "disk", State.FAIL, f"{free / 2**20:.0f} MiB free", f"free {ROOM / 2**30:g} GiB at least"
        )
    return Finding("disk", State.PASS, f"{free / 2**30:.1f} GiB free")


def _policy(home: SiteHome, found: list[SitePolicy]) -> Finding:
    policy = home.load_policy()
    found.append(policy)
    return Finding("policy", State.PASS, f"{policy.site} in {policy.federation}, hash {policy.hash()}")


def _roster(home: SiteHome, policy: SitePolicy) -> Finding:
    roster = home.load_identity(policy).roster
    if roster.federation != policy.federation:
        raise VerificationError(
            f"roster is of federation {roster.federation}, policy names {policy.federation}",
            advice="take the roster of this federation, or correct policy.toml",
        )
    return Finding("roster", State.PASS, f"the pinned one, {len(roster.sites)} sites, lists this site's key")


def _node_key(home: SiteHome, policy: SitePolicy) -> Finding:
    roster = home.load_identity(policy).roster
    mine = load_node_public(home.node_key)
    listed = roster.nodes.get(policy.site)
    if listed != mine:
        raise ConfigError(
            f"the roster lists {'another key' if listed else 'no key'} for this site's connection",
            who="node.key",
            advice="send the operator this site's request.json and take the roster made with it",
        )
    return Finding("node key", State.PASS, "the one the roster lists")


# --- software -----------------------------------------------------------------------------------------------
def _code(policy: SitePolicy) -> Finding:
    mine = code_hash()
    if not policy.code:
        return Finding(
            "code", State.WARN, "policy.toml allows any fedfuse code", f'set code = ["{mine}"] in it'
        )
    if mine not in policy.code:
        raise ConfigError(
            f"installed is {mine}, which policy.toml does not list",
            advice="install the version that was agreed on, or review this one and add its hash to `code`",
        )
    return Finding("code", State.PASS, f"{mine[:16]}… is listed")


def _bundle(policy: SitePolicy) -> Finding:
    mine = bundle_hash()
    if mine not in policy.bundles:
        raise ConfigError(
            f"policy.toml does not list bundle {mine}: every message would be refused",
            advice="add it to `bundles`",
        )
    return Finding("bundle", State.PASS, f"{mine[:16]}… is listed")


# --- data and budget ----------------------------------------------------------------------------------------
def _data(policy: SitePolicy) -> Finding:
    problems = check_folder(policy.data)
    if problems:
        # Only of which kind: a problem's own words may quote a file's name or a value.
        kinds = Counter(problem.code.value for problem in problems)
        listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        return Finding("data", State.FAIL, listed, f"fedfuse data check {policy.data} lists every problem")
    Learner(policy).check_rows()
    return Finding("data", State.PASS, "no problems, and rows to train on")


def _budget(home: SiteHome, policy: SitePolicy) -> Finding:
    with home.view_store() as store:
        store.chain(policy.federation, policy.site).check_member()
        found = statements(store, policy)
    charged = [statement for statement in found if statement.more_rounds is not None]
    if not charged:
        return Finding("budget", State.PASS, f"nothing spent of epsilon {policy.epsilon_cap:g}")
    said = "; ".join(_said(statement) for statement in charged)
    if not any(statement.more_rounds for statement in charged) and len(charged) == len(found):
        raise BudgetError(said, advice="raise epsilon_cap in policy.toml, or stop")
    return Finding("budget", State.PASS, said)


def _said(statement: Statement) -> str:
    more = statement.more_rounds
    return (
        f"epsilon {statement.epsilon:.3f} of {statement.cap:g} spent, "
        f"{more or 'no'} more round{'' if more == 1 else 's'} like the last one fit{'s' if more == 1 else ''}"
    )


# --- the server ---------------------------------------------------------------------------------------------
def _tls(home: SiteHome, reached: list[Reached], limit: float, clock: Callable[[], float]) -> Finding:
    connection = load_connection(home.connection)
    server = probe(connection, home.authority, limit=limit, clock=clock)
    reached.append(server)
    now = datetime.fromtimestamp(clock(), UTC)
    ends = min(server.expires, authority_expires(home.authority))
    names = ", ".join(server.names[:3]) + (", …" if len(server.names) > 3 else "")
    said = f"{server.version}, certificate for {names or 'nobody'} is valid until {ends:%Y-%m-%d}"
    if (ends - now).days < DAYS_LEFT:
        return Finding("tls", State.WARN, said, "ask the operator for a new certificate before that day")
    return Finding("tls", State.PASS, said)


def _clock(server: Reached) -> Finding:
    return Finding("clock", State.PASS, check_clock(server))


def passed(findings: list[Finding]) -> bool:
    """Return whether nothing failed."""
    return all(finding.state is not State.FAIL for finding in findings)
