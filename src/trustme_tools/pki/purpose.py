# SPDX-License-Identifier: Apache-2.0
"""What a certificate is for, in a person's words, read from the certificate itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from trustme_init.trust.certificate import LIFECYCLE_PURPOSE
from trustme_tools.pki.certificates import extension_value
from trustme_tools.pki.endorsement import EK_PURPOSE
from trustme_tools.pki.request import URI_PREFIX

ROLES: Final[Mapping[str, str]] = {
    "ssig_rootca": "root of software signing; kept offline, on no device",
    "ssig_subca": "goes to db: the anchor of core GuestOSes",
    "ssig_cml": "signs core GuestOSes",
    "gen_rootca": "root of the customer's PKI; kept offline",
    "guestos_subca": "anchor of the customer's GuestOSes (control ca_register)",
    "guestos": "signs the customer's GuestOSes",
    "device_subca": "issues device certificates (sign-device); the device anchor",
    "lifecycle_rootca": "anchor of who signs lifecycle statements (control lifecycle_ca_register)",
    "lifecycle": "signs lifecycle statements (lifecycle sign)",
    "PK": "Secure Boot: owns the platform, signs PK and KEK",
    "KEK": "Secure Boot: signs db and dbx",
    "DB": "Secure Boot: goes to db, signs boot images",
}
"""What the names of a PKI directory stand for."""

_PURPOSES: Final[Mapping[x509.ObjectIdentifier, str]] = {
    ExtendedKeyUsageOID.CODE_SIGNING: "signs software",
    ExtendedKeyUsageOID.CLIENT_AUTH: "authenticates a client",
    ExtendedKeyUsageOID.SERVER_AUTH: "authenticates a server",
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE: "any purpose",
    EK_PURPOSE: "endorsement key of a TPM",
    LIFECYCLE_PURPOSE: "signs lifecycle statements",
}


def describe_purpose(certificate: x509.Certificate) -> str:
    """Return what the extensions say: CA or not, purposes, the device that is named."""
    words = []
    basic = extension_value(certificate.extensions, x509.BasicConstraints)
    if basic is not None and basic.ca:
        kind = "root CA" if certificate.subject == certificate.issuer else "CA"
        limit = {None: "", 0: " that issues no further CA", 1: " of one level of CAs"}
        words.append(f"{kind}{limit.get(basic.path_length, f' of {basic.path_length} levels of CAs')}")
    purposes = extension_value(certificate.extensions, x509.ExtendedKeyUsage) or ()
    words += [_PURPOSES.get(purpose, f"purpose {purpose.dotted_string}") for purpose in purposes]
    words += [f"device {uuid}" for uuid in device_uuids(certificate)]
    if not words:
        usage = extension_value(certificate.extensions, x509.KeyUsage)
        words.append("signs data" if usage is not None and usage.digital_signature else "no stated purpose")
    return ", ".join(words)


def device_uuids(certificate: x509.Certificate) -> list[str]:
    """Return what the `URI:UUID:…` entries of subjectAltName name."""
    names = extension_value(certificate.extensions, x509.SubjectAlternativeName)
    if names is None:
        return []
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return [uri.removeprefix(URI_PREFIX) for uri in uris if uri.startswith(URI_PREFIX)]
