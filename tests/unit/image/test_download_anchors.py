# SPDX-License-Identifier: Apache-2.0
"""The authorities of download servers: what may go into an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.trust import pki
from trustme_tools.errors import UsageError
from trustme_tools.image.cli import read_download_anchors

CA = pki.issue(pki.ROOT)


def test_authorities_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "anchors.pem"
    path.write_bytes(pki.bundle(CA, pki.issue(pki.SUB, CA)))
    assert read_download_anchors(path) == path.read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"no PEM", pki.bundle(CA, pki.issue(pki.LEAF, CA))])
def test_anything_else_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "anchors.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_download_anchors(path)
    assert caught.value.code == "bad-download-anchors"
