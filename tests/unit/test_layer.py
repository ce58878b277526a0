# SPDX-License-Identifier: Apache-2.0
"""meta-trustme-py says what the reference image is: parity that needs no bitbake."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from trustme_init import policy as device_policy
from trustme_init.storage.layout import ESP_NAME, ESP_TYPE, MIB, STORE_NAME, STORE_TYPE
from trustme_tools.guestos import recipe as recipes
from trustme_tools.image import disk, initramfs, libraries, modules, uki
from trustme_tools.image.build import UKI_LIMIT, Options, policy_text

ROOT = Path(__file__).resolve().parents[2]
LAYER = ROOT / "meta-trustme-py"
RECIPES = sorted([*LAYER.rglob("*.bb"), *LAYER.rglob("*.bbappend"), *LAYER.rglob("*.inc")])
EPOCH = 1767225600

# Which portion of OpenEmbedded's Python holds a module (python3-manifest.json; compared with that by
# tests/integration/test_yocto_upstream.py). What is not listed is in python3-core.
PORTIONS = {
    "base64": "netclient",
    "ctypes": "ctypes",
    "datetime": "datetime",
    "fcntl": "fcntl",
    "getpass": "unixadmin",
    "hashlib": "crypt",
    "hmac": "netclient",
    "http": "netclient",
    "json": "json",
    "logging": "logging",
    "mmap": "mmap",
    "pickle": "pickle",
    "random": "math",
    "resource": "resource",
    "secrets": "netclient",
    "shlex": "shell",
    "socket": "io",
    "ssl": "io",
    "tempfile": "io",
    "termios": "io",
    "tomllib": "tomllib",
    "tty": "terminal",
    "urllib": "netclient",
    "uuid": "netclient",
}
CORE = """
__future__ abc argparse array ast binascii builtins codecs collections contextlib dataclasses enum errno
functools gc heapq importlib inspect io ipaddress itertools lzma math operator os pathlib re sched select
selectors shutil signal stat string struct subprocess sys textwrap threading time traceback types typing
warnings weakref zlib
"""

# The kernel option that builds each module of the reference image.
OPTIONS = {
    "virtio_blk": "VIRTIO_BLK",
    "virtio_rng": "HW_RANDOM_VIRTIO",
    "efivarfs": "EFIVAR_FS",
    "dm_mod": "BLK_DEV_DM",
    "dm_verity": "DM_VERITY",
    "dm_crypt": "DM_CRYPT",
    "dm_integrity": "DM_INTEGRITY",
    "loop": "BLK_DEV_LOOP",
    "squashfs": "SQUASHFS",
    "erofs": "EROFS_FS",
    "overlay": "OVERLAY_FS",
    "veth": "VETH",
    "bridge": "BRIDGE",
    "tun": "TUN",
    "nf_tables": "NF_TABLES",
    "nft_masq": "NFT_MASQ",
    "nft_nat": "NFT_NAT",
    "nft_chain_nat": "NF_NAT",
    "nft_ct": "NFT_CT",
    "nft_compat": "NFT_COMPAT",
}


def load(name: str) -> ModuleType:
    """Import one module of the layer's library."""
    spec = importlib.util.spec_from_file_location(f"layer_{name}", LAYER / f"lib/trustme_layer/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assignments(path: Path) -> dict[str, str]:
    """Return NAME → value of the plain assignments in a bitbake file; the last one counts."""
    text = path.read_text().replace("\\\n", "")
    return dict(re.findall(r'^(?:export )?([A-Za-z0-9_:${}.\[\]-]+) *[?:+.]*= *"(.*)"$', text, re.MULTILINE))


def defaults() -> dict[str, str]:
    return assignments(LAYER / "conf/distro/include/trustme-defaults.inc")


def kernel_options() -> dict[str, str]:
    """Return option → value of all fragments."""
    found: dict[str, str] = {}
    for path in sorted((LAYER / "recipes-kernel/linux/files").glob("*.cfg")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line or (line.startswith("#") and "CONFIG_" not in line):
                continue
            match = re.fullmatch(r'CONFIG_([A-Z0-9_]+)=(y|m|n|"[^"]*"|\d+)', line)
            assert match, f"{path.name}:{number}: {line}"
            assert match[1] not in found, f"{path.name}:{number}: {match[1]} is set twice"
            found[match[1]] = match[2]
    return found


def portions(*directories: Path, skip: tuple[str, ...] = ()) -> set[str]:
    """Return the portions of Python that the modules below `directories` import (files may be named too)."""
    files = [file for path in directories for file in ([path] if path.is_file() else path.rglob("*.py"))]
    needed: set[str] = set()
    for file in files:
        if any(part in skip for part in file.parts):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            needed |= {name.split(".")[0] for name in names} & sys.stdlib_module_names
    unknown = needed - {*CORE.split()} - PORTIONS.keys()
    assert not unknown, (
        f"say in PORTIONS or CORE which package of OpenEmbedded has {', '.join(sorted(unknown))}"
    )
    return {f"python3-{PORTIONS[name]}" for name in needed & PORTIONS.keys()}


def test_layer_names_what_it_depends_on() -> None:
    conf = assignments(LAYER / "conf/layer.conf")
    assert conf["BBFILE_COLLECTIONS"] == "trustme-py"
    assert conf["LAYERSERIES_COMPAT_trustme-py"] == "wrynose"
    assert set(conf["LAYERDEPENDS_trustme-py"].split()) == {
        *("core", "openembedded-layer", "meta-python", "tpm-layer", "signing-key")
    }
    readme = (LAYER / "README.md").read_text().lower()
    for word in ("maintainer", "patch", "@", *conf["LAYERDEPENDS_trustme-py"].split()):
        assert word in readme, word


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert not re.search(r"AUTOREV|tag=|branch=master", text)
    if path.suffix == ".bb":
        names = assignments(path)
        assert {"SUMMARY", "DESCRIPTION", "SECTION", "LICENSE"} <= names.keys()


def test_versions_are_those_of_the_checkout() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert assignments(LAYER / "conf/distro/trustme.conf")["DISTRO_VERSION"] == version
    assert assignments(LAYER / "conf/distro/trustme.conf")["DISTRO_VERSION"] == Options().version
    ours = [path for path in RECIPES if path.name.startswith("trustme-") and "_" in path.name]
    assert len(ours) == 4
    assert {path.stem.partition("_")[2] for path in ours} == {version}
    pins = libraries.read_pins(ROOT / "requirements/device.txt")
    have = {path.stem for path in RECIPES}
    for name, stem in (
        ("cryptography", "python3-cryptography"),
        ("cryptography", "python3-cryptography-bin"),
        ("tpm2-pytss", "python3-tpm2-pytss"),
    ):
        assert f"{stem}_{pins[name]}" in have
    distro = assignments(LAYER / "conf/distro/trustme.conf")
    assert distro["PREFERRED_VERSION_python3-cryptography"] == pins["cryptography"]
    assert distro["PREFERRED_VERSION_python3-tpm2-pytss"] == pins["tpm2-pytss"]


def test_licence_checksum_is_that_of_the_licence() -> None:
    said = assignments(LAYER / "classes/trustme_source.bbclass")["LIC_FILES_CHKSUM"]
    digest = hashlib.md5((ROOT / "LICENSE").read_bytes(), usedforsecurity=False).hexdigest()
    assert said == f"file://LICENSE;md5={digest}"


def variables(*, development: bool = True) -> dict[str, str]:
    """Return what bitbake makes of the defaults: references to other variables followed."""
    values = {**defaults(), "TRUSTME_BUILD_EPOCH": str(EPOCH), "TRUSTME_DEVELOPMENT": str(int(development))}
    kind = "DEVELOPMENT" if development else "RELEASE"
    values["TRUSTME_PROVISIONING_REQUIRE"] = values[f"TRUSTME_PROVISIONING_REQUIRE_{kind}"]
    return {
        name: value.replace("${TRUSTME_DEVELOPMENT}", values["TRUSTME_DEVELOPMENT"])
        for name, value in values.items()
    }


@pytest.mark.parametrize("kind", ["development", "release"])
def test_policy_is_that_of_the_reference_image(kind: str) -> None:
    development = kind == "development"
    text = load("policy").text(variables(development=development))
    recipe = recipes.load(ROOT / "recipes/core/guestos.toml")
    assert text == policy_text(Options(development=development, epoch=EPOCH), recipe).decode()
    assert device_policy.parse(text.encode()).development is development


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("TRUSTME_PIN_TRIES", "ten", "not a number"),
        ("TRUSTME_DEVELOPMENT", "yes", 'not "0" or "1"'),
        ("TRUSTME_HARDWARE", "", "is not set"),
        ("TRUSTME_BUILD_EPOCH", "", "is not set"),
    ],
)
def test_policy_refuses_what_is_no_value(variable: str, value: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"{variable} .*{said}"):
        load("policy").text(variables() | {variable: value})


