"""The Merkle tree of RFC 6962 / RFC 9162 section 2.1, with SHA-256: roots, inclusion and consistency proofs.

Leaf hashes are ``SHA-256(0x00 || leaf)``, inner nodes ``SHA-256(0x01 || left || right)``; a tree of n leaves splits
at the largest power of two below n.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedfuse_shared.errors import VerificationError

EMPTY_ROOT = hashlib.sha256(b"").digest()
HASH_BYTES = 32


def leaf_hash(leaf: bytes) -> bytes:
    """Return the hash of a leaf (32 bytes)."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node (32 bytes)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """A tree that grows: the roots of its perfect subtrees, largest first; memory O(log n)."""

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []

    def append(self, leaf: bytes) -> None:
        """Add a leaf."""
        self._add(leaf_hash(leaf))

    def _add(self, node: bytes) -> None:
        # Every trailing one bit of the size is a perfect subtree that the new leaf completes.
        trailing = self.size
        while trailing & 1:
            node = node_hash(self._peaks.pop(), node)
            trailing >>= 1
        self._peaks.append(node)
        self.size += 1

    def root(self) -> bytes:
        """Return the root hash (32 bytes)."""
        if not self._peaks:
            return EMPTY_ROOT
        node = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            node = node_hash(peak, node)
        return node


def root_of(hashes: Sequence[bytes]) -> bytes:
    """Return the root over leaf hashes."""
    tree = Tree()
    for value in hashes:
        tree._add(value)  # noqa: SLF001 - the same tree, given hashes
    return tree.root()


def inclusion_proof(hashes: Sequence[bytes], index: int) -> list[bytes]:
    """Return the audit path of a leaf, RFC 9162 section 2.1.3.1, deepest sibling first."""
    size = len(hashes)
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} of a tree of {size}")
    if size == 1:
        return []
    split = _split(size)
    if index < split:
        return [*inclusion_proof(hashes[:split], index), root_of(hashes[split:])]
    return [*inclusion_proof(hashes[split:], index - split), root_of(hashes[:split])]


def consistency_proof(hashes: Sequence[bytes], first: int) -> list[bytes]:
    """Return the proof that the tree of the first leaves is a prefix of the whole, RFC 9162 section 2.1.4.1."""
    if not 0 < first <= len(hashes):
        raise ValueError(f"a prefix of {first} leaves of {len(hashes)}")
    return _subproof(hashes, first, whole=True)


def _subproof(hashes: Sequence[bytes], first: int, *, whole: bool) -> list[bytes]:
    size = len(hashes)
    if first == size:
        return [] if whole else [root_of(hashes)]
    split = _split(size)
    if first <= split:
        return [*_subproof(hashes[:split], first, whole=whole), root_of(hashes[split:])]
    return [*_subproof(hashes[split:], first - split, whole=False), root_of(hashes[:split])]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that a leaf hash is at an index of a tree with a root, RFC 9162 section 2.1.3.2.

    Raises:
        VerificationError: it is not, or the proof is malformed.
    """
    _check_hashes([leaf, *proof])
    if not 0 <= index < size:
        raise VerificationError(f"leaf {index} cannot be in a tree of {size}")
    node, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise VerificationError("inclusion proof is too long")
        if node & 1 or node == last:
            found = node_hash(sibling, found)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        node, last = node >> 1, last >> 1
    if last != 0:
        raise VerificationError("inclusion proof is too short")
    if found != root:
        raise VerificationError("inclusion proof leads to another root")


def verify_consistency(
    first: int, second: int, proof: Sequence[bytes], first_root: bytes, second_root: bytes
) -> None:
    """Check that a tree of ``first`` leaves is a prefix of one of ``second`` leaves, RFC 9162 section 2.1.4.2.

    Raises:
        VerificationError: it is not, or the proof is malformed, or ``first`` is 0: an empty tree is a prefix of any,
            and a proof of that would say nothing.
    """
    if first <= 0:
        raise VerificationError(f"a tree of {first} leaves has no consistency proof")
    verify_subtree_consistency(0, first, second, proof, first_root, second_root)


def verify_subtree_inclusion(
    leaf: bytes, index: int, start: int, end: int, proof: Sequence[bytes], subtree_root: bytes
) -> None:
    """Check that a leaf hash is at an index of the subtree over leaves ``start`` to ``end - 1``.

    Source: Merkle Tree Certificates, draft-ietf-plants-merkle-tree-certs, section "Subtree Inclusion Proofs".

    Raises:
        VerificationError: it is not, or there is no such subtree, or the proof is malformed.
    """
    _check_subtree(start, end)
    verify_inclusion(leaf, index - start, end - start, proof, subtree_root)


def verify_subtree_consistency(
    start: int, end: int, size: int, proof: Sequence[bytes], subtree_root: bytes, root: bytes
) -> None:
    """Check that the subtree over leaves ``start`` to ``end - 1`` is part of a tree of ``size`` leaves.

    Source: Merkle Tree Certificates, draft-ietf-plants-merkle-tree-certs, section "Subtree Consistency Proofs";
    with ``start = 0`` it is the algorithm of RFC 9162 section 2.1.4.2.

    Raises:
        VerificationError: it is not, or there is no such subtree, or the proof is malformed.
    """
    _check_hashes(proof)
    if start == end and 0 <= end <= size:
        if proof or subtree_root != EMPTY_ROOT:
            raise VerificationError(
                "nothing needs to be proved of no leaves, whose root is the hash of nothing"
            )
        return
    _check_subtree(start, end)
    if end > size:
        raise VerificationError(f"leaves up to {end} are no part of a tree of {size}")
    # Levels are left out as long as the subtree's right edge is complete within itself; what remains at the bottom
    # is the whole subtree, or else the first hash of the proof.
    left, right, last = start, end - 1, size - 1
    while left != right and (right == last or right & 1):
        left, right, last = left >> 1, right >> 1, last >> 1
    path = [subtree_root, *proof] if left == right else list(proof)
    if not path:
        raise VerificationError("consistency proof is empty")
    _climb(left, right, last, path, subtree_root, root)


def _climb(left: int, right: int, last: int, path: Sequence[bytes], subtree_root: bytes, root: bytes) -> None:
    """Hash from the bottom of the subtree's right edge up to both roots and compare them."""
    sub = whole = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise VerificationError("consistency proof is too long")
        if right & 1 or right == last:
            if left < right:
                sub = node_hash(sibling, sub)
            whole = node_hash(sibling, whole)
            while not right & 1 and right:
                left, right, last = left >> 1, right >> 1, last >> 1
        else:
            whole = node_hash(whole, sibling)
        left, right, last = left >> 1, right >> 1, last >> 1
    if last != 0:
        raise VerificationError("consistency proof is too short")
    if sub != subtree_root or whole != root:
        raise VerificationError("consistency proof leads to another root")


def _check_subtree(start: int, end: int) -> None:
    """Only an interval that starts at a multiple of the next power of two of its length is a subtree."""
    if not 0 <= start < end or start % (1 << (end - start - 1).bit_length()):
        raise VerificationError(f"leaves {start} to {end} are no subtree")


def _split(size: int) -> int:
    return 1 << (size - 1).bit_length() - 1


def _check_hashes(values: Sequence[bytes]) -> None:
    if any(len(value) != HASH_BYTES for value in values):
        raise VerificationError(f"a hash of a proof does not have {HASH_BYTES} bytes")
