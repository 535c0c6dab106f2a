"""The incremental tree against a slow, obvious reference, and proofs that hold and do not hold."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfuse_shared.errors import VerificationError
from fedfuse_shared.ledger import merkle

LEAVES = [f"leaf {number}".encode() for number in range(40)]
HASHES = [merkle.leaf_hash(leaf) for leaf in LEAVES]


def reference(leaves: list[bytes]) -> bytes:
    """MTH of RFC 9162 section 2.1.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + reference(leaves[:k]) + reference(leaves[k:])).digest()


def test_root_of_every_size_is_the_reference() -> None:
    tree = merkle.Tree()
    assert tree.root() == reference([])
    for size, leaf in enumerate(LEAVES, start=1):
        tree.append(leaf)
        assert tree.size == size
        assert tree.root() == reference(LEAVES[:size]) == merkle.root_of(HASHES[:size])


@given(st.integers(1, 40), st.data())
def test_every_inclusion_proof_holds_for_its_leaf_only(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    proof = merkle.inclusion_proof(HASHES[:size], index)
    root = reference(LEAVES[:size])
    merkle.verify_inclusion(HASHES[index], index, size, proof, root)
    other = data.draw(st.integers(0, size - 1))
    if other != index:
        with pytest.raises(VerificationError):
            merkle.verify_inclusion(HASHES[other], index, size, proof, root)
        with pytest.raises(VerificationError):
            merkle.verify_inclusion(HASHES[index], other, size, proof, root)


@given(st.integers(1, 40), st.data())
def test_every_consistency_proof_holds_for_its_prefix_only(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, size))
    proof = merkle.consistency_proof(HASHES[:size], first)
    old, new = reference(LEAVES[:first]), reference(LEAVES[:size])
    merkle.verify_consistency(first, size, proof, old, new)
    rewritten = reference([b"rewritten", *LEAVES[1:first]])
    with pytest.raises(VerificationError):
        merkle.verify_consistency(first, size, proof, rewritten, new)


@given(st.integers(1, 40), st.data())
def test_every_subtree_is_consistent_with_the_tree(size: int, data: st.DataObject) -> None:
    """A subtree's proof is an inclusion proof of its root where it is perfect; its leaves are included in it."""
    level = data.draw(st.integers(0, size.bit_length() - 1))
    width = 1 << level
    start = width * data.draw(st.integers(0, size // width - 1))
    inside = HASHES[start : start + width]
    index = data.draw(st.integers(0, width - 1))
    merkle.verify_subtree_inclusion(
        inside[index],
        start + index,
        start,
        start + width,
        merkle.inclusion_proof(inside, index),
        merkle.root_of(inside),
    )
    # Leaving out the lowest levels of a leaf's own proof leaves the proof of the subtree it is in.
    proof = merkle.inclusion_proof(HASHES[:size], start)[level:]
    root = reference(LEAVES[:size])
    merkle.verify_subtree_consistency(start, start + width, size, proof, merkle.root_of(inside), root)
    with pytest.raises(VerificationError):
        merkle.verify_subtree_consistency(start, start + width, size, proof, HASHES[0][::-1], root)


@pytest.mark.parametrize(("index", "size"), [(-1, 4), (4, 4), (0, 0)])
def test_proof_of_a_leaf_that_is_not_there_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="leaf"):
        merkle.inclusion_proof(HASHES[:size], index)


@pytest.mark.parametrize("first", [0, 5, -1])
def test_proof_of_an_impossible_prefix_is_refused(first: int) -> None:
    with pytest.raises(ValueError, match="prefix"):
        merkle.consistency_proof(HASHES[:4], first)


def test_node_cannot_pass_for_a_leaf() -> None:
    """Second preimages: the two children of a node, taken as a leaf, hash to something else."""
    children = HASHES[0] + HASHES[1]
    assert merkle.leaf_hash(children) != merkle.node_hash(HASHES[0], HASHES[1])


def test_siblings_of_another_length_are_refused() -> None:
    root = reference(LEAVES[:2])
    with pytest.raises(VerificationError, match="32 bytes"):
        merkle.verify_inclusion(HASHES[0], 0, 2, [HASHES[1] + b"\0"], root)
