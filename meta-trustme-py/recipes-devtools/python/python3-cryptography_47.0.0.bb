# SPDX-License-Identifier: Apache-2.0
SUMMARY = "Cryptographic primitives for Python"
DESCRIPTION = "OpenEmbedded-Core has 46.0.5; tpm2-pytss 3.0.0, the one that works with Python 3.14, needs 47."
HOMEPAGE = "https://cryptography.io/"
BUGTRACKER = "https://github.com/pyca/cryptography/issues"
SECTION = "devel/python"
LICENSE = "Apache-2.0 | BSD-3-Clause"
LIC_FILES_CHKSUM = " \
    file://LICENSE;md5=8c3617db4fb6fae01f1d253ab91511e4 \
    file://LICENSE.APACHE;md5=4e168cce331e5c827d4c2b68a6200e1b \
    file://LICENSE.BSD;md5=5ae30ba4123bc4f2fa49aa0b0dce887b \
    "
DEPENDS = " \
    openssl \
    python3-cffi-native \
    "
CVE_PRODUCT = "cryptography.io:cryptography pyca:cryptography"

SRC_URI[sha256sum] = "9f8e55fe4e63613a5e1cc5819030f27b97742d720203a087802ce4ce9ceb52bb"
require ${BPN}-crates.inc

inherit cargo-update-recipe-crates pkgconfig pypi python_maturin

# The distro chooses it by name: other users of OpenEmbedded-Core keep theirs.
DEFAULT_PREFERENCE = "-1"

LDSHARED += "-pthread"
# MD4, RC4 and their like: nothing here uses them.
export CRYPTOGRAPHY_BUILD_OPENSSL_NO_LEGACY = "1"

FILES:${PN}-dbg += "${PYTHON_SITEPACKAGES_DIR}/cryptography/hazmat/bindings/.debug"

RDEPENDS:${PN} += "python3-cffi"
RDEPENDS:${PN}:append:class-target = " \
    python3-crypt \
    python3-datetime \
    python3-email \
    python3-math \
    python3-netclient \
    python3-numbers \
    python3-threading \
    "

BBCLASSEXTEND = "native"
