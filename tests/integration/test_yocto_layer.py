# SPDX-License-Identifier: Apache-2.0
"""The program that trustme-base.bb runs, and the recipes as a linter sees them. No bitbake is needed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from trustme_init.storage.layout import ESP_NAME, MIB, STORE_NAME
from trustme_tools.guestos import recipe as recipes
from trustme_tools.guestos.build import build_guestos
from trustme_tools.guestos.signing import key_signer
from trustme_tools.image import disk
from trustme_tools.machine import images

ROOT = Path(__file__).resolve().parents[2]
LAYER = ROOT / "meta-trustme-py"
TOOL = LAYER / "lib/trustme_layer/base.py"
EPOCH = 1767225600

# Rules of oelint-adv that do not fit, with the reason.
SUPPRESSED = {
    "oelint.vars.homepageping": "asks the network",
    "oelint.var.mandatoryvar.HOMEPAGE": "the project has no web page of its own",
    "oelint.vars.mispell.unknown": "takes each variable of ours for a misspelt one",
    "oelint.vars.mispell": "likewise",
}


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a step of trustme-base.bb."""
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )


@dataclass(frozen=True)
class Pair:
    key: Path
    certificate: Path


def pair(directory: Path, name: str, *, start: int = -1, end: int = 30, ca: Pair | None = None) -> Pair:
    """Make an RSA key and a certificate that is valid from `start` to `end` days from now."""
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signer = subject, key
    if ca is not None:
        issuer = x509.load_pem_x509_certificate(ca.certificate.read_bytes()).subject
        loaded = serialization.load_pem_private_key(ca.key.read_bytes(), None)
        assert isinstance(loaded, rsa.RSAPrivateKey)
        signer = loaded
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=start))
        .not_valid_after(now + timedelta(days=end))
        .sign(signer, hashes.SHA256())
    )
    made = Pair(directory / f"{name}.key", directory / f"{name}.cert")
    made.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    made.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return made


def pe_file(sections: dict[str, bytes]) -> bytes:
    """Return an EFI program (PE32+, x86-64) with these sections, as far as a signer and a reader look."""
    header_size, alignment = 0x400, 0x200
    table, bodies, place, address = b"", b"", header_size, 0x1000
    for name, content in sections.items():
        size = -(-len(content) // alignment) * alignment
        table += struct.pack(
            "<8sIIIIIIHHI", name.encode(), len(content), address, size, place, 0, 0, 0, 0, 0x40000040
        )
        bodies += content.ljust(size, b"\0")
        place, address = place + size, address + 0x1000 * -(-len(content) // 0x1000)
    coff = struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, 112 + 16 * 8, 0x22)
    optional = struct.pack("<HBBIIIII", 0x20B, 2, 0, 0, len(bodies), 0, 0x1000, 0x1000)
    optional += struct.pack(
        "<QIIHHHHHHIIIIHH", 0, 0x1000, alignment, 0, 0, 0, 0, 0, 0, 0, address, header_size, 0, 10, 0
    )
    optional += struct.pack("<QQQQII", 0, 0, 0, 0, 0, 16) + bytes(16 * 8)
    start = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40) + b"PE\0\0"
    return (start + coff + optional + table).ljust(header_size, b"\0") + bodies


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uki") / "unsigned.efi"
    sections = {".text": b"\x90" * 64, ".uname": b"6.18.39-yocto", ".cmdline": b"console=hvc0 quiet"}
    path.write_bytes(pe_file(sections))
    return path


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("db"), "DB")


def test_uki_is_signed_by_a_key_and_checked(unsigned: Path, db: Pair, tmp_path: Path) -> None:
    signed = tmp_path / "signed.efi"
    done = tool("sign-uki", unsigned, signed, "--key", db.key, "--cert", db.certificate)
    assert done.returncode == 0, done.stderr
    subprocess.run(["sbverify", "--cert", db.certificate, signed], check=True, capture_output=True)


def test_uki_is_signed_by_a_command(unsigned: Path, db: Pair, tmp_path: Path) -> None:
    command = tmp_path / "signer"
    command.write_text(f'#!/bin/sh\nexec sbsign --key {db.key} --cert {db.certificate} --output "$2" "$1"\n')
    command.chmod(0o755)
    signed = tmp_path / "signed.efi"
    done = tool("sign-uki", unsigned, signed, "--sign-command", str(command), "--cert", db.certificate)
    assert done.returncode == 0, done.stderr
    subprocess.run(["sbverify", "--cert", db.certificate, signed], check=True, capture_output=True)


