"""Every limit and every domain label, with units, in one place."""

from __future__ import annotations

from typing import Final

# --- sizes of what is decoded (bytes unless said otherwise) -----------------------------------------------
MAX_MESSAGE: Final = 16 * 2**20
"""Largest signed message a peer may send; masked vectors travel beside it and have their own bound."""
MAX_LEDGER_LINE: Final = MAX_MESSAGE
"""Largest line of a ledger file: a leaf is a signed message."""
MAX_SITE_LEAF: Final = 256 * 2**10
"""Largest leaf a site may write; a reservation that lists a thousand mechanisms has about 100 kB."""
MAX_VECTOR: Final = 2**28
"""Longest update vector (coordinates)."""
MAX_SITES: Final = 100
"""Most participants of one offer on the complete graph (sites)."""
MAX_SPARSE_SITES: Final = 10_000
"""Most participants of one offer on a sparse graph, where a server is trusted not to lie (sites)."""
MAX_OFFICERS: Final = 100
"""Most coordinators, and most auditors, of a roster."""
MIN_SITES: Final = 3
"""Fewest participants of one offer: with two, each learns the other's update from the sum (sites)."""
MAX_SEGMENTS: Final = 256
"""Most segments of an update layout."""
MAX_COUNTS: Final = 10_000
"""Most evaluation counts of one vector: a confusion matrix of a hundred classes."""
MAX_ROUND_SECONDS: Final = 7 * 86_400
"""Longest time a site keeps the secrets of an attempt, whatever is offered (seconds)."""

# --- data at a site ---------------------------------------------------------------------------------------
MAX_MANIFEST: Final = 2**30
"""Largest manifest (bytes)."""
MAX_IMAGE_PIXELS: Final = 50_000_000
"""Largest image that is decoded (pixels): beyond it a file is taken for a decompression bomb."""
MAX_AUDIO_SECONDS: Final = 600.0
"""Longest recording that is decoded (seconds)."""
MAX_FILE: Final = 200 * 2**20
"""Largest image or audio file that is opened (bytes)."""
MAX_FEATURES: Final = 2**18
"""Most numbers per record and modality that a model may ask a site to hold; what it needs must not tell the count."""
MAX_RECORDS: Final = 2**20
"""Most training records of a site: what float64 sums lose is bounded for that many."""
MAX_TEXT: Final = 100_000
"""Longest text cell (characters)."""

# --- domain labels (RFC 8032 signatures, RFC 5869 info, SHA-256 prefixes): no two uses share one ----------
LABEL_SIGNATURE: Final = b"fedfuse/v1/signature/"
LABEL_COMMAND: Final = b"fedfuse/v1/command"
LABEL_CONTEXT: Final = b"fedfuse/v1/context"
LABEL_CHANNEL: Final = b"fedfuse/v1/channel"
LABEL_MASK: Final = b"fedfuse/v1/mask"
LABEL_SELF_MASK: Final = b"fedfuse/v1/self-mask"
LABEL_SEED_COMMITMENT: Final = b"fedfuse/v1/seed-commitment"
LABEL_SHARE: Final = b"fedfuse/v1/share"
LABEL_KEYS: Final = b"fedfuse/v1/u1"
LABEL_DEALINGS: Final = b"fedfuse/v1/u2"
LABEL_VECTORS: Final = b"fedfuse/v1/u3"
LABEL_ROLL: Final = b"fedfuse/v1/roll"
LABEL_GRAPH: Final = b"fedfuse/v1/graph"
LABEL_VECTOR: Final = b"fedfuse/v1/vector"
LABEL_MODEL: Final = b"fedfuse/v1/model"
LABEL_POLICY: Final = b"fedfuse/v1/policy"
LABEL_ARCHITECTURE: Final = b"fedfuse/v1/architecture"
LABEL_CODE: Final = b"fedfuse/v1/code"
LABEL_PLAN: Final = b"fedfuse/v1/plan"
LABEL_ROSTER: Final = b"fedfuse/v1/roster"
LABEL_LEAF_LINK: Final = b"fedfuse/v1/chain"
LABEL_ROW: Final = b"fedfuse/v1/row"
LABEL_RECORD: Final = b"fedfuse/v1/record"