def test_text_in_the_policy_cannot_become_another_key() -> None:
    evil = 'x"\n[platform]\nallow_missing_tpm = true\n#'
    found = tomllib.loads(load("policy").text(variables() | {"TRUSTME_HARDWARE": evil}))
    assert found["hardware"] == evil
    assert found["platform"]["allow_missing_tpm"] is False


def test_first_process_directories_and_nodes_are_the_same() -> None:
    init = (LAYER / "recipes-core/trustme-init/files/init").read_bytes()
    assert init == initramfs.INIT
    directories: dict[str, int] = {}
    nodes = set()
    for line in (LAYER / "files/device_table-trustme.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        path, kind, mode, uid, gid, major, minor, *_ = line.split()
        assert (uid, gid) == ("0", "0")
        if kind == "d":
            directories[path[1:]] = int(mode, 8)
        else:
            nodes.add((path[1:], int(major), int(minor), int(mode, 8)))
    assert directories == {name: 0o1777 if name == "tmp" else 0o755 for name in initramfs.DIRECTORIES}
    assert nodes == set(initramfs.DEVICE_NODES)


def test_disk_layout_is_the_same() -> None:
    lines = [
        line for line in (LAYER / "files/wic/trustme-base.wks").read_text().splitlines() if line[0] != "#"
    ]
    loader, esp, store = lines
    identity = disk._identity
    assert loader == f"bootloader --ptable gpt --diskid {identity('disk')}"
    for line, name, kind, partition, size in (
        (esp, ESP_NAME, ESP_TYPE, "esp", disk.ESP_SIZE),
        (store, STORE_NAME, STORE_TYPE, "store", disk.STORE_SIZE),
    ):
        for words in (
            f"--part-name {name} --part-type {kind} --uuid {identity(partition)} ",
            f"--fixed-size {size // MIB}M --align 1024",
        ):
            assert words in line
    assert disk.GPT_SPACE == 1024 * 1024
    assert f"--fsuuid {identity('store-fs')} " in store
    # As the reference builder says it to mke2fs and mkfs.vfat.
    source = (ROOT / "src/trustme_tools/image/disk.py").read_text()
    features = "^has_journal,^resize_inode,^metadata_csum_seed,^orphan_file"
    assert f'"-O", "{features}", "-I", "256"' in source
    assert f'--mkfs-extraopts "-m 0 -b 4096 -I 256 -O {features}"' in store
    assert '("-F", "32", "-s", "2", "-n", "BOOT", "--invariant")' in source
    assert '--label BOOT --fsuuid 0x1234ABCD --mkfs-extraopts "-F 32 -s 2 --invariant"' in esp
    image = assignments(LAYER / "images/trustme-base.bb")
    assert image["IMAGE_BOOT_FILES"] == f"trustme-base.efi;{disk.BOOT_FILE}"
    assert int(defaults()["TRUSTME_DATA_SPACE"]) * MIB == disk.DATA_SPACE
    assert int(defaults()["TRUSTME_UKI_LIMIT"]) * MIB == UKI_LIMIT


def test_command_line_is_the_same() -> None:
    assert defaults()["TRUSTME_COMMAND_LINE"].split() == [*uki.COMMAND_LINE]


def test_kernel_has_every_module_of_the_reference_image_built_in() -> None:
    options = kernel_options()
    assert defaults()["TRUSTME_MODULES"].split() == [*modules.DEVICE_MODULES]
    for module in modules.DEVICE_MODULES:
        assert options[OPTIONS[module]] == "y", module
    # The list, in the kernel's words.
    for name in (
        *("NAMESPACES", "USER_NS", "PID_NS", "NET_NS", "UTS_NS", "IPC_NS", "CGROUPS", "MEMCG", "CGROUP_PIDS"),
        *("CPUSETS", "BLK_CGROUP", "CGROUP_BPF", "BPF_SYSCALL", "DM_VERITY", "DM_CRYPT", "DM_INTEGRITY"),
        *("SQUASHFS", "EROFS_FS", "OVERLAY_FS", "TCG_TIS", "TCG_CRB", "EFIVAR_FS", "SECURITYFS", "SECCOMP"),
        *("SECCOMP_FILTER", "SECURITY_LOCKDOWN_LSM", "MODULE_SIG", "MODULE_SIG_FORCE", "VIRTIO_PCI"),
    ):
        assert options[name] == "y", name


def test_kernel_fragments_are_named_where_they_are_used() -> None:
    folder = LAYER / "recipes-kernel/linux"
    named = re.findall(r"^kconf \S+ (\S+)$", (folder / "files/trustme.scc").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (folder / "files").glob("*.cfg"))
    append = (folder / "linux-yocto_6.18.bbappend").read_text()
    assert {*re.findall(r"file://(\S+?)[ \"]", append)} == {
        path.name for path in (folder / "files").iterdir()
    }


def test_device_package_needs_what_it_imports_and_nothing_else() -> None:
    names = assignments(LAYER / "recipes-core/trustme-init/trustme-init_0.1.0.bb")
    source = ROOT / "src/trustme_init"
    common = [*source.glob("*.py"), *(source / "control").glob("*.py"), source / "proto"]
    shared = {word for word in names["RDEPENDS:${PN}-common"].split() if word.startswith("python3-")}
    assert shared == portions(*common) | {"python3-core", "python3-protobuf"}
    client = {*names["RDEPENDS:${PN}-control"].split()}
    assert client - {"${PN}-common"} == portions(source / "control/cli") - shared
    device = {word for word in names["RDEPENDS:${PN}"].split() if word.startswith("python3-")}
    third = {"python3-cffi", "python3-cryptography", "python3-prctl", "python3-tpm2-pytss"}
    assert device - third == portions(source, skip=("cli",)) - shared | {"python3-core"}
    pins = libraries.read_pins(ROOT / "requirements/device.txt")
    assert {name.replace("python-", "") for name in pins} - {"protobuf", "pyroute2"} == {
        name.removeprefix("python3-") for name in third
    }


def test_client_package_is_what_the_core_container_takes() -> None:
    content = recipes.load(ROOT / "recipes/core/guestos.toml").content
    assert content is not None
    names = assignments(LAYER / "recipes-core/trustme-init/trustme-init_0.1.0.bb")
    places = names["FILES:${PN}-common"].split() + names["FILES:${PN}-control"].split()
    packages = {
        place.replace("${TRUSTME_DIR}", "trustme_init").removesuffix("/*.py").replace("/", ".")
        for place in places
        if "__pycache__" not in place
    }
    assert packages == {*content.trustme_packages}


def test_programs_of_the_initramfs_come_with_the_package() -> None:
    needs = {
        *assignments(LAYER / "recipes-core/trustme-init/trustme-init_0.1.0.bb")["RDEPENDS:${PN}"].split()
    }
    sources = {
        "usr/bin/kmod": "kmod",
        "usr/sbin/mke2fs": "e2fsprogs-mke2fs",
        "usr/sbin/sfdisk": "util-linux-sfdisk",
    }
    programs = {program for program in initramfs.PROGRAMS if "python" not in program}
    missing = programs - sources.keys()
    assert not missing, f"name the package of OpenEmbedded that has {', '.join(sorted(missing))}"
    assert {sources[program] for program in programs} <= needs
    assert "libtss2-tcti-device" in needs
