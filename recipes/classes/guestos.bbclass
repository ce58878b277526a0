# SPDX-License-Identifier: Apache-2.0
# Makes a GuestOS of an image recipe: file system image, dm-verity tree, signed configuration, certificate chain, by
# `trustme guestos`, the program that the reference image is built with.
#
#   inherit image guestos
#
# Beside the recipe lie guestos.toml and, if there is any, files/. The result is a store of its own,
#   ${DEPLOY_DIR_IMAGE}/guestos/${PN}/operatingsystems/NAME-VERSION.conf|.sig|.cert, NAME-VERSION/IMAGE.img|.hash.img
# TRUSTME_STORE_RECIPES names the recipes whose GuestOSes go to the disk image. Who signs: trustme_sign.bbclass. This
# layer's README.md explains the variables.

inherit trustme_sign features_check

REQUIRED_DISTRO_FEATURES = "trustme usrmerge"

GUESTOS_DIR ?= "${FILE_DIRNAME}"
GUESTOS_TOML ?= "${GUESTOS_DIR}/guestos.toml"
GUESTOS_ROOTFS ?= "${IMAGE_ROOTFS}"
GUESTOS_IMAGES ?= ""
GUESTOS_SIZE_LIMIT ?= "256"
GUESTOS_SIGNER ?= "guestos"
GUESTOS_ALLOW_EXPIRED ?= "0"
GUESTOS_SIGNING_NETWORK ?= "0"
GUESTOS_EPOCH ?= "${@guestos_epoch(d)}"
GUESTOS_VERSION ?= "${@guestos_version(d)}"

# Nothing of an image but its root: no file system of its own, no kernel, no packages that set a system up.
IMAGE_FSTYPES = ""
IMAGE_LINGUAS = ""
NO_RECOMMENDATIONS = "1"
ROOTFS_BOOTSTRAP_INSTALL = ""
KERNELDEPMODDEPEND = ""
KERNEL_DEPLOY_DEPEND = ""
USE_DEPMOD = "0"

# Not among the paths that pseudo keeps a record of, as everything that is deployed must be.
GUESTOS_OUT = "${WORKDIR}/deploy-${PN}-guestos"

# Where things lie is no part of what they are: hashes follow the contents of the files. Of who signs, they follow the
# certificate alone: whoever has no key takes what somebody with the key has built from the shared state.
GUESTOS_DIR[vardepvalue] = ""
GUESTOS_CHECKSUMS = "${GUESTOS_TOML}:True ${@guestos_files(d)}"
GUESTOS_CERTIFICATE = "${@guestos_certificate(d)}"
GUESTOS_PKCS11 = "${@'python3-pkcs11-native:do_populate_sysroot' if d.getVar('TRUSTME_SIGNING_KEY').startswith('pkcs11:') else ''}"

def guestos_files(d):
    """What else goes into the images, for [file-checksums]: files/ beside guestos.toml, further images that exist."""
    paths = [os.path.join(os.path.dirname(d.getVar("GUESTOS_TOML")), "files")]
    paths += [image.partition("=")[2] for image in d.getVar("GUESTOS_IMAGES").split()]
    return " ".join(path + ":True" for path in paths if os.path.exists(path))

def guestos_certificate(d):
    """The signer's certificate, for [file-checksums]; nothing as long as a development build has not made it."""
    path = trustme_certificate(d, "SIGNING", d.getVar("GUESTOS_SIGNER"))
    return path + ":True" if os.path.exists(path) else ""

def guestos_epoch(d):
    """Seconds since 1970: SOURCE_DATE_EPOCH of who started bitbake, or the last commit of the recipe's repository.

    Not bitbake's own SOURCE_DATE_EPOCH: for an image that is a constant, and a version must count up. No hash
    depends on it: a GuestOS whose content is the same stays the one that was built, with its version.
    """
    given = d.getVar("BB_ORIGENV", False).getVar("SOURCE_DATE_EPOCH")
    return given or trustme_layer.checkout.commit_epoch(d.getVar("GUESTOS_DIR"))

# nooelint: oelint.vars.mispell.unknown - a function, not a variable
guestos_epoch[vardepsexclude] = "BB_ORIGENV"