def test_mismatch_of_key_and_certificate_names_both(unsigned: Path, db: Pair, tmp_path: Path) -> None:
    other = pair(tmp_path, "other")
    done = tool("sign-uki", unsigned, tmp_path / "signed.efi", "--key", other.key, "--cert", db.certificate)
    assert done.returncode == 1
    assert f"the key {other.key} does not belong to the certificate {db.certificate}" in done.stderr
    assert not (tmp_path / "signed.efi").exists()


def test_signature_of_another_key_by_a_command_is_found(unsigned: Path, db: Pair, tmp_path: Path) -> None:
    other = pair(tmp_path, "other")
    command = tmp_path / "signer"
    command.write_text(
        f'#!/bin/sh\nexec sbsign --key {other.key} --cert {other.certificate} --output "$2" "$1"\n'
    )
    command.chmod(0o755)
    done = tool(
        *("sign-uki", unsigned, tmp_path / "signed.efi"),
        *("--sign-command", str(command), "--cert", db.certificate),
    )
    assert done.returncode == 1
    assert str(command) in done.stderr
    assert str(db.certificate) in done.stderr
    assert not (tmp_path / "signed.efi").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/nowhere/signer --fast", "the signing command is not there: /nowhere/signer"),
        ("false", "the signing command failed: false"),
        ("true", "it wrote no file"),
    ],
)
def test_signing_command_that_does_not_sign(
    unsigned: Path, db: Pair, tmp_path: Path, command: str, said: str
) -> None:
    done = tool("sign-uki", unsigned, tmp_path / "s.efi", "--sign-command", command, "--cert", db.certificate)
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "s.efi").exists()


@pytest.mark.parametrize(
    ("start", "end", "said"), [(-30, -1, "has expired"), (1, 30, "is not valid yet")], ids=["old", "early"]
)
def test_certificate_out_of_its_time_signs_nothing(
    unsigned: Path, tmp_path: Path, start: int, end: int, said: str
) -> None:
    late = pair(tmp_path, "late", start=start, end=end)
    ways: tuple[tuple[str | Path, ...], ...] = (("--key", late.key), ("--sign-command", "true"))
    for way in ways:
        done = tool("sign-uki", unsigned, tmp_path / "s.efi", *way, "--cert", late.certificate)
        assert done.returncode == 1
        assert f"CN=late {said}" in done.stderr
    assert not (tmp_path / "s.efi").exists()


