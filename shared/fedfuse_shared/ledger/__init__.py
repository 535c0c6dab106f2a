"""Leaves, Merkle tree, checkpoints and their verification."""
