# SPDX-License-Identifier: Apache-2.0
SUMMARY = "Core container of trustme-py"
DESCRIPTION = "The GuestOS that the base system starts by itself: it manages the device through the control socket."
SECTION = "base"
LICENSE = "Apache-2.0"
CVE_PRODUCT = "trustme-py"

inherit image guestos

# Nothing that a build switches on for all images, such as logging in without a password.
IMAGE_FEATURES = ""

# The CA in UEFI db vouches for this signer.
GUESTOS_SIGNER = "ssig_cml"

# In the order of content.packages, python_packages and trustme_packages of guestos.toml.
IMAGE_INSTALL = "\
    base-files \
    busybox \
    python3-io \
    python3-core \
    python3-protobuf \
    trustme-init-control \
"
