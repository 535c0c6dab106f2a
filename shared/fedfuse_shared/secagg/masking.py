"""What goes over a quantised vector, and what the server takes off the sum."""

from __future__ import annotations

from typing import NamedTuple

from fedfuse_shared import limits
from fedfuse_shared.crypto.derive import End, pair_key, self_mask_key
from fedfuse_shared.crypto.keys import agree, public_of
from fedfuse_shared.crypto.keystream import Words, apply_mask


class Pair(NamedTuple):
    """One end's private mask key and the peer it shares a mask with."""

    context: str
    name: str
    private: bytes
    peer: End


def apply_pair_mask(words: Words, pair: Pair, *, remove: bool) -> None:
    """Apply the mask that ``pair.name`` puts over its vector for one peer, or remove it again.

    The end whose name sorts first adds the mask and the other subtracts it, so that both vanish from the sum.

    Raises:
        ProtocolError: the peer's key is unusable.
    """
    secret = agree(pair.private, pair.peer.public, who=pair.peer.name)
    own = End(pair.name, public_of(pair.private))
    key = pair_key(limits.LABEL_MASK, secret, pair.context, own, pair.peer)
    apply_mask(words, key, subtract=(pair.name > pair.peer.name) is not remove)


def apply_self_mask(words: Words, seed: bytes, context: str, site: str, *, remove: bool) -> None:
    """Apply a site's own mask, from its 32-byte seed, or remove it again."""
    apply_mask(words, self_mask_key(seed, context, site), subtract=remove)
