# SPDX-License-Identifier: Apache-2.0
# A recipe made of Python packages of the checkout that this layer lies in. SRC_URI names them (file://trustme_init);
# bitbake hashes every file below them, so that a changed line builds anew and an untouched checkout is taken from
# sstate, wherever it lies. Nothing is compiled: the byte code is made by the Python of this build.

inherit python3native python3-dir

# nooelint: oelint.vars.fileextrapaths,oelint.vars.outofcontext
FILESEXTRAPATHS:prepend := "${TRUSTME_CHECKOUT}/src:${TRUSTME_CHECKOUT}:"

LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57"
SRC_URI += "file://LICENSE"
S = "${UNPACKDIR}"

# Python only: neither a cross compiler nor a C library.
INHIBIT_DEFAULT_DEPS = "1"

do_configure[noexec] = "1"
do_compile[noexec] = "1"

# Copy a package of the checkout without what only people and type checkers read.
# $1 package  $2 directory that gets it
trustme_install_package() {
    install -d "$2"
    (cd "${S}" && find "$1" -name __pycache__ -prune -o -type f -name '*.py' -print) | sort | while read -r file; do
        install -D -m 0644 "${S}/$file" "$2/$file"
    done
    # Unchecked: no source is opened at start. SOURCE_DATE_EPOCH would else choose hashes checked at every start.
    nativepython3 -m compileall -q -f --invalidation-mode unchecked-hash -s "${D}" -p / "$2/$1"
}

# nooelint: oelint.task.noanonpython
python () {
    if not os.path.isfile(os.path.join(d.getVar('TRUSTME_CHECKOUT'), 'src/trustme_init/__init__.py')):
        raise bb.parse.SkipRecipe('meta-trustme-py does not lie in a checkout of trustme-py, whose src/ this is built from')
}
