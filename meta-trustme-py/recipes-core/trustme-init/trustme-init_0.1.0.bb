# SPDX-License-Identifier: Apache-2.0
SUMMARY = "The system's first process: verifies and starts the signed core container"
DESCRIPTION = "PID 1 and the manager of the base system, in Python, from the checkout that this layer lies in. \
trustme-init is for the initramfs; trustme-init-control is the client for the core container."
SECTION = "base"
LICENSE = "Apache-2.0"
CVE_PRODUCT = "trustme-py"

SRC_URI = " \
    file://trustme_init \
    file://init \
    "

inherit trustme_source

do_install() {
    trustme_install_package trustme_init ${D}${PYTHON_SITEPACKAGES_DIR}
    install -m 0755 ${UNPACKDIR}/init ${D}/init
}

# What the kernel starts has a name outside of the usual places.
PACKAGES = "${PN}-common ${PN}-control ${PN}"
TRUSTME_DIR = "${PYTHON_SITEPACKAGES_DIR}/trustme_init"

# What the manager and the client share; they are never in the same file system.
# nooelint: oelint.var.filesoverride
FILES:${PN}-common = " \
    ${TRUSTME_DIR}/*.py \
    ${TRUSTME_DIR}/__pycache__ \
    ${TRUSTME_DIR}/control/*.py \
    ${TRUSTME_DIR}/control/__pycache__ \
    ${TRUSTME_DIR}/proto \
    "
# nooelint: oelint.var.filesoverride
FILES:${PN}-control = "${TRUSTME_DIR}/control/cli"
# nooelint: oelint.var.filesoverride
FILES:${PN} = "/init ${TRUSTME_DIR}"

# The standard library in OpenEmbedded's portions: exactly what our modules import (tests/unit/test_layer.py).
RDEPENDS:${PN}-common = " \
    python3-core \
    python3-datetime \
    python3-io \
    python3-protobuf \
    python3-tomllib \
    "
RDEPENDS:${PN}-control = " \
    ${PN}-common \
    python3-json \
    python3-netclient \
    python3-terminal \
    python3-unixadmin \
    "
# python3-core once more: /init names the interpreter, and QA looks at direct dependencies only.
RDEPENDS:${PN} = " \
    ${PN}-common \
    e2fsprogs-mke2fs \
    kmod \
    libtss2-tcti-device \
    python3-cffi \
    python3-core \
    python3-crypt \
    python3-cryptography \
    python3-ctypes \
    python3-fcntl \
    python3-json \
    python3-netclient \
    python3-prctl \
    python3-resource \
    python3-tpm2-pytss \
    util-linux-sfdisk \
    "
