# SPDX-License-Identifier: Apache-2.0
"""What encryption and authentication of containers' volumes are worth, on a real kernel's device mapper.

One machine for all tests, in operation: its base system loads no module by itself any more. Each test begins
with new volumes on the data volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.agent import Agent
from tests.qemu.conftest import ColdBoot
from trustme_tools.machine.firmware import Firmware
from trustme_tools.machine.vm import VirtualMachine

KIT = (Path(__file__).parent / "volume_kit.py").read_text()
Inside = Callable[[str], Any]


@pytest.fixture(scope="module")
def device(
    request: pytest.FixtureRequest, cold_boot_with_agent: ColdBoot, enrolled: Firmware
) -> Iterator[VirtualMachine]:
    cold = cold_boot_with_agent
    failed = request.session.testsfailed
    with VirtualMachine(cold.disk, enrolled, saved=cold.saved, spare_console=True, name="volumes") as machine:
        yield machine
        if request.session.testsfailed > failed:
            machine.keep_logs(request.config.getoption("--artifacts") / "test_volumes")


@pytest.fixture(scope="module")
def inside(device: VirtualMachine) -> Iterator[Inside]:
    """Run source in the base system, behind the kit; `value` comes back."""
    agent = Agent(device.spare_socket)
    yield lambda source: agent.run(f"{KIT}\n{source}", 300)
    agent.close()


MODULES = "value = sorted({line.split()[0] for line in open('/proc/modules')} & {'dm_crypt', 'dm_integrity'})"


def test_modules_are_loaded_for_the_first_volume_only(inside: Inside) -> None:
    assert inside(MODULES) == []
    assert inside("value = open('/proc/sys/kernel/modprobe').read().strip()") == ""
    inside("fresh(); opened(); backend.release(UUID); closed()")
    assert inside(MODULES) == ["dm_crypt", "dm_integrity"]


def test_the_tables_are_the_ones_of_the_decision(inside: Inside) -> None:
    found = inside("""
fresh(); opened()
value = [dm.live_table(volumes.prefix(UUID) + name)[0] for name in ("data", "data:integrity")]
backend.release(UUID); closed()
value.append(superblock_fields(image()))
""")
    crypt, integrity, superblock = found
    assert [crypt[:3], integrity[:3]] == [[0, 32768, "crypt"], [0, 32768, "integrity"]]
    words = crypt[3].split()
    assert (words[0], len(words[1]) * 4) == ("aes-xts-plain64", 512)
    assert words[-1] == "sector_size:4096"
    words = integrity[3].split()
    assert words[1:4] == ["0", "32", "J"]
    assert {"block_size:4096", "fix_padding", "fix_hmac"} <= set(words)
    assert {word.rpartition(":")[0] for word in words if "hmac(" in word} == {
        "internal_hash:hmac(sha256)",
        "journal_mac:hmac(sha256)",
    }
    assert not {"allow_discards", "recalculate", "legacy_recalculate"} & set(words)
    # Where the sizes are computed without asking the kernel, there is room for what it takes.
    assert superblock["provided"] * 512 >= 16 * 2**20


@pytest.mark.parametrize("mib", [10, 17, 127, 129, 1000, 4097])
def test_any_size_can_be_made_and_written_without_a_full_write(inside: Inside, mib: int) -> None:
    allocated, free = inside(f"""
fresh()
device = opened(size={mib} * MIB)
fd = mount.fsopen_mount("ext4", source=str(device), options={{"errors": "remount-ro"}})
backend.release(UUID)
place = HOME / "mnt"; place.mkdir(exist_ok=True); mount.move_mount(fd, place); os.close(fd)
for number in range(64):
    (place / f"d{{number}}").mkdir()
    (place / f"d{{number}}/f").write_bytes(content(number)[:8192])
