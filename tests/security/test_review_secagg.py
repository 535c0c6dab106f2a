"""Attacks on the secure aggregation found by a review; each test states what ought to hold, red while it does not."""

import numpy as np
import pytest
from support.federation import Federation, Round

from fedfuse_shared.config.base import SERVER
from fedfuse_shared.crypto import shamir
from fedfuse_shared.crypto.derive import End
from fedfuse_shared.crypto.keystream import apply_masks
from fedfuse_shared.envelope import decode, encode, seal
from fedfuse_shared.errors import ProtocolError
from fedfuse_shared.messages import Agreement, Dealing, Delivery, Reveal, Survivors, Unmasking
from fedfuse_shared.secagg.masking import MaskOwner, inverse, pair_masks, self_mask
from fedfuse_shared.secagg.packing import add_packed
from fedfuse_shared.secagg.quantise import vector_length


def by_server(federation, body):
    return encode(seal(body, SERVER, federation.server))


# --- one site's vector ---------------------------------------------------------------------------------------
def isolate(sequence, victims, colluders, silent):
    """Open the sum of the victims' vectors by lies alone, where the sites let it; return it.

    The victims are shown a U2 of themselves, the colluders and the silent; everybody else sees all of U1. The silent
    mask nothing, agree that they did not, and so the keys of all the masks that are left on the victims' vectors are
    revealed as those of dropped sites, along with the victims' own seeds as those of survivors.
    """
    federation, context = sequence.federation, sequence.offer.context()
    everyone = list(sequence.offer.participants)
    others = [n for n in everyone if n not in victims and n not in silent]
    key_lists = sequence.keys(everyone)
    dealings = {n: decode(sequence.sites[n].deal(key_lists[n]), Dealing, who=n).body for n in everyone}
    for name in everyone:
        seen = [*victims, *colluders, *silent] if name in victims else everyone
        notes = tuple(next(x for x in dealings[n].notes if x.body.holder == name) for n in sorted(seen))
        delivery = Delivery(context=context, notes=notes, roll=None)
        sequence.sites[name].accept_delivery(by_server(federation, delivery))
    masked = {n: sequence.sites[n].mask(np.full(vector_length(sequence.offer), 7, np.uint32)) for n in victims}
    hashes = {n: vector_hash for n, (_, vector_hash) in masked.items()}
    for name in others:
        hashes[name] = sequence.sites[name].mask(np.zeros(vector_length(sequence.offer), np.uint32))[1]
    shown = by_server(federation, Survivors(context=context, vectors=hashes, roll=None))
    signers = [*others, *silent]
    agreements = tuple(decode(sequence.sites[n].agree(shown), Agreement, who=n) for n in signers)
    unmasking = by_server(federation, Unmasking(context=context, agreements=agreements))
    reveals = {n: decode(sequence.sites[n].reveal(unmasking), Reveal, who=n).body for n in signers}

    def restore(dealer, kind):
        shares = {everyone.index(n) + 1: bytes.fromhex(getattr(r, kind)[dealer]) for n, r in reveals.items()}
        return shamir.combine(shares, who=dealer)

    total = np.zeros(vector_length(sequence.offer), np.uint32)
    public = {n: bytes.fromhex(sequence.sites[victims[0]].state.peers[n].mask) for n in everyone}
    private = {n: bytes.fromhex(sequence.sites[n].state.mask_private) for n in colluders}
    private |= {n: restore(n, "mask_shares") for n in silent}
    for victim in victims:
        add_packed(total, masked[victim][0], sequence.offer.ring_bits, who=victim)
        apply_masks(total, [inverse(self_mask(restore(victim, "seed_shares"), context, victim))])
    ends = [End(n, public[n]) for n in victims]
    for name, key in private.items():
        apply_masks(total, pair_masks(MaskOwner(context, name, key), ends))
    return total


@pytest.mark.parametrize(("sites", "victims"), [(4, 1), (7, 1), (8, 2)])
def test_sites_that_sent_nothing_do_not_vouch_for_what_may_be_opened(sites, victims):
    """Bonawitz et al. 2017 count signatures of survivors alone. Signatures of sites that masked nothing let a lying
    server and c sites open one site's update, under the usual bounds: m - c honest ones were promised in the sum."""
    federation = Federation.of(sites)
    sequence = Round(federation, federation.offer())
    names, missing = list(federation.names), sites - sequence.offer.min_survivors
    silent, colluders = names[:missing], names[missing : missing + sequence.offer.colluders]
    chosen = names[-victims:]
    assert victims < sequence.offer.min_survivors - sequence.offer.colluders
    try:
        opened = isolate(sequence, chosen, colluders, silent)
    except ProtocolError:
        return
    assert not (opened == 7 * victims).all(), f"the sum over {victims} of {sites} sites was opened"
