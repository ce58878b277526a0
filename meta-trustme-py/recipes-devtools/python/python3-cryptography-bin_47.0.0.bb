# SPDX-License-Identifier: Apache-2.0
SUMMARY = "Cryptographic primitives for Python, as compiled by its authors"
DESCRIPTION = "The wheel that the authors publish, instead of hours for LLVM and Rust. It has an OpenSSL of its own \
inside, which a scan of the image's openssl does not see: follow the project's security advisories. \
kas/prebuilt-cryptography.yml chooses it; the default is the source build."
HOMEPAGE = "https://cryptography.io/"
BUGTRACKER = "https://github.com/pyca/cryptography/issues"
SECTION = "devel/python"
LICENSE = "Apache-2.0 | BSD-3-Clause"
LIC_FILES_CHKSUM = " \
    file://cryptography-${PV}.dist-info/licenses/LICENSE;md5=8c3617db4fb6fae01f1d253ab91511e4 \
    file://cryptography-${PV}.dist-info/licenses/LICENSE.APACHE;md5=4e168cce331e5c827d4c2b68a6200e1b \
    file://cryptography-${PV}.dist-info/licenses/LICENSE.BSD;md5=5ae30ba4123bc4f2fa49aa0b0dce887b \
    "
PROVIDES = "python3-cryptography"
# The wheel's OpenSSL is looked up for vulnerabilities too.
CVE_PRODUCT = "cryptography.io:cryptography pyca:cryptography openssl:openssl"

# The wheel of the machine that the recipe is built for, which is the build host for -native.
WHEEL_ARCH = "${HOST_ARCH}"
WHEEL = "cryptography-${PV}-cp311-abi3-manylinux_2_34_${WHEEL_ARCH}.whl"
# Under the name of what a wheel is, so that the fetcher unpacks it.
# nooelint: oelint.vars.srcurichecksum
SRC_URI = "https://files.pythonhosted.org/packages/cp311/c/cryptography/${WHEEL};name=${WHEEL_ARCH};downloadfilename=${WHEEL}.zip;subdir=wheel"
SRC_URI[x86_64.sha256sum] = "4e1de79e047e25d6e9f8cea71c86b4a53aced64134f0f003bbcbf3655fd172c8"
SRC_URI[aarch64.sha256sum] = "6f29f36582e6151d9686235e586dd35bb67491f024767d10b842e520dc6a07ac"

UPSTREAM_CHECK_URI = "https://pypi.org/simple/cryptography/"
UPSTREAM_CHECK_REGEX = "cryptography-(?P<pver>\d+(\.\d+)+)\.tar\.gz"

S = "${UNPACKDIR}/wheel"

inherit python3-dir

COMPATIBLE_HOST = "(x86_64|aarch64).*-linux"
COMPATIBLE_HOST:libc-musl = "null"

do_configure[noexec] = "1"
do_compile[noexec] = "1"

do_install() {
    install -d ${D}${PYTHON_SITEPACKAGES_DIR}
    cp -R --no-preserve=ownership ${S}/cryptography ${S}/cryptography-${PV}.dist-info ${D}${PYTHON_SITEPACKAGES_DIR}
    rm ${D}${PYTHON_SITEPACKAGES_DIR}/cryptography-${PV}.dist-info/RECORD
}

# Stripped and linked by its authors.
INHIBIT_PACKAGE_STRIP = "1"
INHIBIT_PACKAGE_DEBUG_SPLIT = "1"
# nooelint: oelint.vars.insaneskip
INSANE_SKIP:${PN} = "already-stripped ldflags"

FILES:${PN} += "${PYTHON_SITEPACKAGES_DIR}"
RDEPENDS:${PN} = "python3-cffi"
RDEPENDS:${PN}:append:class-target = " \
    python3-core \
    python3-crypt \
    python3-datetime \
    python3-email \
    python3-math \
    python3-netclient \
    python3-numbers \
    python3-threading \
    "
RPROVIDES:${PN} = "python3-cryptography"
RCONFLICTS:${PN} = "python3-cryptography"
RREPLACES:${PN} = "python3-cryptography"

BBCLASSEXTEND = "native"
