# SPDX-License-Identifier: Apache-2.0
# Applets that the GuestOSes of this layer link to and that OpenEmbedded leaves out; other distros are not touched.
FILESEXTRAPATHS:prepend:trustme := "${THISDIR}/${BPN}:"

SRC_URI:append:trustme = " file://guestos.cfg"
