# SPDX-License-Identifier: Apache-2.0
SUMMARY = "Python bindings of the TPM 2.0 software stack"
DESCRIPTION = "ESYS, marshalling, TCTIs and response codes of tpm2-tss. The version in meta-tpm, 2.3.0, does not work \
with the Python 3.14 of this release; this one needs cryptography 47."
HOMEPAGE = "https://github.com/tpm2-software/tpm2-pytss"
BUGTRACKER = "https://github.com/tpm2-software/tpm2-pytss/issues"
SECTION = "devel/python"
LICENSE = "BSD-2-Clause"
LIC_FILES_CHKSUM = "file://LICENSE;md5=500b2e742befc3da00684d8a1d5fd9da"
DEPENDS = " \
    python3-cffi-native \
    python3-cryptography-native \
    python3-packaging-native \
    python3-pkgconfig-native \
    python3-pycparser-native \
    python3-setuptools-scm-native \
    tpm2-tss \
    "

PYPI_PACKAGE = "tpm2_pytss"
UPSTREAM_CHECK_PYPI_PACKAGE = "tpm2_pytss"
SRC_URI[sha256sum] = "c193cf1908b482f93c4aa464132920fe3a37d4b9d802e267974ff2dfe37d4433"

inherit pkgconfig pypi python_setuptools_build_meta

# The distro chooses it by name: other users of meta-tpm keep theirs.
DEFAULT_PREFERENCE = "-1"

# setup.py preprocesses a header with CC as the name of one program, without arguments.
do_compile:prepend() {
    printf '#!/bin/sh\nexec %s "$@"\n' '${CC}' > ${WORKDIR}/one-word-cc
    chmod 0755 ${WORKDIR}/one-word-cc
    export CC=${WORKDIR}/one-word-cc
}

RDEPENDS:${PN} += "\
    python3-cffi \
    python3-core \
    python3-crypt \
    python3-cryptography \
    python3-io \
    python3-json \
    python3-logging \
    python3-netclient \
    python3-packaging \
    "