os.sync()
figures = os.statvfs(place)
value = image().stat().st_blocks * 512, figures.f_bavail * figures.f_frsize
mount.umount(str(place)); closed(); shutil.rmtree(HOME)
""")
    assert allocated <= 8 * 2**20 + 4 * mib * 2**20 // 5 if mib < 64 else mib * 2**20 // 8 + 32 * 2**20
    assert free > mib * 2**20 * 45 // 100


def test_content_lasts_and_nothing_of_it_is_on_the_disk(inside: Inside) -> None:
    kept, plain, secret, control = inside("""
fresh(); fill()
with mounted() as place:
    (place / "word").write_bytes(WORD)
with mounted() as place:
    kept = (place / "word").read_bytes() == WORD
(HOME / "control").write_bytes(WORD[::-1])
os.sync()
entry = volume_ledger.Ledger.load(HOME / UUID, UUID, KEY)
keys = entry.keys("data", entry.entries["data"])
wanted = {"word": CANARY, "file": content(0)[:64], "control": CANARY[::-1], "container key": KEY[:32]}
for name in ("encryption", "authentication", "journal"):
    wanted[name] = getattr(keys, name)[:32]
    wanted[name + " in hex"] = getattr(keys, name).hex().encode()[:64]
found = set()
with open("/dev/vda", "rb", buffering=0) as disk:
    os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    tail = b""
    while data := disk.read(4 * MIB):
        data = tail + data
        found |= {name for name, text in wanted.items() if text in data}
        tail = data[-256:]
content_found, control_found = found & {"word", "file"}, "control" in found
value = kept, sorted(content_found), sorted(found - content_found - {"control"}), control_found
""")
    assert kept
    assert control, "the search finds what is there in clear"
    assert plain == []
    assert secret == []


def test_row10_a_flipped_byte_is_an_error_and_never_other_data(inside: Inside) -> None:
    results = inside("""
fresh(); fill()
good = image().read_bytes()
value = []
for at in random_places(image(), 12):
    flip(image(), at)
    value.append(read_back())
    image().write_bytes(good)
# And in every block from the middle on, so that content is hit for certain.
for at in used_blocks(image()):
    if at > 6 * MIB:
        flip(image(), at + 17, 128)
value.append(read_back())
image().write_bytes(good)
value.append(read_back())
""")
    assert all(not result.get("wrong") for result in results), results
    assert results[-1] == {"right": 32, "wrong": 0, "error": 0}
    assert results[-2]["right"] < 32
    assert set(results[-2]) - {"right", "wrong"}


def test_row10_tags_of_discarded_blocks_are_not_believed(inside: Inside) -> None:
    """The kernel takes tags of 0xf6 for "discarded, unchecked", if a table allows discards; ours does not."""
    ours, careless = inside("""
fresh(); fill()
def forge():
    data = bytearray(image().read_bytes())
    start = 4096 + superblock_fields(image())["sections"] * 264 * 512  # a section has 264 sectors
    data[start : start + 4096 * 32] = b"\\xf6" * (4096 * 32)
    data[start + 4096 * 32 + 100] ^= 1
    image().write_bytes(data)
def first_block():
    ledger = volume_ledger.Ledger.load(HOME / UUID, UUID, KEY)
    entry = ledger.entries["data"]
    file = os.open(image(), os.O_RDWR)
    path = layer.open(ledger.device("data"), file, SIZE, ledger.keys("data", entry))
    os.close(file)
    try:
        with open(path, "rb", buffering=0) as device:
            return len(device.read(4096))
    except OSError as exc:
        return errno.errorcode[exc.errno]
    finally:
        backend.release(UUID)
        closed()
forge()
ours = first_block()
genuine = volume_layer._integrity
def careless(*arguments):
    target = genuine(*arguments)
    words = target.parameters.split() + ["allow_discards"]
    words[4] = str(int(words[4]) + 1)
    return target._replace(parameters=" ".join(words))
volume_layer._integrity = careless
value = ours, first_block()
""")
    assert ours in ("EILSEQ", "EIO")
    assert careless == 4096, "without the rule the forged block would have been taken"


def test_row11_what_is_not_the_containers_is_refused_and_left_alone(inside: Inside) -> None:
    found = inside("""
