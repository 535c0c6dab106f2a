"""Primitives: sharing, sealing, key agreement, keystreams, against public vectors and their own algebra."""

import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given
from hypothesis import strategies as st
from support.federation import SeededBytes

from fedfuse_shared.crypto import shamir
from fedfuse_shared.crypto.derive import End, pair_key
from fedfuse_shared.crypto.keys import agree, check_canonical, public_of
from fedfuse_shared.crypto.keystream import Mask, apply_masks
from fedfuse_shared.crypto.sealing import seal, unseal
from fedfuse_shared.errors import ProtocolError

CONTEXT = "ab" * 32


@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.integers(0, 8), st.randoms())
def test_any_threshold_many_shares_restore_the_secret(secret, threshold, spare, random):
    points = list(range(1, threshold + spare + 1))
    shares = shamir.split(secret, threshold, points, os.urandom)
    chosen = random.sample(points, threshold)
    assert shamir.combine({p: shares[p] for p in chosen}, who="dealer") == secret


def test_one_share_too_few_tells_nothing():
    # With t - 1 shares fixed, every secret is equally possible: the share at one more point decides it.
    shares = shamir.split(b"\x07" * 32, 3, [1, 2, 3], os.urandom)
    known = {1: shares[1], 2: shares[2]}
    seen = set()
    for forged in range(50):
        guess = forged.to_bytes(33, "big")
        try:
            seen.add(shamir.combine({**known, 3: guess}, who="dealer"))
        except ProtocolError:
            continue  # the 257-bit field is slightly larger than the secrets
    assert len(seen) > 40


def test_the_largest_and_smallest_secrets_survive():
    for secret in (b"\0" * 32, b"\xff" * 32):
        assert shamir.combine(shamir.split(secret, 2, [1, 5], os.urandom), who="d") == secret


def test_a_share_outside_the_field_names_the_dealer():
    with pytest.raises(ProtocolError, match="lyon"):
        shamir.combine({1: b"\xff" * 33}, who="lyon")


def test_the_prime_is_the_smallest_above_two_to_the_256():
    def is_prime(n):  # Miller-Rabin with fixed bases; error far below 2^-80 for random n
        d, r = n - 1, 0
        while d % 2 == 0:
            d, r = d // 2, r + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71):
            x = pow(base, d, n)
            if x in (1, n - 1):
                continue
            for _ in range(r - 1):
                x = x * x % n
                if x == n - 1:
                    break
            else:
                return False
        return True

    assert is_prime(shamir.PRIME)
    assert not any(is_prime(2**256 + k) for k in range(1, 297, 2))


def test_both_ends_agree_on_one_secret():
    alice, bob = os.urandom(32), os.urandom(32)
    assert agree(alice, public_of(bob), who="b") == agree(bob, public_of(alice), who="a")


@pytest.mark.parametrize(
    "encoded",
    [
        (2**255 - 19).to_bytes(32, "little"),
        (2**255 - 18).to_bytes(32, "little"),
        (9 + 2**255).to_bytes(32, "little"),
        b"\x09" * 31,
        b"\xff" * 32,
    ],
)
def test_a_second_spelling_of_a_public_key_is_refused(encoded):
    with pytest.raises(ProtocolError, match="non-canonical"):
        check_canonical(encoded, who="x")


LOW_ORDER = [  # points of order 1, 2, 4 and 8 in canonical form (RFC 7748 section 7, Curve25519 security notes)
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_low_order_public_key_is_refused(point):
    with pytest.raises(ProtocolError, match="low order"):
        agree(os.urandom(32), point, who="x")


def test_a_pair_key_binds_purpose_context_names_and_both_public_keys():
    secret, one, two = b"s" * 32, End("a", b"1" * 32), End("b", b"2" * 32)
    base = pair_key(b"mask", secret, CONTEXT, one, two)
    assert base == pair_key(b"mask", secret, CONTEXT, two, one)
    others = {
        pair_key(b"channel", secret, CONTEXT, one, two),
        pair_key(b"mask", b"t" * 32, CONTEXT, one, two),
        pair_key(b"mask", secret, "cd" * 32, one, two),
        pair_key(b"mask", secret, CONTEXT, End("c", b"1" * 32), two),
        pair_key(b"mask", secret, CONTEXT, End("a", b"3" * 32), two),
        pair_key(b"mask", secret, CONTEXT, one, End("b", b"3" * 32)),
    }
    assert base not in others
    assert len(others) == 6


def test_a_sealed_share_opens_only_in_its_own_direction_and_context():
    key, draw = os.urandom(32), SeededBytes("x")
    sealed = seal(key, b"share", CONTEXT, "a", "b", draw)
    assert unseal(key, sealed, CONTEXT, "a", "b") == b"share"
    for context, sender, receiver in ((CONTEXT, "b", "a"), ("00" * 32, "a", "b"), (CONTEXT, "a", "c")):
        with pytest.raises(ProtocolError):
            unseal(key, sealed, context, sender, receiver)
    for broken in (b"", sealed[:5], sealed[:-1], bytes([sealed[0] ^ 1]) + sealed[1:]):
        with pytest.raises(ProtocolError):
            unseal(key, broken, CONTEXT, "a", "b")


@pytest.mark.parametrize("length", [0, 1, 3, 65_535, 65_536, 65_537, 200_001])
def test_a_mask_is_the_aes_256_ctr_keystream_whatever_the_length(length):
    key = os.urandom(32)
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(4 * length))
    words = np.zeros(length, np.uint32)
    apply_masks(words, [Mask(key, subtract=False)])
    assert words.tobytes() == np.frombuffer(stream, "<u4").astype(np.uint32).tobytes()
    apply_masks(words, [Mask(key, subtract=True)])
    assert not words.any()
