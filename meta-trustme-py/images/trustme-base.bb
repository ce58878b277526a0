# SPDX-License-Identifier: Apache-2.0
SUMMARY = "The base system: a signed UKI, and a disk with it and the store of GuestOSes"
DESCRIPTION = "Deploys trustme-base.img, trustme-base.efi, pki/ and manifest.json, the four parts of the reference image."
SECTION = "base"
LICENSE = "Apache-2.0"

inherit image uki trustme_sign features_check

REQUIRED_DISTRO_FEATURES = "trustme"
COMPATIBLE_HOST = "x86_64.*-linux"

# The disk has no root file system: what image classes call so is the store.
PACKAGE_INSTALL = ""
IMAGE_FEATURES = ""
IMAGE_LINGUAS = ""
NO_RECOMMENDATIONS = "1"
IMAGE_FSTYPES = "wic"
IMAGE_CLASSES:remove = "qemuboot"
EXTRA_IMAGEDEPENDS = ""
WKS_FILES = "trustme-base.wks"
# No boot loader: the firmware starts the UKI itself.
WKS_FILE_DEPENDS = "e2fsprogs-native"
IMAGE_BOOT_FILES = "trustme-base.efi;EFI/BOOT/BOOTX64.EFI"

UKI_FILENAME = "trustme-base-unsigned.efi"
UKI_CMDLINE = "${TRUSTME_COMMAND_LINE}"

TRUSTME_BASE_TOOL = "nativepython3 ${TRUSTME_LAYER_LIB}/trustme_layer/base.py"
TRUSTME_BASE_CHECKSUM = "${TRUSTME_LAYER_LIB}/trustme_layer/base.py:True"
TRUSTME_STORE_DIRS = "${@' '.join('${DEPLOY_DIR_IMAGE}/guestos/%s' % name for name in d.getVar('TRUSTME_STORE_RECIPES').split())}"
TRUSTME_STORE = "${WORKDIR}/trustme-store"

# --- the store ---
do_store() {
    trustme guestos collect --force --out ${TRUSTME_STORE} ${TRUSTME_STORE_DIRS} || bbfatal "the store cannot be made, see above"
}
do_store[depends] += "${@' '.join('%s:do_guestos' % name for name in d.getVar('TRUSTME_STORE_RECIPES').split())}"
addtask store after do_prepare_recipe_sysroot before do_image

# Before the file systems are made, after everything that a package manager leaves.
IMAGE_PREPROCESS_COMMAND += "trustme_fill_store"
trustme_fill_store() {
    find ${IMAGE_ROOTFS} -mindepth 1 -delete
    cp -R --no-preserve=ownership ${TRUSTME_STORE}/. ${IMAGE_ROOTFS}
    chmod -R u=rwX,go=rX ${IMAGE_ROOTFS}
}

# --- the UKI ---
do_sign_uki() {
    ${TRUSTME_BASE_TOOL} sign-uki --limit ${TRUSTME_UKI_LIMIT} ${@trustme_uki_signer(d)} \
        ${DEPLOY_DIR_IMAGE}/${UKI_FILENAME} ${DEPLOY_DIR_IMAGE}/trustme-base.efi || bbfatal "the UKI is not signed, see above"
}
do_sign_uki[depends] += "${TRUSTME_SIGN_DEPENDS}"
do_sign_uki[file-checksums] += "${TRUSTME_BASE_CHECKSUM} ${@trustme_certificate_checksum(d, 'UKI', 'DB')}"
addtask sign_uki after do_uki before do_image_wic

# --- the image directory ---
do_image_directory() {
    ${TRUSTME_BASE_TOOL} deploy --out ${IMGDEPLOYDIR} --wic ${IMGDEPLOYDIR}/${IMAGE_NAME}.wic \
        --uki ${DEPLOY_DIR_IMAGE}/trustme-base.efi --store ${TRUSTME_STORE} \
        --initramfs ${DEPLOY_DIR_IMAGE}/${INITRAMFS_IMAGE}-${MACHINE}.${INITRAMFS_FSTYPES} \
        --packages ${DEPLOY_DIR_IMAGE}/${INITRAMFS_IMAGE}-${MACHINE}.manifest \
        --policy ${DEPLOY_DIR_IMAGE}/trustme-policy.toml --pki ${TRUSTME_PKI_DIR} \
        --uki-cert ${@trustme_certificate(d, 'UKI', 'DB')} \
        --core ${TRUSTME_CORE_GUESTOS} --hardware ${TRUSTME_HARDWARE} --machine ${MACHINE} \
        --image-version ${TRUSTME_VERSION} --epoch ${TRUSTME_BUILD_EPOCH} --data-space ${TRUSTME_DATA_SPACE} \
        --development ${TRUSTME_DEVELOPMENT} || bbfatal "the image directory cannot be made, see above"
}
do_image_directory[depends] += "trustme-policy:do_deploy"
do_image_directory[file-checksums] += "${TRUSTME_BASE_CHECKSUM} ${@trustme_certificate_checksum(d, 'UKI', 'DB')}"
addtask image_directory after do_image_wic do_sign_uki before do_image_complete
