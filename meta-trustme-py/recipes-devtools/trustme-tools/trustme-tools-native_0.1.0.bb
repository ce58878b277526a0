# SPDX-License-Identifier: Apache-2.0
SUMMARY = "Host side of trustme-py: keys, GuestOSes, images"
DESCRIPTION = "The `trustme` command from the checkout that this layer lies in, so that recipes build and sign with the \
same code that makes the reference image."
SECTION = "devel"
LICENSE = "Apache-2.0"
CVE_PRODUCT = "trustme-py"

SRC_URI = " \
    file://trustme_init \
    file://trustme_tools \
    file://trustme \
    "

inherit trustme_source
# nooelint: oelint.var.inheritlast.native
inherit_defer native

# What the programs that it runs need: images and hash trees, signatures, the disk.
RDEPENDS:${PN} = " \
    cryptsetup-native \
    e2fsprogs-native \
    erofs-utils-native \
    openssl-native \
    python3-cryptography-native \
    python3-native \
    python3-pefile-native \
    python3-protobuf-native \
    sbsigntool-native \
    squashfs-tools-native \
    util-linux-native \
    "

do_install() {
    trustme_install_package trustme_init ${D}${PYTHON_SITEPACKAGES_DIR}
    trustme_install_package trustme_tools ${D}${PYTHON_SITEPACKAGES_DIR}
    install -d ${D}${bindir}
    install -m 0755 ${UNPACKDIR}/trustme ${D}${bindir}/trustme
}
