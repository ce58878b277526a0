# SPDX-License-Identifier: Apache-2.0
SUMMARY = "Example service container"
DESCRIPTION = "A small GuestOS to copy from: a service on TCP port 8080 that counts its starts on a volume of its own."
SECTION = "base"
LICENSE = "Apache-2.0"
CVE_PRODUCT = "trustme-py"

inherit image guestos

# Nothing that a build switches on for all images, such as logging in without a password.
IMAGE_FEATURES = ""

# In the order of content.packages of guestos.toml.
IMAGE_INSTALL = "\
    busybox \
    netcat-openbsd \
"