def test_uki_over_the_limit_is_refused_before_it_is_signed(unsigned: Path, db: Pair, tmp_path: Path) -> None:
    big = tmp_path / "big.efi"
    shutil.copy(unsigned, big)
    os.truncate(big, 2 * MIB + 1)
    arguments = ("sign-uki", big, tmp_path / "s.efi", "--key", db.key, "--cert", db.certificate)
    done = tool(*arguments, "--limit", "2")
    assert done.returncode == 1
    assert "2 MiB is the limit" in done.stderr
    assert not (tmp_path / "s.efi").exists()
    os.truncate(big, 2 * MIB)
    done = tool(*arguments, "--limit", "2")
    assert "is the limit" not in done.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one signed GuestOS, called as the core container is."""
    directory = tmp_path_factory.mktemp("store")
    root = directory / "root"
    (root / "sbin").mkdir(parents=True)
    (root / "sbin/cservice").write_text("#!/bin/sh\n")
    (root / "sbin/cservice").chmod(0o755)
    recipe = recipes.load(ROOT / "recipes/core/guestos.toml")
    ca = pair(directory, "ca")
    leaf = pair(directory, "leaf", ca=ca)
    signer = key_signer(leaf.key, leaf.certificate)
    build_guestos(recipe, root, directory / "store", signer=signer, epoch=EPOCH)
    return directory / "store"


def test_image_directory_is_one_for_every_tool(unsigned: Path, db: Pair, store: Path, tmp_path: Path) -> None:
    signed = tmp_path / "trustme-base.efi"
    assert tool("sign-uki", unsigned, signed, "--key", db.key, "--cert", db.certificate).returncode == 0
    # wic leaves nothing free behind the store.
    disk.create(tmp_path / "wic.img", signed, store, data_space=0)
    (tmp_path / "initramfs").write_bytes(b"cpio")
    (tmp_path / "packages").write_text("kmod x86_64_v3 34-r0\ntrustme-init x86_64_v3 0.1.0-r0\n")
    (tmp_path / "policy").write_text("version = 1\n")
    done = tool(
        *("deploy", "--out", tmp_path, "--wic", tmp_path / "wic.img", "--uki", signed, "--store", store),
        *("--initramfs", tmp_path / "initramfs", "--packages", tmp_path / "packages"),
        *("--policy", tmp_path / "policy", "--uki-cert", db.certificate, "--core", "trustme-coreos"),
        *("--hardware", "x86", "--machine", "qemux86-64", "--image-version", "0.1.0"),
        *("--epoch", str(EPOCH), "--data-space", "512", "--development", "1"),
    )
    assert done.returncode == 0, done.stderr
    found = images.load(tmp_path)
    assert found.manifest["builder"] == "yocto"
    assert found.manifest["kernel"] == "6.18.39-yocto"
    assert found.manifest["command_line"] == "console=hvc0 quiet"
    assert found.manifest["core"]["name"] == "trustme-coreos"
    assert found.manifest["packages"] == {"kmod": "34-r0", "trustme-init": "0.1.0-r0"}
    (config,) = (store / "operatingsystems").glob("*.conf")
    assert found.manifest["core"]["config_sha256"] == hashlib.sha256(config.read_bytes()).hexdigest()
    # The partitions and the free space of the reference builder's disk; the contents are wic's.
    disk.create(tmp_path / "reference.img", signed, store)
    assert found.disk.stat().st_size == (tmp_path / "reference.img").stat().st_size
    assert _table(found.disk) == _table(tmp_path / "reference.img")
    for name in (ESP_NAME, STORE_NAME):
        region = disk.partition(found.disk, name)
        assert _region(found.disk, region) == _region(tmp_path / "wic.img", region)
    assert found.disk.stat().st_blocks * 512 < 100 * MIB


def test_store_without_the_core_is_refused(unsigned: Path, db: Pair, store: Path, tmp_path: Path) -> None:
    signed = tmp_path / "trustme-base.efi"
    assert tool("sign-uki", unsigned, signed, "--key", db.key, "--cert", db.certificate).returncode == 0
    disk.create(tmp_path / "wic.img", signed, store, data_space=0)
    (tmp_path / "x").write_text("")
    done = tool(
        *("deploy", "--out", tmp_path, "--wic", tmp_path / "wic.img", "--uki", signed, "--store", store),
        *("--initramfs", tmp_path / "x", "--packages", tmp_path / "x", "--policy", tmp_path / "x"),
        *("--uki-cert", db.certificate, "--core", "my-coreos", "--hardware", "x86", "--machine", "m"),
        *("--image-version", "1", "--epoch", str(EPOCH), "--data-space", "1", "--development", "0"),
    )
    assert done.returncode == 1
    assert "the store has no core GuestOS my-coreos" in done.stderr
    assert not (tmp_path / "manifest.json").exists()


def _table(image: Path) -> str:
    """Return the partition table, with the file's own name taken out."""
    done = subprocess.run(["sfdisk", "--json", image], check=True, capture_output=True, text=True)
    subprocess.run(["sgdisk", "--verify", image], check=True, capture_output=True)
    return json.dumps(json.loads(done.stdout)).replace(str(image), "")


def _region(image: Path, region: disk.Region) -> str:
    with image.open("rb") as file:
        file.seek(region.offset)
        return hashlib.sha256(file.read(region.size)).hexdigest()


def test_recipes_are_clean_for_the_linter() -> None:
    patterns = ("*.bb", "*.bbappend", "*.inc", "*.bbclass", "*.conf")
    files = sorted(path for pattern in patterns for path in LAYER.rglob(pattern))
    assert len(files) > 12
    command = [sys.executable, "-m", "oelint_adv", "--release", "wrynose", "--quiet", "--hide", "info"]
    for rule in SUPPRESSED:
        command += ["--suppress", rule]
    command += ["--", *map(str, files)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0
