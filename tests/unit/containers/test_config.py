# SPDX-License-Identifier: Apache-2.0
"""Container configurations: order of judgement, binding, and the strict form."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trust import pki
from trustme_init.containers import config
from trustme_init.containers.config import CONFIG_LIMIT, JudgedConfig, Token, Trust, parse
from trustme_init.containers.ledger import Entry, require
from trustme_init.errors import Refusal, TrustRefusal
from trustme_init.guestos.store import SignedFiles
from trustme_init.trust.anchors import AnchorSet, Revocations

UUID = "3f0c7f66-0a0b-4f9e-9d55-0123456789ab"
HEAD = 'name: "one" guest_os: "exampleos"\n'
CA = pki.issue(pki.ROOT)
SIGNER = pki.issue(pki.LEAF, CA)
STRANGER = pki.issue(pki.LEAF, pki.issue(pki.ROOT.but(subject="stranger")))


def signed(text: bytes, by: pki.Issued = SIGNER) -> SignedFiles:
    return SignedFiles(text, by.key.sign(text, ec.ECDSA(hashes.SHA512())), pki.bundle(by))


def judge(files: SignedFiles, *, unsigned: bool = False, anchors: AnchorSet | None = None) -> JudgedConfig:
    found = anchors if anchors is not None else pki.anchors(CA)
    return config.judge(files, lambda: found, at=pki.NOW, unsigned=unsigned)


def code(files: SignedFiles, *, unsigned: bool = False, anchors: AnchorSet | None = None) -> str:
    with pytest.raises(Refusal) as caught:
        judge(files, unsigned=unsigned, anchors=anchors)
    return caught.value.code


def field(line: str) -> str:
    """Return the evidence of what is refused about a configuration with this line."""
    with pytest.raises(TrustRefusal) as caught:
        parse((HEAD + line).encode())
    assert caught.value.code in {"bad-container-config", "container-config-unsupported"}
    return caught.value.evidence


def test_what_is_signed_is_taken_over() -> None:
    text = (HEAD + f'uuid: "{UUID}" serial: 7 token_type: NONE guestos_version: 3').encode()
    judged = judge(signed(text))
    assert (judged.trust, judged.uuid, judged.serial, judged.version) == (Trust.SIGNED, UUID, 7, 3)
    assert judged.token is Token.NONE
    assert judged.sha256 == hashlib.sha256(text).hexdigest()


def test_defaults_are_those_of_the_original_and_can_be_serialised() -> None:
    message = parse(HEAD.encode())
    assert (message.color, message.type, Token(message.token_type)) == (0, 1, Token.SOFT)
    assert message.SerializeToString()
    judged = judge(SignedFiles(HEAD.encode(), b"", b""), unsigned=True)
    assert (judged.trust, judged.uuid, judged.serial, judged.version) == (Trust.UNSIGNED, None, 0, None)


def test_a_signature_is_needed_unless_the_policy_says_otherwise_and_counts_if_it_is_there() -> None:
    text = HEAD.encode()
    good = signed(text)
    assert code(SignedFiles(text, b"", b"")) == "container-config-unsigned"
    for unsigned in (False, True):
        for files in (
            SignedFiles(text, good.signature, b""),
            SignedFiles(text, b"", good.certificate),
        ):
            assert code(files, unsigned=unsigned) == "container-config-unsigned"
        assert code(SignedFiles(text + b"#", good.signature, good.certificate), unsigned=unsigned) == (
            "bad-signature"
        )
        assert code(signed(text, STRANGER), unsigned=unsigned) == "untrusted-signer"


def test_without_anchors_a_signed_one_is_refused_and_an_unsigned_one_does_not_ask_for_them() -> None:
    def none() -> AnchorSet:
        raise TrustRefusal("no-anchor", "there is none")

    with pytest.raises(TrustRefusal) as caught:
        config.judge(signed(HEAD.encode()), none, at=pki.NOW, unsigned=True)
    assert caught.value.code == "no-anchor"
    assert config.judge(SignedFiles(HEAD.encode(), b"", b""), none, at=pki.NOW, unsigned=True)


def test_nothing_is_parsed_that_nobody_vouches_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def parser(_text: bytes) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(config, "parse", parser)
    assert code(SignedFiles(b"\xff", b"x", pki.bundle(SIGNER))) == "bad-signature"
    assert code(SignedFiles(b"", b"x", pki.bundle(SIGNER))) == "container-config-size"
    assert code(SignedFiles(b"x" * (CONFIG_LIMIT + 1), b"", b""), unsigned=True) == "container-config-size"


def test_row16_a_revoked_text_is_refused() -> None:
    text = HEAD.encode()
    revocations = Revocations(sha256=frozenset({hashlib.sha256(text).digest()}))
    assert code(signed(text), anchors=pki.anchors(CA, revocations=revocations)) == "config-revoked"


@pytest.mark.parametrize(
    ("line", "evidence"),
    [
        ('uuid: "' + UUID + '"', "uuid and serial"),
        ("serial: 1", "uuid and serial"),
        (f'uuid: "{UUID.upper()}" serial: 1', "uuid"),
        ('uuid: "00000000-0000-0000-0000-000000000000" serial: 1', "the core"),
        (f'uuid: "{UUID}" serial: 0', "serial"),
        (f'uuid: "{UUID}" serial: 9223372036854775808', "serial"),
        ("guestos_version: 0", "guestos_version"),
        ('image_sizes { image_name: "../x" image_size: 1 }', "image_name"),
        ('image_sizes { image_name: "x" image_size: 0 }', "image_size"),
        ('image_sizes { image_name: "x" image_size: 1048577 }', "image_size"),
        (
            'image_sizes { image_name: "x" image_size: 1 } image_sizes { image_name: "x" image_size: 2 }',
            "twice",
        ),
        ("ram_limit: 1048577", "ram_limit"),
        ('init_env: "X"', "init_env"),
        ('init_env: "X=1" init_env: "X=2"', "twice"),
        ('init_env: "X=\\000"', "init_env"),
        ('assign_cpus: "0-"', "assign_cpus"),
        ('allow_dev: "x 1:1 rwm"', "allow_dev"),
        ('assign_dev: "c 1:1 x"', "assign_dev"),
        ('dns_server: "example.org"', "dns_server"),
        ('net_ifaces { netif: "a/b" }', "netif"),
        ('net_ifaces { netif: "eth0" mac_filter: "00:11" }', "mac_filter"),
        ('vnet_configs { if_name: "longer-than-fifteen" configure: true }', "if_name"),
        ('vnet_configs { if_name: "v0" configure: true if_mac: "zz" }', "if_mac"),
        ('unknown: "x"', "unknown"),
        ('name: "two"', "name"),
        ("type: KVM", "type"),
        ("userns: false", "userns"),
        ("netns: false", "netns"),
        ("token_type: USB", "USB"),
        ("allow_system_time: true", "allow_system_time"),
        ('allow_module: "loop"', "allow_module"),
        ('fifos: "f"', "fifos"),
        ("usb_pin_entry: true", "usb_pin_entry"),
        ("enable_xorg_compat: true", "enable_xorg_compat"),
        ('usb_configs { id: "1" serial: "2" assign: true type: GENERIC }', "usb_configs"),
    ],
)
def test_what_is_not_acceptable_is_refused_by_its_name(line: str, evidence: str) -> None:
    assert evidence in field(line)


@pytest.mark.parametrize("name", ["", "core0", "a b", "-x", "x" * 64, "a/b", "\u00e4"])
def test_names_become_host_names_and_are_held_to_that(name: str) -> None:
    with pytest.raises(TrustRefusal):
        parse(f'name: "{name}" guest_os: "exampleos"'.encode())


def test_long_lists_are_refused() -> None:
    assert "allow_dev: 65 entries" in field("\n".join(f'allow_dev: "c 1:{minor} r"' for minor in range(65)))


def test_what_the_original_uses_is_accepted() -> None:
    message = parse(
        (
            HEAD
            + 'ram_limit: 256 color: 4278190335 allow_autostart: true dns_server: "10.0.2.3"\n'
            + 'assign_cpus: "0-1,3"\n'
            + 'image_sizes { image_name: "data" image_size: 10 image_file: "data" } init_env: "A=b=c"\n'
            + 'allow_dev: "b 8:* rwm" assign_dev: "c 4:1 rwm" net_ifaces { netif: "00:00:00:00:00:11" '
            + 'mac_filter: "00:00:00:00:00:12" } vnet_configs { if_name: "vnet0" configure: true '
            + 'if_rootns_name: "veth0" if_mac: "00:00:00:00:00:13" } type: CONTAINER userns: true netns: true'
        ).encode()
    )
    assert message.net_ifaces[0].netif == "00:00:00:00:00:11"


@given(st.binary(max_size=200))
def test_anything_else_is_a_refusal(text: bytes) -> None:
    try:
        parse(text)
    except TrustRefusal as refusal:
        assert refusal.code in {"bad-container-config", "container-config-unsupported"}  # noqa: PT017
        assert refusal.evidence.isprintable()  # noqa: PT017


@given(st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_row32_the_serial_only_rises_and_stands_for_one_text(floor: int, serial: int, same: bool) -> None:  # noqa: FBT001
    message = parse(HEAD.encode())
    entry = Entry(1, floor, "aa" * 32)
    judged = JudgedConfig(message, Trust.SIGNED, ("aa" if same else "bb") * 32, UUID, serial)
    good = not floor or serial > floor or (serial == floor and same)
    if good:
        require(entry, judged)
    else:
        with pytest.raises(TrustRefusal) as caught:
            require(entry, judged)
        wanted = "container-config-rolled-back" if serial < floor else "container-serial-taken"
        assert caught.value.code == wanted
    require(None, judged)
