# SPDX-License-Identifier: Apache-2.0
# Who signs: the UKI (its certificate is in the firmware's db) and the GuestOSes (guestos.bbclass of the layer recipes/).
#
# Development (TRUSTME_DEVELOPMENT = "1", the default): `trustme-pki` makes keys in TRUSTME_PKI_DIR if it has none.
# Release: TRUSTME_PKI_DIR names a directory of `trustme pki create`, or signers are named one by one. No key is ever in
# a layer, in a log or in the hash of a task; the certificates are in the hash, so that another one builds anew.
#
#   TRUSTME_PKI_DIR              directory of `trustme pki create`; by default beside TMPDIR
#   TRUSTME_PASSPHRASE_FILE      file with the passphrase of its keys (default: the development passphrase)
#   TRUSTME_UKI_KEY              PEM file with the key of the UKI (default: DB of the PKI)
#   TRUSTME_UKI_CERTIFICATE      its certificate, PEM
#   TRUSTME_UKI_SIGN_COMMAND     instead of a key, for one in an HSM: `COMMAND UNSIGNED SIGNED` writes the signed UKI
#   TRUSTME_SIGNING_KEY          key of GuestOSes: a PEM file or a pkcs11: URI (default: from the PKI)
#   TRUSTME_SIGNING_CERTIFICATE  its chain, leaf first, PEM
#   TRUSTME_SIGNING_COMMAND      instead of a key: reads the configuration on stdin, writes the raw signature on stdout
#
# A task that signs has do_x[depends] += "${TRUSTME_SIGN_DEPENDS}" and its certificate in do_x[file-checksums].

inherit python3native

TRUSTME_PASSPHRASE_FILE ?= ""
TRUSTME_UKI_KEY ?= ""
TRUSTME_UKI_CERTIFICATE ?= ""
TRUSTME_UKI_SIGN_COMMAND ?= ""
TRUSTME_SIGNING_KEY ?= ""
TRUSTME_SIGNING_CERTIFICATE ?= ""
TRUSTME_SIGNING_COMMAND ?= ""

DEPENDS += "trustme-tools-native"
TRUSTME_SIGN_DEPENDS = "trustme-pki:do_pki"

def trustme_certificate(d, prefix, name):
    """Return the path of the certificate of what signs: `prefix` UKI or SIGNING, `name` in the PKI directory."""
    return d.getVar('TRUSTME_%s_CERTIFICATE' % prefix) or '%s/%s.cert' % (d.getVar('TRUSTME_PKI_DIR'), name)

def trustme_certificate_checksum(d, prefix, name):
    """Return that certificate as an entry of [file-checksums]; a development PKI may still have to be made."""
    path = trustme_certificate(d, prefix, name)
    return '%s:%s' % (path, os.path.exists(path))

# A recipe is parsed again when the keys of the build appear or change.
# nooelint: oelint.task.noanonpython
python () {
    bb.parse.mark_dependency(d, trustme_certificate(d, 'UKI', 'DB'))
}

def trustme_signer(d, prefix, command, name):
    """Return (options that say who signs, file with the passphrase or ""); an error for a choice that is not clear."""
    key = d.getVar('TRUSTME_%s_KEY' % prefix)
    certificate = d.getVar('TRUSTME_%s_CERTIFICATE' % prefix)
    if key and command:
        bb.fatal('TRUSTME_%s_KEY and a signing command are both set: say which of them signs' % prefix)
    if (key or command) and not certificate:
        bb.fatal('TRUSTME_%s_CERTIFICATE is not set: it names the certificate of the key that signs' % prefix)
    if certificate and not (key or command):
        bb.fatal('TRUSTME_%s_CERTIFICATE is set, and neither a key nor a command that signs for it' % prefix)
    if key:
        options = ['--key', key, '--cert', certificate]
    elif command:
        options = ['--sign-command', command, '--cert', certificate]
    else:
        options = ['--pki', d.getVar('TRUSTME_PKI_DIR'), '--signer', name]
    return options, d.getVar('TRUSTME_PASSPHRASE_FILE') or ''

def trustme_uki_signer(d):
    """Return the options of base.py that say who signs the UKI, as words for the shell."""
    import shlex

    options, passphrase = trustme_signer(d, 'UKI', d.getVar('TRUSTME_UKI_SIGN_COMMAND'), 'DB')
    words = ' '.join(shlex.quote(option) for option in options)
    # The task's shell opens the file: a passphrase is never an argument.
    return words + ' --passphrase-fd 9 9<%s' % shlex.quote(passphrase) if passphrase else words
