"""What every settings and message type has in common: frozen, strict, no unknown fields, no NaN."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints


class Frozen(BaseModel):
    """An immutable value whose fields are checked strictly and whose unknown fields are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Modality(StrEnum):
    """A kind of input a record may have."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"


class Trust(StrEnum):
    """Whom a site's noise has to protect against.

    ``SITE``: nobody is trusted, every site adds the whole noise itself.
    ``AGGREGATE``: secure aggregation is relied upon and the noise is shared.
    ``NONE``: there is no guarantee at all; for comparisons on data that need none. A site takes part only if its own
    policy names it.
    """

    SITE = "site"
    AGGREGATE = "aggregate"
    NONE = "none"


SiteName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
"""Name of an enrolled site."""
AuthorName = Annotated[
    str,
    StringConstraints(
        pattern=r"^(@server|@operator|(@coordinator/|@auditor/)?[A-Za-z0-9][A-Za-z0-9._-]{0,62})$"
    ),
]
"""Who signed: a site, or one of the reserved names that no site can have."""
NodeKey = Annotated[str, StringConstraints(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/]{100,300}={0,2}$")]
"""Public key of a site's connection (Flower's SuperNode) as OpenSSH writes it, without a comment."""
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes in lower-case hexadecimal: a hash or a public key."""
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
"""64 bytes in lower-case hexadecimal: an Ed25519 signature."""
ShortText = Annotated[str, StringConstraints(max_length=400)]
"""A sentence for a person."""
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}$")]
"""A machine-readable name."""

SERVER = "@server"
OPERATOR = "@operator"
COORDINATOR = "@coordinator/"
"""What the name of a coordinator begins with."""
AUDITOR = "@auditor/"
"""What the name of an auditor begins with."""
