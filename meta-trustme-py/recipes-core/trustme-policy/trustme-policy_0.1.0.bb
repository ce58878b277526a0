# SPDX-License-Identifier: Apache-2.0
SUMMARY = "The policy of this build, signed as a part of the UKI"
DESCRIPTION = "Writes /etc/trustme/policy.toml from the TRUSTME_ variables and lets the device's own parser judge it."
SECTION = "security"
LICENSE = "Apache-2.0"
CVE_PRODUCT = "trustme-py"

SRC_URI = "file://trustme_init"

inherit trustme_source deploy features_check

REQUIRED_DISTRO_FEATURES = "trustme"
# Hardware and modules are the machine's.
PACKAGE_ARCH = "${MACHINE_ARCH}"

python do_write_policy() {
    from pathlib import Path

    values = {name: d.getVar(name) for name in trustme_layer.policy.names().split()}
    try:
        text = trustme_layer.policy.text(values)
    except ValueError as exc:
        bb.fatal('the policy cannot be written: %s' % exc)
    Path(d.getVar('B'), 'policy.toml').write_text(text)
}
do_write_policy[dirs] = "${B}"
do_write_policy[vardeps] += "${@trustme_layer.policy.names()}"
addtask write_policy after do_prepare_recipe_sysroot do_unpack before do_check_policy

do_check_policy() {
    nativepython3 -I -c "
import sys
sys.path.insert(0, '${S}')
from pathlib import Path
from trustme_init import errors, policy
try:
    policy.load(Path('${B}/policy.toml'))
except errors.Refusal as refusal:
    sys.exit(f'the device would refuse this policy: {refusal}')
" || bbfatal "TRUSTME_ variables do not make a policy that the device accepts, see above"
}
addtask check_policy after do_write_policy before do_install do_deploy

do_install() {
    install -D -m 0644 ${B}/policy.toml ${D}${sysconfdir}/trustme/policy.toml
}

do_deploy() {
    install -m 0644 ${B}/policy.toml ${DEPLOYDIR}/trustme-policy.toml
}
addtask deploy after do_check_policy

