"""What goes over a quantised vector, and what the server takes off the sum."""

from __future__ import annotations

from typing import NamedTuple

from fedfuse_shared import limits
from fedfuse_shared.crypto.derive import End, pair_key, self_mask_key
from fedfuse_shared.crypto.keys import agree, public_of
from fedfuse_shared.crypto.keystream import Mask


class MaskOwner(NamedTuple):
    """One end's name and private mask key (32 bytes), in one context."""

    context: str
    name: str
    private: bytes

    @property
    def end(self) -> End:
        """Its name and public mask key."""
        return End(self.name, public_of(self.private))


def pair_masks(owner: MaskOwner, peers: list[End]) -> list[Mask]:
    """Return the masks that ``owner`` puts over its vector, one for each peer.

    The end whose name sorts first adds the mask and the other subtracts it, so that both vanish from the sum.

    Raises:
        ProtocolError: a peer's key is unusable.
    """
    own = owner.end
    masks = []
    for peer in peers:
        secret = agree(owner.private, peer.public, who=peer.name)
        key = pair_key(limits.LABEL_MASK, secret, owner.context, own, peer)
        masks.append(Mask(key, subtract=owner.name > peer.name))
    return masks


def self_mask(seed: bytes, context: str, site: str) -> Mask:
    """Return a site's own mask, from its 32-byte seed."""
    return Mask(self_mask_key(seed, context, site), subtract=False)


def inverse(mask: Mask) -> Mask:
    """Return what takes a mask off again."""
    return Mask(mask.key, subtract=not mask.subtract)