fresh(UUID, OTHER); fill(); fill("data", OTHER); fill("logs")
good, length = image().read_bytes(), image().stat().st_size
value = {}
value["wrong key"] = refusal(lambda: opened(key=OTHER_KEY))
value["another size"] = refusal(lambda: opened(size=SIZE + MIB))
def changed(name, content=None, size=None):
    if content is not None:
        image().write_bytes(content)
    if size is not None:
        os.truncate(image(), size)
    value[name] = refusal(opened)
    image().write_bytes(good)
changed("truncated", size=length - 4096)
changed("emptied", size=0)
changed("extended", size=length + 4096)
changed("zeros", bytes(length))
changed("superblock of zeros", bytes(4096) + good[4096:])
changed("content of zeros", good[:4096] + bytes(length - 4096))
changed("other container's", image("data", OTHER).read_bytes())
changed("other volume's", image("logs").read_bytes())
changed("other container's content", good[:4096] + image("data", OTHER).read_bytes()[4096:])
changed("LUKS header", b"LUKS\\xba\\xbe\\x00\\x02" + good[8:])
image().unlink()
value["gone"] = refusal(opened)
image().write_bytes(good)
value["new name, old file"] = None
shutil.copy(image(), image("more"))
value["new name, old file"] = refusal(lambda: opened("more"))
value["as it was"] = str(read_back())
""")
    assert found.pop("as it was") == str({"right": 32, "wrong": 0, "error": 0})
    assert found == {
        "wrong key": "volume-key-wrong",
        "another size": "volume-size-changed",
        "truncated": "volume-size-changed",
        "emptied": "volume-size-changed",
        "extended": "volume-size-changed",
        "zeros": "volume-superblock-damaged",
        "superblock of zeros": "volume-superblock-damaged",
        "content of zeros": "volume-content-damaged",
        "other container's": "volume-superblock-damaged",
        "other volume's": "volume-superblock-damaged",
        "other container's content": "volume-content-damaged",
        "LUKS header": "volume-superblock-damaged",
        "gone": "volume-missing",
        "new name, old file": "volume-foreign",
    }


def test_row10_the_kernel_itself_refuses_a_changed_superblock(inside: Inside) -> None:
    """The second lock: the first, our own comparison, is left out here."""
    found = inside("""
fresh(); fill()
ledger = volume_ledger.Ledger.load(HOME / UUID, UUID, KEY)
entry = ledger.entries["data"]
good = image().read_bytes()
value = {}
# magic, version, interleave, tag, sections, provided, flags (2: recalculate, 4: dirty bitmap), sizes, salt
for at, bits in [(0, 1), (8, 1), (9, 1), (10, 1), (12, 1), (16, 1), (24, 2), (24, 4), (24, 8), (28, 1),
                 (32, 1), (48, 1), (511, 1)]:
    flip(image(), at, bits)
    file = os.open(image(), os.O_RDWR)
    try:
        layer.open(ledger.device("data"), file, SIZE, ledger.keys("data", entry))
        value[f"{at}/{bits}"] = "opened"
    except OSError as exc:
        value[f"{at}/{bits}"] = "refused"
    os.close(file)
    backend.release(UUID); closed()
    image().write_bytes(good)
""")
    assert set(found.values()) == {"refused"}, found
    assert len(found) == 13


def test_a_volume_in_use_is_busy_until_its_last_user_is_gone(inside: Inside) -> None:
    first, second, third = inside("""
volume_layer._GONE_TIMEOUT = 0.2
fresh()
with mounted():
    try:
        opened(); first = "opened"
    except StorageRefusal as refused:
        first = refused.code
