"""Flower's SecAgg+ at work, through its own functions; run by the interpreter of ``.bench/flwr``.

    flwr_secagg.py mask D K            what a client does: its own mask and K pairwise ones over D integers
    flwr_secagg.py unmask N DROPPED D  what the server does: ``SecAggPlusWorkflow.unmask_stage``, complete graph

Says "ready" when the stage is set, then does its job once per line on standard input and says "done". What it sums up
is checked: a peer that did less than its job would be no measure.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from flwr.common import parameters_to_ndarrays
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow, WorkflowState
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from flwr.supercore.task_identity import TaskIdentity

# A message cannot be made outside a task of a run; which one does not matter here.
TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

CLIP, TARGET, MODULUS = 8.0, 2**22, 2**32
"""Defaults of ``SecAggPlusWorkflow``."""


def pair() -> tuple[bytes, bytes]:
    """Return a key pair as the client mod keeps it."""
    private, public = generate_key_pairs()
    return private_key_to_bytes(private), public_key_to_bytes(public)


def shared(private: bytes, public: bytes) -> bytes:
    """Return what two ends derive, as the client mod does."""
    return generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(public))


def masking(dimension: int, neighbours: int) -> Callable[[], None]:
    """Return the masking of one vector: the order of calls is that of ``_collect_masked_vectors``."""
    vector = [np.zeros(dimension, dtype=np.int64)]
    (own, _), seed = pair(), os.urandom(32)
    publics = [pair()[1] for _ in range(neighbours)]

    def work() -> None:
        shapes = get_parameters_shape(vector)
        masked = parameters_addition(vector, pseudo_rand_gen(seed, MODULUS, shapes))
        for number, public in enumerate(publics):
            mask = pseudo_rand_gen(shared(own, public), MODULUS, shapes)
            combine = parameters_addition if number % 2 else parameters_subtraction
            masked = combine(masked, mask)
        parameters_mod(masked, MODULUS)

    return work


def unmasking(sites: int, dropped: int, dimension: int) -> Callable[[], None]:
    """Return ``unmask_stage`` on a round in which ``dropped`` sites went away after sharing their keys."""
    ids = list(range(1, sites + 1))
    active, dead = ids[dropped:], ids[:dropped]
    keys, seeds = {nid: pair() for nid in ids}, {nid: os.urandom(32) for nid in ids}
    threshold = 2 * sites // 3 + 1
    key_shares = {nid: create_shares(keys[nid][0], threshold, sites) for nid in dead}
    seed_shares = {nid: create_shares(seeds[nid], threshold, sites) for nid in active}
    update = np.random.default_rng(0).uniform(-1, 1, dimension)
    total = factor_combine(TARGET, quantize([update], CLIP, TARGET))
    shapes = get_parameters_shape(total)
    total = [array.astype(np.int64) * len(active) for array in total]
    # Masks between two active sites cancel; what is left on the sum is put there.
    for nid in active:
        total = parameters_addition(total, pseudo_rand_gen(seeds[nid], MODULUS, shapes))
        for gone in dead:
            mask = pseudo_rand_gen(shared(keys[nid][0], keys[gone][1]), MODULUS, shapes)
            total = (parameters_addition if nid > gone else parameters_subtraction)(total, mask)
    total = parameters_mod(total, MODULUS)

    def reply(number: int, nid: int) -> SimpleNamespace:
        shown = {**{a: seed_shares[a][number] for a in active}, **{d: key_shares[d][number] for d in dead}}
        record = {Key.NODE_ID_LIST: list(shown), Key.SHARE_LIST: list(shown.values())}
        content = SimpleNamespace(config_records={RECORD_KEY_CONFIGS: record})
        metadata = SimpleNamespace(src_node_id=nid)
        return SimpleNamespace(has_error=lambda: False, metadata=metadata, content=content)

    replies = [reply(number, nid) for number, nid in enumerate(active)]
    grid = SimpleNamespace(send_and_receive=lambda _messages, **_: replies)
    records = {MAIN_CONFIGS_RECORD: {WorkflowKey.CURRENT_ROUND: 1}}
    context = SimpleNamespace(
        state=SimpleNamespace(config_records=records),
        strategy=SimpleNamespace(aggregate_fit=lambda *_: (None, {})),
    )
    workflow = SecAggPlusWorkflow(1.0, threshold / sites)

    def work() -> None:
        result = SimpleNamespace(parameters=None)
        state = WorkflowState(
            sampled_node_ids=set(ids),
            active_node_ids=set(active),
            threshold=threshold,
            clipping_range=CLIP,
            quantization_range=TARGET,
            mod_range=MODULUS,
            nid_to_neighbours={nid: set(ids) for nid in ids},
            nid_to_publickeys={nid: [keys[nid][1]] for nid in ids},
            aggregate_ndarrays=[array.copy() for array in total],
            legacy_results=[(None, result)],
        )
        if not workflow.unmask_stage(grid, context, state):
            sys.exit("the workflow gave up")
        # All sites have the same weight, so that the average is the update itself, on a grid of 2 * CLIP / TARGET.
        (mean,) = parameters_to_ndarrays(result.parameters)
        if np.abs(mean - update).max() > 4 * CLIP / TARGET:
            sys.exit("the workflow opened something else than the sum")

    return work


def main() -> None:
    """Set the stage, then do the job once per line."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    kind, *numbers = sys.argv[1:]
    work = {"mask": masking, "unmask": unmasking}[kind](*map(int, numbers))
    print("ready", flush=True)
    for _ in sys.stdin:
        work()
        print("done", flush=True)


if __name__ == "__main__":
    main()
