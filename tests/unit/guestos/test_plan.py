# SPDX-License-Identifier: Apache-2.0
"""Which files a configuration asks for, where they are, and how they travel. No process, no disk."""

from __future__ import annotations

import pytest

from trustme_init.errors import TrustRefusal
from trustme_init.guestos.network import addresses
from trustme_init.guestos.pieces import Piece
from trustme_init.guestos.plan import ImageFile, Plan, directory_url, levels, plan, tree_size
from trustme_init.proto.guestos_pb2 import GuestOSConfig, GuestOSMount, I18NString

HASH = "ab" * 32
OTHER = "cd" * 32
MIB = 1024 * 1024
Type = GuestOSMount


def mount(image: str, kind: int, **fields: object) -> GuestOSMount:
    return GuestOSMount(image_file=image, mount_point=f"/{image}", fs_type="ext4", mount_type=kind, **fields)  # type: ignore[arg-type]


def config(*mounts: GuestOSMount, setup: tuple[GuestOSMount, ...] = (), url: str = "") -> GuestOSConfig:
    return GuestOSConfig(
        name="os",
        hardware="x86",
        version=3,
        description=I18NString(en="x"),
        mounts=mounts,
        mounts_setup=setup,
        update_base_url=url or None,
    )


def test_every_kind_of_mount_that_has_a_file_is_fetched_and_no_other() -> None:
    verity = {"image_size": MIB, "image_verity_sha256": HASH}
    hashed = {"image_size": 5, "image_sha2_256": HASH}
    found = plan(
        config(
            mount("a", Type.SHARED, **verity, verity_salt="0123"),
            mount("b", Type.OVERLAY_RO, **verity),
            mount("c", Type.STORE_ONLY, **hashed),
            mount("d", Type.FLASH, **hashed),
            mount("e", Type.BIND_FILE, **hashed),
            mount("f", Type.EMPTY),
            mount("g", Type.OVERLAY_RW),
            mount("h", Type.DEVICE),
        )
    )
    assert [file.name for file in found.files] == [
        *("a.hash.img", "a.img", "b.hash.img", "b.img", "c.img", "d.img", "e.img"),
    ]
    tree, image = found.files[:2]
    assert (tree.is_tree, tree.size, tree.sha256) == (True, tree_size(MIB), "")
    assert image == ImageFile("a.img", MIB, "", HASH, "0123", "a.hash.img")
    assert found.files[3].salt is None
    assert found.size == 2 * (MIB + tree_size(MIB)) + 15
    assert Plan.from_dict(found.as_dict()) == found


def test_one_name_is_one_content_over_both_lists_of_mounts() -> None:
    same = mount("root", Type.SHARED, image_size=MIB, image_verity_sha256=HASH)
    assert len(plan(config(same, setup=(same,))).files) == 2
    for other in (
        mount("root", Type.SHARED, image_size=MIB, image_verity_sha256=OTHER),
        mount("root", Type.SHARED, image_size=2 * MIB, image_verity_sha256=HASH),
        mount("root", Type.STORE_ONLY, image_size=MIB, image_sha2_256=HASH),
    ):
        with pytest.raises(TrustRefusal) as caught:
            plan(config(same, setup=(other,)))
        assert caught.value.code == "image-ambiguous"


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (1, []),
        (2, [1]),
        (128, [1]),
        (129, [2, 1]),
        (128 * 128, [128, 1]),
        (128 * 128 + 1, [129, 2, 1]),
        (2**28, [2**21, 2**14, 2**7, 1]),
    ],
)
def test_levels_of_a_hash_tree(blocks: int, expected: list[int]) -> None:
    assert levels(blocks * 4096) == expected
    assert tree_size(blocks * 4096) == 4096 * (1 + sum(expected))


def test_where_the_files_are() -> None:
    assert directory_url("https://x/y", "os-3", "x86_64") == "https://x/y/operatingsystems/x86/os-3"
    assert directory_url("file://a", "os-3", "aarch64") == "file://a/operatingsystems/arm/os-3"
    assert plan(config(url="https://x/y//")).base_url == "https://x/y"


@pytest.mark.parametrize(
    "piece", [Piece("root.img", 0, b""), Piece("ä" * 100, 2**64 - 1, bytes(range(256))), Piece("", 1, b"\n")]
)
def test_a_piece_arrives_as_it_was_sent(piece: Piece) -> None:
    assert Piece.decoded(piece.encoded()) == piece


def test_of_a_resolver_configuration_only_addresses_are_taken() -> None:
    text = b"""# comment
nameserver 192.0.2.1
 nameserver  2001:db8::1  # trailing
nameserver
nameserver 192.0.2.300
nameserver evil.example
search example.org
options ndots:15 inet6
nameserver \xff\xfe
domain x"""
    assert addresses(text) == ["192.0.2.1", "2001:db8::1"]
