# SPDX-License-Identifier: Apache-2.0
SUMMARY = "The keys that this build signs with"
DESCRIPTION = "Makes a development PKI in TRUSTME_PKI_DIR if there is none, and refuses development keys for a release."
SECTION = "security"
LICENSE = "Apache-2.0"
# There is nothing to fetch: the task that counts runs a program.
# nooelint: oelint.var.licenseremotefile
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/Apache-2.0;md5=89aea4e17d99a7cacdbeed46a0096b10"
CVE_PRODUCT = "trustme-py"

SRC_URI = ""

inherit trustme_sign nopackages features_check

REQUIRED_DISTRO_FEATURES = "trustme"
INHIBIT_DEFAULT_DEPS = "1"
PACKAGE_ARCH = "${MACHINE_ARCH}"

do_fetch[noexec] = "1"
do_unpack[noexec] = "1"
do_patch[noexec] = "1"
do_configure[noexec] = "1"
do_compile[noexec] = "1"
do_install[noexec] = "1"

do_pki() {
    pki="${TRUSTME_PKI_DIR}"
    if [ -e "$pki/DB.cert" ]; then
        if [ "${TRUSTME_DEVELOPMENT}" != 1 ] && [ -e "$pki/DEVELOPMENT-ONLY" ]; then
            bbfatal "$pki holds development keys, which everybody has; a release image is not signed with them." \
                "Make keys with \`trustme pki create\` and set TRUSTME_PKI_DIR"
        fi
    elif [ -n "${TRUSTME_UKI_CERTIFICATE}" ] && [ -n "${TRUSTME_SIGNING_CERTIFICATE}" ]; then
        bbnote "every signer is named by itself: no PKI directory is needed"
    elif [ "${TRUSTME_DEVELOPMENT}" = 1 ]; then
        trustme pki create --development "$pki"
    else
        bbfatal "there are no keys in $pki, and a build makes none for a release. Make them with" \
            "\`trustme pki create\` and set TRUSTME_PKI_DIR, or set TRUSTME_UKI_* and TRUSTME_SIGNING_*"
    fi
}
addtask pki after do_prepare_recipe_sysroot before do_build
# Keys that somebody removed are made anew.
do_pki[file-checksums] += "${@trustme_certificate_checksum(d, 'UKI', 'DB')}"
# One build makes them, others that share the directory wait.
do_pki[lockfiles] += "${TRUSTME_PKI_DIR}.lock"
