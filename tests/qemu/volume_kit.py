# SPDX-License-Identifier: Apache-2.0
"""What runs inside the device for test_volumes.py: plain source, sent to the agent before each snippet."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trustme_init.compartments import (
    volume_layer,
    volume_ledger,  # noqa: F401 - for the snippets
    volumes,
)
from trustme_init.errors import StorageRefusal
from trustme_init.linux import dm, mount
from trustme_init.linux.uevent import wait_until

MIB = 1024 * 1024
SIZE = 16 * MIB
UUID = "0badc0de-0000-4000-8000-00000000000a"
OTHER = "0badc0de-0000-4000-8000-00000000000b"
HOME = Path("/data/test-volumes")
KEY = hashlib.shake_256(b"key of the test").digest(96)
OTHER_KEY = hashlib.shake_256(b"another key").digest(96)
CANARY = b"canary of the volume test, long enough to be seen and not to be met by chance"
WORD = CANARY * 64
UNREADABLE = (errno.EIO, errno.EILSEQ, errno.EUCLEAN, errno.EBADMSG)

layer = volume_layer.DeviceMapperLayer()
backend = volumes.FileVolumes(layer)


def fresh(*uuids: str) -> None:
    """Begin with containers that have no volumes."""
    shutil.rmtree(HOME, ignore_errors=True)
    for uuid in uuids or (UUID,):
        (HOME / uuid).mkdir(parents=True)
        backend.prepare(uuid, HOME / uuid, KEY)


def image(name: str = "data", uuid: str = UUID) -> Path:
    """Return the file of a volume."""
    return HOME / uuid / f"{name}.img"


def opened(name: str = "data", uuid: str = UUID, key: bytes = KEY, size: int = SIZE) -> Path:
    """Open a volume, making it if it is new."""
    (volume,) = backend.open(uuid, HOME / uuid, [volumes.VolumeRequest(name, size)], key)
    return volume.device


@contextmanager
def mounted(name: str = "data", uuid: str = UUID, key: bytes = KEY) -> Iterator[Path]:
    """Open and mount a volume as the manager does; afterwards nothing of it is open."""
    place = HOME / "mnt"
    place.mkdir(exist_ok=True)
    device = opened(name, uuid, key)
    try:
        fd = mount.fsopen_mount("ext4", source=str(device), options={"errors": "remount-ro"})
    finally:
        backend.release(uuid)
    try:
        mount.move_mount(fd, place)
    finally:
        os.close(fd)
    try:
        yield place
    finally:
        mount.umount(str(place))
        closed()


def closed() -> None:
    """Wait until no volume has a device any more, and no loop device its file."""
    backings = [Path("/sys/block").glob("loop*/loop/backing_file")]

    def look() -> bool | None:
        names = [name for name in dm.names() if name.startswith(volumes.prefix(UUID)[:8] + "0badc0de")]
        files = [path.read_text() for found in backings for path in found]
        return None if names or any(str(HOME) in text for text in files) else True

    assert wait_until(look, 10.0) is True, dm.names()


def fill(name: str = "data", uuid: str = UUID) -> None:
    """Make a volume with 2 MiB of known content."""
    with mounted(name, uuid) as place:
        for number in range(32):
            (place / f"file{number}").write_bytes(content(number))


def content(number: int) -> bytes:
    """Return the known content of a file, 64 KiB."""
    return hashlib.shake_256(b"%d" % number).digest(64 * 1024)


def refusal(action: Callable[[], object]) -> str:
    """Return the code of a refusal, or "opened"; nothing is open afterwards, and no file has changed."""
    before = {str(path): path.read_bytes() for path in HOME.glob("*/*") if path.is_file()}
    try:
        action()
    except StorageRefusal as refused:
        code = refused.code
    else:
        code = "opened"
        backend.release(UUID)
    closed()
    after = {str(path): path.read_bytes() for path in HOME.glob("*/*") if path.is_file()}
    assert code == "opened" or before == after, code
    return code


def flip(path: Path, place: int, bits: int = 1) -> None:
    """Change bits of one byte of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bits]))


def used_blocks(path: Path) -> list[int]:
    """Return the places of the blocks of a file that hold anything but zeros."""
    data = path.read_bytes()
    return [at for at in range(0, len(data), 4096) if data[at : at + 4096].strip(b"\0")]


def read_back() -> dict[str, int]:
    """Read all known files: how many were right, wrong, an I/O error; or the refusal of the volume."""
    found = dict.fromkeys(("right", "wrong", "error"), 0)
    try:
        with mounted() as place:
            for number in range(32):
                try:
                    same = (place / f"file{number}").read_bytes() == content(number)
                except OSError as exc:
                    name = "error" if exc.errno in UNREADABLE else f"errno {exc.errno}"
                    found[name] = found.get(name, 0) + 1
                else:
                    found["right" if same else "wrong"] += 1
    except StorageRefusal as refused:
        found[refused.code] = 1
        closed()
    except OSError as exc:
        # Of the mount: the compartment's own code calls it volume-not-mountable.
        found[errno.errorcode[exc.errno or 0]] = 1
        closed()
    return found


def random_places(path: Path, count: int) -> list[int]:
    """Return places behind the superblock, in blocks that are used; always the same ones."""
    chosen = random.Random(4)  # noqa: S311 - to be the same ones
    blocks = [block for block in used_blocks(path) if block]
    return [chosen.choice(blocks) + chosen.randrange(4096) for _ in range(count)]


def superblock_fields(path: Path) -> dict[str, int]:
    """Read the fixed part of a dm-integrity superblock."""
    names = ("version", "log2_interleave", "tag", "sections", "provided", "flags", "log2_sectors")
    return dict(zip(names, struct.unpack_from("<8xBBHIQIB", path.read_bytes()[:64]), strict=True))
