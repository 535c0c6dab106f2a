"""The thin app bundle: no code in it, the same bytes everywhere."""

import io
import zipfile

from flwr.cli.config_utils import get_fab_config, get_fab_metadata

from fedfuse_shared.bundle import bundle, bundle_hash


def test_it_carries_settings_alone():
    with zipfile.ZipFile(io.BytesIO(bundle())) as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def test_flower_reads_it():
    assert get_fab_metadata(bundle()) == ("fedfuse/fedfuse", "1.0.0")
    components = get_fab_config(bundle())["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "fedfuse_server.app:app", "clientapp": "fedfuse_client.app:app"}


def test_its_bytes_are_pinned():
    """Policies name this hash: whoever changes the bundle has to tell every site."""
    assert bundle_hash() == "41cfd89b728008464ad69dcdd3801d836b65b8ad8670b3971037414cb23d08c6"
