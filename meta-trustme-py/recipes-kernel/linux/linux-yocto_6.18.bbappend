# SPDX-License-Identifier: Apache-2.0
# What the base system needs of its kernel; only the distro asks for it.
# nooelint: oelint.vars.noncoreoverride
# Only for the distro: kernel-yocto takes every fragment of these folders into its hashes.
FILESEXTRAPATHS:prepend:trustme := "${THISDIR}/files:"
SRC_URI:append:trustme = " file://trustme.scc file://trustme.cfg file://trustme-machine.cfg"
KERNEL_FEATURES:append:trustme = " trustme.scc"
# An option that the kernel did not take as we wrote it is an error.
KCONF_AUDIT_LEVEL:trustme = "2"