def guestos_version(d):
    """The version as GyroidOS counts: YYYYMMDDHHMMSS (UTC) of GUESTOS_EPOCH."""
    import time

    epoch = d.getVar("GUESTOS_EPOCH")
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(int(epoch))) if epoch.isdigit() else ""

def guestos_run(d, words, secret=""):
    """Run `trustme`; what it refuses is the build's error, word for word. `secret`: a file, given by descriptor."""
    import subprocess

    descriptors = ()
    try:
        if secret:
            descriptors = (os.open(secret, os.O_RDONLY | os.O_CLOEXEC),)
            words = words + ["--passphrase-fd", str(descriptors[0])]
        done = subprocess.run(
            ["trustme"] + words,
            env=dict(os.environ, PATH=d.getVar("PATH"), SOURCE_DATE_EPOCH=d.getVar("GUESTOS_EPOCH")),
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        bb.fatal("%s: %s" % (error.filename or "trustme", error.strerror))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if done.returncode:
        bb.fatal("the GuestOS of %s cannot be built:\n%s" % (d.getVar("PN"), done.stderr.strip()))
    bb.note(done.stderr + done.stdout)

# The packages are installed; the rest of [content] is done by the code of the reference builder.
guestos_finish_rootfs[doc] = "Does the rest of [content] of guestos.toml in the root"
python guestos_finish_rootfs() {
    guestos_run(d, ["guestos", "finish", d.getVar("GUESTOS_TOML"), d.getVar("GUESTOS_ROOTFS")])
}
ROOTFS_POSTPROCESS_COMMAND += "guestos_finish_rootfs"
do_rootfs[depends] += "trustme-tools-native:do_populate_sysroot"
do_rootfs[file-checksums] += "${GUESTOS_CHECKSUMS}"

do_guestos[doc] = "Makes the images, hash trees, signed configuration and certificate chain of the GuestOS"
fakeroot python do_guestos() {
    version = d.getVar("GUESTOS_VERSION")
    if not version:
        bb.fatal(
            "the GuestOS of %s has no version: %s is in no git repository; set GUESTOS_VERSION and GUESTOS_EPOCH, or "
            "SOURCE_DATE_EPOCH in the environment" % (d.getVar("PN"), d.getVar("GUESTOS_DIR"))
        )
    words = ["guestos", "build", d.getVar("GUESTOS_TOML"), d.getVar("GUESTOS_ROOTFS")]
    words += ["--out", d.getVar("GUESTOS_OUT"), "--version", version]
    for image in d.getVar("GUESTOS_IMAGES").split():
        words += ["--image", image]
    if d.getVar("GUESTOS_SIZE_LIMIT"):
        words += ["--size-limit", d.getVar("GUESTOS_SIZE_LIMIT")]
    if bb.utils.to_boolean(d.getVar("GUESTOS_ALLOW_EXPIRED")):
        words += ["--allow-expired"]
    signer, passphrase = trustme_signer(d, "SIGNING", d.getVar("TRUSTME_SIGNING_COMMAND"), d.getVar("GUESTOS_SIGNER"))
    guestos_run(d, words + signer, passphrase)
}
addtask guestos after do_image before do_build
do_guestos[dirs] = "${TOPDIR}"
do_guestos[cleandirs] = "${GUESTOS_OUT}"
do_guestos[depends] += " \
    trustme-tools-native:do_populate_sysroot \
    virtual/fakeroot-native:do_populate_sysroot \
    ${TRUSTME_SIGN_DEPENDS} \
    ${GUESTOS_PKCS11} \
"
do_guestos[file-checksums] += "${GUESTOS_CHECKSUMS} ${GUESTOS_CERTIFICATE}"

SSTATETASKS += "do_guestos"
do_guestos[sstate-inputdirs] = "${GUESTOS_OUT}"
do_guestos[sstate-outputdirs] = "${DEPLOY_DIR_IMAGE}/guestos/${PN}"

do_guestos_setscene[doc] = "Takes the finished GuestOS from the shared state"
python do_guestos_setscene() {
    sstate_setscene(d)
}
addtask do_guestos_setscene

# nooelint: oelint.task.noanonpython - only here a flag can depend on a variable: bitbake does not expand this one
python() {
    # Tasks have no network; an HSM or a signing service may be behind one.
    if bb.utils.to_boolean(d.getVar("GUESTOS_SIGNING_NETWORK")):
        d.setVarFlag("do_guestos", "network", "1")
}
