"""The verifier agrees with every public vector of transparency-dev/merkle on what is to be accepted."""

import base64
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from fedfuse_shared.errors import VerificationError
from fedfuse_shared.ledger import merkle

VECTORS = (
    Path(os.environ.get("FEDFUSE_VECTORS") or Path(__file__).resolve().parents[3] / "shared" / "vectors")
    / "merkle"
)

needs_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(),
    reason=f"no Merkle vectors at {VECTORS}; set FEDFUSE_VECTORS to the folder above merkle/",
)


def _bytes(text: str | None) -> bytes:
    return base64.b64decode(text or "")


def _verify(family: str, v: dict) -> None:
    proof = [_bytes(text) for text in v["proof"] or []]
    match family:
        case "inclusion":
            merkle.verify_inclusion(
                _bytes(v["leafHash"]), v["leafIdx"], v["treeSize"], proof, _bytes(v["root"])
            )
        case "consistency":
            merkle.verify_consistency(v["size1"], v["size2"], proof, _bytes(v["root1"]), _bytes(v["root2"]))
        case "subtreeinclusion":
            merkle.verify_subtree_inclusion(
                _bytes(v["leafHash"]), v["leafIdx"], v["start"], v["end"], proof, _bytes(v["root"])
            )
        case "subtreeconsistency":
            merkle.verify_subtree_consistency(
                v["start"], v["end"], v["size"], proof, _bytes(v["root1"]), _bytes(v["root2"])
            )


@needs_vectors
def test_all_518_vectors_agree() -> None:
    ran: Counter[str] = Counter()
    wrong = []
    for path in sorted(VECTORS.rglob("*.json")):
        vector = json.loads(path.read_bytes())
        family = path.relative_to(VECTORS).parts[0]
        try:
            _verify(family, vector)
            refused = False
        except VerificationError:
            refused = True
        ran[family] += 1
        if refused != vector["wantErr"]:
            wrong.append(str(path.relative_to(VECTORS)))
    assert not wrong
    assert ran == {"inclusion": 98, "consistency": 98, "subtreeinclusion": 204, "subtreeconsistency": 118}
