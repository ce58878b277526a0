# SPDX-License-Identifier: Apache-2.0
"""From three files to a configuration: order of judgement, identity, revocation, and the strict form."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trust.pki import (
    CLIENT_AUTH,
    DAY,
    LEAF,
    NOW,
    ROOT,
    SUB,
    Issued,
    anchors,
    bundle,
    issue,
    openssl,
)
from trustme_init.errors import Refusal, TrustRefusal
from trustme_init.proto.guestos_pb2 import GuestOSMount
from trustme_init.trust import guestos
from trustme_init.trust.anchors import AnchorSet, Purpose, Revocations
from trustme_init.trust.guestos import (
    CONFIG_LIMIT,
    IMAGE_LIMIT,
    MountType,
    VerifiedGuestOs,
    parse_config,
    verify_guestos,
)
from trustme_init.trust.selection import GuestOsId
from trustme_init.trust.verity import VerityParameters

if TYPE_CHECKING:
    from tests.unit.trust.conftest import PssPki

ROOT_HASH = "ab" * 32
ETC_HASH = "cd" * 32
SALT = "0123" * 8
HARDWARE = "x86"
STEM = "trustme-coreos-20261124120000"

HEAD = """\
name: "trustme-coreos"
hardware: "x86"
version: 20261124120000
description { en: "core" }
init_path: "/sbin/cservice"
init_param: "init"
init_env: "container=trustme"
"""
ROOT_MOUNT = f"""\
mounts {{
  image_file: "root" mount_point: "/" fs_type: "squashfs" mount_type: SHARED_RW def_size: 64
  image_size: 16777216 image_sha1: "not looked at"
  image_verity_sha256: "{ROOT_HASH}" verity_salt: "{SALT}"
}}
"""
DATA_MOUNT = 'mounts { image_file: "data" mount_point: "/data/" fs_type: "tmpfs" mount_type: EMPTY }\n'
CONFIG = HEAD + ROOT_MOUNT + DATA_MOUNT


@dataclass(frozen=True)
class Files:
    """What `verify_guestos` is handed, with the parts to change one at a time."""

    config: bytes
    signature: bytes
    certificate: bytes
    anchors: AnchorSet
    hardware: str = HARDWARE
    file_stem: str | None = STEM

    def verified(self) -> VerifiedGuestOs:
        return verify_guestos(
            self.config,
            self.signature,
            self.certificate,
            self.anchors,
            at=NOW,
            hardware=self.hardware,
            file_stem=self.file_stem,
        )

    def refusal(self) -> TrustRefusal:
        with pytest.raises(TrustRefusal) as caught:
            self.verified()
        assert caught.value.cause
        assert caught.value.remedy
        return caught.value

    @property
    def code(self) -> str:
        return self.refusal().code


ANCHOR = issue(ROOT)
SUB_CA = issue(SUB, ANCHOR)
SIGNER = issue(LEAF, SUB_CA)


def sign(config: bytes, signer: Issued = SIGNER) -> bytes:
    signature = signer.key.sign(config, ec.ECDSA(hashes.SHA512()))
    assert isinstance(signature, bytes)
    return signature


def files(config: str | bytes = CONFIG, signer: Issued = SIGNER, revoked: Revocations | None = None) -> Files:
    raw = config.encode() if isinstance(config, str) else config
    trusted = anchors(ANCHOR, revocations=revoked)
    return Files(raw, sign(raw, signer), bundle(signer, SUB_CA), trusted)


def with_part(good: Files, field: str, data: bytes) -> Files:
    match field:
        case "config":
            return replace(good, config=data)
        case "signature":
            return replace(good, signature=data)
        case _:
            return replace(good, certificate=data)


def bad_config(config: str) -> str:
    """Return the evidence of a refusal after the signature was found good."""
    refusal = replace(files(config), file_stem=None).refusal()
    assert refusal.code == "bad-config"
    assert refusal.evidence.isprintable()
    return refusal.evidence


def test_verified_configuration() -> None:
    found = files().verified()
    assert found.guest_os == GuestOsId("trustme-coreos", 20261124120000)
    assert found.config_digest == hashlib.sha256(CONFIG.encode()).digest()
    assert found.signer.leaf_der == SIGNER.der
    assert found.signer.anchor.certificate == ANCHOR.der
    assert list(found.config.init_env) == ["container=trustme"]
    assert found.config.mounts[1].mount_point == "/data"
    (image,) = found.images
    assert (image.image_file, image.mount_point, image.fs_type) == ("root", "/", "squashfs")
    assert image.mount_type is MountType.SHARED_RW
    assert image.parameters() == VerityParameters(
        root_hash=bytes.fromhex(ROOT_HASH), salt=bytes.fromhex(SALT), data_blocks=4096
    )
    # The superblock is not even looked at when the salt is signed.
    assert image.parameters(b"garbage") == image.parameters()


def test_upstream_chain_signed_by_openssl(pss: PssPki) -> None:
    options = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-1")
    signature = openssl("dgst", "-sha512", "-sign", pss.leaf_key, *options, stdin=CONFIG.encode())
    good = Files(CONFIG.encode(), signature, bundle(pss.leaf, pss.sub), anchors(pss.root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.unit.trust.test_guestos.NOW", NOW + DAY / 2)
        good.verified()
        assert replace(good, config=good.config + b"\n").code == "bad-signature"


def test_signature_is_judged_before_the_parser_sees_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = b"\xff\x00 }{ no text"
    assert replace(files(garbage), signature=b"x" * 70).code == "bad-signature"
    assert replace(files(garbage), anchors=anchors(issue(ROOT))).code == "untrusted-signer"
    assert files(garbage).code == "bad-config"
    monkeypatch.setattr(guestos, "parse_config", lambda _: pytest.fail("the parser was called"))
    assert replace(files(), signature=b"x" * 70).code == "bad-signature"
    assert replace(files(), certificate=b"").code == "chain-malformed"


def test_row2_config_sizes() -> None:
    largest = CONFIG + "#" * (CONFIG_LIMIT - len(CONFIG))
    assert files(largest).verified().guest_os.name == "trustme-coreos"
    assert files(largest + "#").code == "config-size"
    assert files("").code == "config-size"


def test_row2_any_flipped_byte_of_the_three_files() -> None:
    good = files()
    for field, data in (
        ("config", good.config),
        ("signature", good.signature),
        ("certificate", good.certificate),
    ):
        for position in range(0, len(data), max(1, len(data) // 100)):
            for mask in (0x01, 0x20, 0x80):
                damaged = bytearray(data)
                damaged[position] ^= mask
                with pytest.raises(TrustRefusal):
                    with_part(good, field, bytes(damaged)).verified()


@pytest.mark.parametrize("field", ["config", "signature", "certificate"])
def test_row2_truncated(field: str) -> None:
    good = files()
    data: bytes = getattr(good, field)
    for length in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(TrustRefusal):
            with_part(good, field, data[:length]).verified()


def test_row3_elements_dropped_emptied_doubled_and_swapped() -> None:
    good = files()
    other = files(CONFIG.replace("20261124120000", "20261124120001"))
    assert replace(good, config=b"").code == "config-size"
    assert replace(good, signature=b"").code == "signature-size"
    assert replace(good, certificate=b"").code == "chain-malformed"
    assert replace(good, certificate=bundle(SIGNER)).code == "untrusted-signer"
    assert replace(good, certificate=bundle(SUB_CA)).code == "leaf-is-ca"
    assert replace(good, certificate=good.certificate * 2).code == "chain-duplicate"
    assert replace(good, config=good.config * 2).code == "bad-signature"
    assert replace(good, signature=good.signature * 2).code == "bad-signature"
    assert replace(good, config=other.config).code == "bad-signature"
    assert replace(good, signature=other.signature).code == "bad-signature"
    assert replace(good, signature=good.config[:900], config=good.signature).code == "bad-signature"
    assert replace(good, certificate=bundle(issue(LEAF, SUB_CA), SUB_CA)).code == "bad-signature"


def test_row32_configuration_of_another_name_version_or_machine() -> None:
    older = replace(files(), file_stem="trustme-coreos-20261124120001")
    assert older.code == "wrong-identity"
    assert replace(files(), file_stem="other-20261124120000").code == "wrong-identity"
    assert replace(files(), hardware="arm64").code == "wrong-hardware"
    assert replace(files(), file_stem=None).verified()


def test_row17_signer_after_its_end() -> None:
    late = issue(LEAF.but(not_after=NOW - DAY), SUB_CA)
    assert files(signer=late).code == "certificate-expired"


def test_certificate_of_a_device_signs_no_software() -> None:
    assert files(signer=issue(LEAF.but(purpose=CLIENT_AUTH), SUB_CA)).code == "leaf-purpose"
    device = anchors(ANCHOR, purpose=Purpose.DEVICE)
    assert replace(files(), anchors=device).code == "wrong-purpose"
    assert replace(files(), anchors=anchors(ANCHOR, purpose=Purpose.GUEST)).verified()


@pytest.mark.parametrize(
    ("digest", "code"),
    [
        (hashlib.sha256(CONFIG.encode()).digest(), "config-revoked"),
        (bytes.fromhex(ROOT_HASH), "image-revoked"),
        (bytes.fromhex(ETC_HASH), "image-revoked"),
        (hashlib.sha256(SIGNER.der).digest(), "certificate-revoked"),
        (hashlib.sha256(SUB_CA.der).digest(), "certificate-revoked"),
        (hashlib.sha256(ANCHOR.der).digest(), "certificate-revoked"),
    ],
)
def test_row16_digests_in_dbx(digest: bytes, code: str) -> None:
    text = CONFIG
    if digest.hex() == ETC_HASH:
        text += (
            'mounts { image_file: "fw" mount_point: "/fw" fs_type: "ext4" mount_type: STORE_ONLY '
            f'image_size: 10 image_sha2_256: "{ETC_HASH}" }}'
        )
    assert files(text).verified()
    assert files(text, revoked=Revocations(sha256=frozenset({digest}))).code == code


def test_row16_image_of_the_setup_mode_is_revoked() -> None:
    setup = ROOT_MOUNT.replace("mounts {", "mounts_setup {").replace(ROOT_HASH, ETC_HASH)
    found = files(CONFIG + setup).verified()
    assert [image.root_hash.hex() for image in found.images] == [ROOT_HASH]
    assert [image.root_hash.hex() for image in found.setup_images] == [ETC_HASH]
    revoked = Revocations(sha256=frozenset({bytes.fromhex(ETC_HASH)}))
    assert files(CONFIG + setup, revoked=revoked).code == "image-revoked"


def test_row4_nothing_is_returned_with_a_refusal() -> None:
    refusal = replace(files(), hardware="arm64").refusal()
    assert not any(isinstance(value, VerifiedGuestOs) for value in vars(refusal).values())
    assert "trustme" not in str(refusal.__cause__)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # names
        ('name: "trustme-coreos"', 'name: "Trustme"'),
        ('name: "trustme-coreos"', 'name: "../etc"'),
        ('name: "trustme-coreos"', 'name: "a/b"'),
        ('name: "trustme-coreos"', 'name: ""'),
        ('name: "trustme-coreos"', f'name: "{"a" * 65}"'),
        ('name: "trustme-coreos"', 'name: "a\\n"'),
        ('name: "trustme-coreos"', 'name: "a\\000b"'),
        ('hardware: "x86"', 'hardware: "x86/.."'),
        ("version: 20261124120000", "version: 0"),
        ("version: 20261124120000", "version: -1"),
        ("version: 20261124120000", "version: 18446744073709551616"),
        ('image_file: "root"', 'image_file: "../root"'),
        ('image_file: "root"', 'image_file: ".."'),
        ('image_file: "root"', 'image_file: ".hidden"'),
        ('image_file: "root"', 'image_file: "a/b"'),
        ('image_file: "root"', 'image_file: ""'),
        ('image_file: "root"', 'image_file: "root.hash"'),
        ('fs_type: "squashfs"', 'fs_type: ""'),
        ('fs_type: "squashfs"', 'fs_type: "../ext4"'),
        # paths
        ('init_path: "/sbin/cservice"', 'init_path: "sbin/cservice"'),
        ('init_path: "/sbin/cservice"', 'init_path: "/../sbin"'),
        ('init_path: "/sbin/cservice"', 'init_path: ""'),
        ('mount_point: "/data/"', 'mount_point: "data"'),
        ('mount_point: "/data/"', 'mount_point: "/data/../etc"'),
        ('mount_point: "/data/"', 'mount_point: "/./data"'),
        ('mount_point: "/data/"', 'mount_point: "/a//b"'),
        ('mount_point: "/data/"', 'mount_point: "//"'),
        ('mount_point: "/data/"', 'mount_point: "/data//"'),
        ('mount_point: "/data/"', 'mount_point: ""'),
        ('mount_point: "/data/"', 'mount_point: "/da\\000ta"'),
        ('mount_point: "/data/"', 'mount_point: "/da\\nta"'),
        # the root file system
        ('mount_point: "/"', 'mount_point: "/root"'),
        ('mount_point: "/data/"', 'mount_point: "/"'),
        ("mount_type: SHARED_RW", "mount_type: EMPTY"),
        ("mount_type: SHARED_RW", "mount_type: DEVICE"),
        ("mount_type: SHARED_RW", "mount_type: STORE_ONLY"),
        ("mount_type: SHARED_RW", "mount_type: 99"),
        # content
        (ROOT_HASH, ROOT_HASH[:-2]),
        (ROOT_HASH, ROOT_HASH.upper()),
        (ROOT_HASH, ROOT_HASH[:-1] + " "),
        (f'image_verity_sha256: "{ROOT_HASH}"', ""),
        (f'image_verity_sha256: "{ROOT_HASH}"', f'image_sha2_256: "{ROOT_HASH}"'),
        (f'image_verity_sha256: "{ROOT_HASH}" verity_salt: "{SALT}"', ""),
        (SALT, SALT + "0"),
        (SALT, "zz"),
        (SALT, "00" * 257),
        ("image_size: 16777216", ""),
        ("image_size: 16777216", "image_size: 0"),
        ("image_size: 16777216", "image_size: 16777217"),
        ("image_size: 16777216", f"image_size: {IMAGE_LIMIT + 4096}"),
        ("image_size: 16777216", "image_size: 18446744073709547520"),
        ("image_size: 16777216", "image_size: 18446744073709551616"),
        # twice
        ('name: "trustme-coreos"', 'name: "trustme-coreos" name: "other"'),
        ("version: 20261124120000", "version: 20261124120000 version: 20261124120000"),
        (f'"{ROOT_HASH}"', f'"{ROOT_HASH}" image_verity_sha256: "{ETC_HASH}"'),
        ('image_file: "data"', 'image_file: "root"'),
        ('init_env: "container=trustme"', 'init_env: "A=1" init_env: "A=2"'),
        # the environment
        ('init_env: "container=trustme"', 'init_env: "container"'),
        ('init_env: "container=trustme"', 'init_env: "=x"'),
        ('init_env: "container=trustme"', 'init_env: "1A=x"'),
        ('init_env: "container=trustme"', 'init_env: "A B=x"'),
        ('init_env: "container=trustme"', 'init_env: "A=x\\000B=y"'),
        ('init_param: "init"', 'init_param: "a\\000b"'),
        ('init_param: "init"', 'init_param: "x" ' * 257),
        ('init_param: "init"', f'init_param: "{"x" * 4097}"'),
        ("mount_type: EMPTY", f'mount_type: EMPTY mount_data: "{"x" * 4097}"'),
        ("mount_type: EMPTY", 'mount_type: EMPTY mount_data: "a\\000b"'),
        ("mount_type: EMPTY", 'mount_type: EMPTY verity_salt: "00"'),
        ("mount_type: EMPTY", "mount_type: EMPTY image_size: 0"),
        # not this message
        ('hardware: "x86"', ""),
        ('description { en: "core" }', ""),
        ('description { en: "core" }', "description { }"),
        ('description { en: "core" }', 'description { en: "\\xff" }'),
        ('init_param: "init"', 'init_parameter: "init"'),
        ('init_param: "init"', "77: 1"),
        ('init_param: "init"', '[other.extension]: "x"'),
        ('init_param: "init"', 'update_base_url: "file://a\\nb"'),
        ('init_param: "init"', "}"),
    ],
)
def test_signed_but_not_acceptable(old: str, new: str) -> None:
    assert old in CONFIG
    bad_config(CONFIG.replace(old, new, 1))


def test_largest_values_are_accepted() -> None:
    text = CONFIG.replace("16777216", str(IMAGE_LIMIT)).replace(SALT, "00" * 256)
    (image,) = files(text).verified().images
    assert image.data_size == IMAGE_LIMIT
    assert image.salt == bytes(256)


def test_row2_too_many_mounts() -> None:
    many = "".join(
        f'mounts {{ image_file: "d{n}" mount_point: "/d{n}" fs_type: "tmpfs" mount_type: EMPTY }}'
        for n in range(64)
    )
    assert "65 entries" in bad_config(HEAD + ROOT_MOUNT + many)


@pytest.mark.parametrize("mount", [ROOT_MOUNT, DATA_MOUNT])
def test_mount_points_are_used_once(mount: str) -> None:
    again = mount.replace('image_file: "', 'image_file: "second-').replace("/data/", "/data")
    assert "mount_point" in bad_config(CONFIG + again)


def test_setup_mounts_need_their_own_root() -> None:
    assert "mounts_setup" in bad_config(CONFIG + DATA_MOUNT.replace("mounts", "mounts_setup"))


def test_types_that_compartments_may_refuse_are_let_through() -> None:
    device = 'mounts { image_file: "p" mount_point: "/p" fs_type: "ext4" mount_type: DEVICE_RW }'
    flash = (
        'mounts { image_file: "bl" mount_point: "/boot/x" fs_type: "vfat" mount_type: FLASH '
        f'image_size: 77 image_sha2_256: "{ETC_HASH}" }}'
    )
    assert len(files(CONFIG + device + flash).verified().images) == 1
    assert "neither" in bad_config(CONFIG + flash.replace(f'image_sha2_256: "{ETC_HASH}"', ""))
    assert "image_size" in bad_config(CONFIG + flash.replace("image_size: 77", ""))


def test_salt_that_is_not_signed() -> None:
    text = CONFIG.replace(f' verity_salt: "{SALT}"', "")
    (image,) = files(text).verified().images
    assert image.salt is None
    with pytest.raises(TrustRefusal) as caught:
        image.parameters()
    assert caught.value.code == "salt-missing"
    with pytest.raises(TrustRefusal) as caught:
        image.parameters(bytes(512))
    assert caught.value.code == "bad-superblock"
    unsalted = CONFIG.replace(SALT, "")
    assert files(unsalted).verified().images[0].parameters().salt == b""


def test_mount_types_are_those_of_the_message() -> None:
    assert {kind.name: kind.value for kind in MountType} == dict(GuestOSMount.Type.items())


def test_an_escape_sequence_that_there_is_none_of_is_refused() -> None:
    name = 'name: "trustme-coreos"'
    assert name in CONFIG
    with pytest.raises(TrustRefusal) as caught:
        parse_config(CONFIG.replace(name, 'name: "trust\\me-coreos"').encode())
    assert caught.value.code == "bad-config"


@given(st.binary(max_size=200))
def test_arbitrary_signed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Refusal):
        parse_config(data)


@given(st.integers(0, len(CONFIG) - 1), st.integers(0, 255), st.integers(0, len(CONFIG)))
def test_damaged_signed_configurations_are_parsed_or_refused(position: int, value: int, cut: int) -> None:
    raw = bytearray(CONFIG.encode())
    raw[position] = value
    del raw[cut : cut + value % 9]
    with contextlib.suppress(Refusal):
        parse_config(bytes(raw))


@given(st.text(max_size=30))
def test_any_text_as_a_mount_point(text: str) -> None:
    escaped = "".join(f"\\{byte:03o}" for byte in text.encode("utf-8", "ignore"))
    with contextlib.suppress(Refusal):
        found = parse_config(CONFIG.replace("/data/", escaped).encode())
        point = found.mounts[1].mount_point
        assert point.startswith("/")
        assert not {"", ".", ".."} & set(point.split("/")[1:])


def test_nothing_is_loaded_before_it_is_needed() -> None:
    script = (
        f"import sys; sys.path[:] = {sys.path!r}; import trustme_init.trust.guestos; "
        "print([name for name in ('cryptography', 'google.protobuf') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