value = first, refusal(opened), dm.names() and [name for name in dm.names() if "0badc0de" in name]
""")
    assert first == "volume-busy"
    assert second == "opened"
    assert third == []


ROW14 = """
import dataclasses, time
from pathlib import PurePosixPath
from trustme_init import policy as policies
from trustme_init.compartments import spec as specs
from trustme_init.compartments.lifecycle import Compartment
from trustme_init.machine import Machine
from trustme_init.trust.guestos import images_of, parse_config

SCRIPT = r'''
import fcntl, os, sys
majors = [int(line.split()[0]) for line in open("/proc/devices") if "device-mapper" in line]
def attempt(name, action):
    try:
        action()
        print(name, "DONE", flush=True)
    except OSError as exc:
        print(name, "refused", flush=True)
def node(kind, major, minor):
    def act():
        path = f"/tmp/n{major}.{minor}"
        os.mknod(path, kind | 0o666, os.makedev(major, minor))
        os.close(os.open(path, os.O_RDONLY))
    return act
open("/data/vol/word", "w").write("kept")
print("nodes", sorted(name for name in os.listdir("/dev") if name.startswith(("dm", "loop", "mapper", "vd"))))
for minor in range(4):
    attempt(f"dm-{minor}", node(0o60000, majors[0], minor))
attempt("disk", node(0o60000, 254, 0))
attempt("loop", node(0o60000, 7, 0))
attempt("control", node(0o20000, 10, 236))
attempt("control path", lambda: os.open("/dev/mapper/control", os.O_RDWR))
attempt("remount", lambda: os.system("mount -o remount,dev /data/vol") and os.open("/nowhere", 0))
attempt("sysfs", lambda: os.open(f"/sys/block/dm-0/uevent", os.O_WRONLY))
line = [line for line in open("/proc/self/mounts") if " /data/vol " in line][0]
print("mount", line.split()[2], line.split()[3])
print("end", flush=True)
import time; time.sleep(1000)
'''
machine = Machine()
policy = policies.load(machine.policy)
config = parse_config((machine.run / "core.conf").read_bytes())
core = specs.from_config(config, images_of(config.mounts), policy, machine)
fresh()
log = HOME / "log"
volume = specs.VolumeSpec(specs.VolumeKind.ENCRYPTED, PurePosixPath("/data/vol"), 0, device=opened())
spec = dataclasses.replace(
    core,
    uuid=UUID,
    name="guest",
    hostname="guest",
    volumes=(*core.volumes, volume),
    argv=("/usr/bin/python3", "-c", SCRIPT),
    socket_dir=machine.compartments / UUID / "socket",
    console=None,
    log=log,
    uid_base=2 * specs.UID_BASE,
)
tables = [dm.live_table(volumes.prefix(UUID) + name) for name in ("data", "data:integrity")]
compartment = Compartment(spec, machine)
folder = machine.store / "operatingsystems" / f"{config.name}-{config.version}"
directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
compartment.start(directory)
os.close(directory)
deadline = time.monotonic() + 60
while "end" not in log.read_text() and time.monotonic() < deadline:
    assert not compartment.wait(0.1), log.read_text()
text = log.read_text()
same = tables == [dm.live_table(volumes.prefix(UUID) + name) for name in ("data", "data:integrity")]
compartment.kill()
assert compartment.wait(30)
compartment.ended()
closed()
with mounted() as place:
    kept = (place / "word").read_text(), (place / "word").stat().st_uid
value = text, same, kept
"""


def test_row14_root_in_a_container_reaches_neither_table_nor_device(inside: Inside) -> None:
    text, same, kept = inside(ROW14)
    lines = text.splitlines()
    assert "nodes []" in lines
    attempts = [line for line in lines if line.endswith((" DONE", " refused"))]
    assert len(attempts) == 10
    assert [line for line in attempts if line.endswith("DONE")] == []
    (mounted,) = [line for line in lines if line.startswith("mount ")]
    assert mounted.split()[1] == "ext4"
    assert {"rw", "nosuid", "nodev"} <= set(mounted.split()[2].split(","))
    assert same
    assert kept == ["kept", 0]
