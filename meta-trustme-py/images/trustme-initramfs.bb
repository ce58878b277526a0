# SPDX-License-Identifier: Apache-2.0
SUMMARY = "The initramfs: Python as first process, its libraries, a handful of programs"
DESCRIPTION = "Everything that runs outside of containers. The UKI carries it; its first process is /init of trustme-init."
SECTION = "base"
LICENSE = "Apache-2.0"

inherit image python3native features_check

REQUIRED_DISTRO_FEATURES = "trustme"

# By name and nothing else: what an image class or a machine would add has no place here.
PACKAGE_INSTALL = "trustme-init trustme-policy kernel-base ${TRUSTME_MODULE_PACKAGES} ${TRUSTME_INITRAMFS_INSTALL}"
# Drivers of a machine that are modules there (kernel-module-…); the layer's kernel has the rest built in.
TRUSTME_MODULE_PACKAGES ?= ""
TRUSTME_INITRAMFS_INSTALL ?= ""
PACKAGE_EXCLUDE = "kernel-image-*"
NO_RECOMMENDATIONS = "1"
IMAGE_FEATURES = ""
IMAGE_LINGUAS = ""
IMAGE_FSTYPES = "${INITRAMFS_FSTYPES}"
# uki.bbclass looks for IMAGE-MACHINE.TYPE.
IMAGE_NAME_SUFFIX = ""
IMAGE_CLASSES:remove = "qemuboot"
EXTRA_IMAGEDEPENDS = ""
# The UKI's limit is checked where the whole is known; this is the unpacked size, in KiB.
INITRAMFS_MAXSIZE = "262144"

# Directories and nodes are made from a table: the kernel opens /dev/console before anything is mounted.
USE_DEVFS = "0"
IMAGE_DEVICE_TABLES = "files/device_table-trustme.txt"

# After everything that a package manager does.
IMAGE_PREPROCESS_COMMAND += "trustme_accounts trustme_prune trustme_byte_code"

# Names for two programs that want them; nobody logs in.
trustme_accounts() {
    printf 'root:x:0:0:root:/root:/usr/sbin/nologin\n' > ${IMAGE_ROOTFS}${sysconfdir}/passwd
    printf 'root:x:0:\n' > ${IMAGE_ROOTFS}${sysconfdir}/group
}

# The package manager's traces, and files of packages that no process here reads.
trustme_prune() {
    rm -rf ${IMAGE_ROOTFS}/boot ${IMAGE_ROOTFS}/home ${IMAGE_ROOTFS}/media ${IMAGE_ROOTFS}/mnt \
        ${IMAGE_ROOTFS}${localstatedir}/* ${IMAGE_ROOTFS}${sysconfdir}/default ${IMAGE_ROOTFS}${sysconfdir}/rc?.d \
        ${IMAGE_ROOTFS}${sysconfdir}/init.d
}

# Byte code in the place of the sources, never checked against them: an import costs a quarter. Our own package
# keeps its sources for the sake of tracebacks.
trustme_byte_code() {
    python=${IMAGE_ROOTFS}${libdir}/${PYTHON_DIR}
    find $python -name __pycache__ -path "*/trustme_init/*" -prune -o -name __pycache__ -type d -print | xargs rm -rf
    nativepython3 -m compileall -q -f -b --invalidation-mode unchecked-hash -x '/trustme_init/' \
        -s ${IMAGE_ROOTFS} -p / $python
    find $python -name '*.py' -not -path '*/trustme_init/*' | while read -r source; do
        [ ! -e "${source}c" ] || rm "$source"
    done
}
