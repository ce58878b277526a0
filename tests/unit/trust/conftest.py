# SPDX-License-Identifier: Apache-2.0
"""Keys are slow to make: each kind once per session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import settings

from tests.unit.trust.pki import OpensslCa

# A shared, busy machine is no reason for a property test to fail.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

CA_EXTENSIONS = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
# As upstream's signer: the interoperability notes, section 2.9.
LEAF_EXTENSIONS = ("basicConstraints=CA:FALSE", "keyUsage=nonRepudiation,digitalSignature,keyEncipherment")
PSS_64 = ("-sha512", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-1")


@dataclass(frozen=True)
class PssPki:
    """Upstream's CML branch: a plain RSA root, then a sub CA and a leaf with id-RSASSA-PSS keys."""

    ca: OpensslCa
    root: x509.Certificate
    sub: x509.Certificate
    leaf: x509.Certificate
    root_key: Path
    sub_key: Path
    leaf_key: Path


@pytest.fixture(scope="session")
def openssl_ca(tmp_path_factory: pytest.TempPathFactory) -> OpensslCa:
    return OpensslCa(tmp_path_factory.mktemp("openssl"))


@pytest.fixture(scope="session")
def pss(openssl_ca: OpensslCa) -> PssPki:
    root_key = openssl_ca.key("root", "RSA")
    sub_key, leaf_key = openssl_ca.key("sub"), openssl_ca.key("leaf")
    root = openssl_ca.issue("root", root_key, CA_EXTENSIONS, None, "-sha512")
    sub = openssl_ca.issue("sub", sub_key, CA_EXTENSIONS, (root, root_key), "-sha512")
    leaf = openssl_ca.issue("leaf", leaf_key, LEAF_EXTENSIONS, (sub, sub_key), *PSS_64)
    return PssPki(openssl_ca, root, sub, leaf, root_key, sub_key, leaf_key)
