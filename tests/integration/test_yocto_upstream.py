# SPDX-License-Identifier: Apache-2.0
"""The layers as bitbake sees them: checkout, parse, the whole task graph, yocto-check-layer.

Needs the upstream repositories: TRUSTME_YOCTO_LAYERS names a folder that has a git repository (bare or not)
for each one in kas/, called as it is called there, with the pinned commit. Without it everything here is
skipped, by name. Takes ten minutes on two cores, or twenty when they are busy. bitbake refuses root: as root,
the user TRUSTME_YOCTO_USER (default nobody) runs it.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from scripts import check_kas
from tests.unit import test_layer

ROOT = Path(__file__).resolve().parents[2]
LAYERS = os.environ.get("TRUSTME_YOCTO_LAYERS", "")
USER = os.environ.get("TRUSTME_YOCTO_USER", "nobody")
MACHINES = ("qemux86-64", "genericx86-64")

pytestmark = pytest.mark.skipif(
    not LAYERS, reason="TRUSTME_YOCTO_LAYERS names no folder with the upstream repositories"
)


@dataclass(frozen=True)
class Builder:
    """A work directory of kas that a normal user owns, with the repositories taken from the folder."""

    work: Path

    def run(self, *words: str, machine: str = "qemux86-64") -> subprocess.CompletedProcess[str]:
        """Run a command in bitbake's environment."""
        configuration = ROOT / f"kas/{machine}.yml"
        return self.kas("shell", str(configuration), "-c", " ".join(words))

    def kas(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run kas as the normal user."""
        environment = {
            "PATH": os.environ["PATH"],
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.work),
            "KAS_WORK_DIR": str(self.work),
            "GITCONFIG_FILE": str(self.work / "gitconfig"),
        }
        words = [sys.executable, "-m", "kas", *arguments]
        user = pwd.getpwnam(USER) if os.geteuid() == 0 else None
        return subprocess.run(
            words,
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            user=user and user.pw_uid,
            group=user and user.pw_gid,
        )


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    work = tmp_path_factory.mktemp("yocto")
    # A normal user has to get through to its own folder.
    for parent in (work, *work.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    lines = ["[safe]", "directory = *"]
    for name, address in check_kas.UPSTREAM.items():
        lines += [f'[url "file://{Path(LAYERS).resolve() / name}"]', f"insteadOf = {address}"]
    (work / "gitconfig").write_text("\n".join(lines) + "\n")
    if os.geteuid() == 0:
        shutil.chown(work, USER)
    yield Builder(work)
    shutil.rmtree(work, ignore_errors=True)


def configured() -> list[str]:
    """Return the machines whose repositories are all in the folder."""
    return [
        machine
        for machine in MACHINES
        if all((Path(LAYERS) / name).exists() for name in _repositories(machine))
    ]


def _repositories(machine: str) -> list[str]:
    names: list[str] = []
    for file in ("base", machine):
        repositories = yaml.safe_load((ROOT / f"kas/{file}.yml").read_text()).get("repos") or {}
        names += [name for name in repositories if name != check_kas.OURS]
    return names


def test_checkout_gives_exactly_the_pinned_commits(builder: Builder) -> None:
    machine = configured()[-1]
    done = builder.kas("checkout", str(ROOT / f"kas/{machine}.yml"))
    assert done.returncode == 0, done.stderr
    wanted = {**check_kas.pins(yaml.safe_load((ROOT / "kas/base.yml").read_text()))}
    wanted |= check_kas.pins(yaml.safe_load((ROOT / f"kas/{machine}.yml").read_text()))
    for name, commit in wanted.items():
        command = ["git", "-c", "safe.directory=*", "-C", str(builder.work / name), "rev-parse", "HEAD"]
        head = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        assert head == commit, name


def test_standard_library_is_packaged_as_the_recipe_expects(builder: Builder) -> None:
    """PORTIONS of tests/unit/test_layer.py against the manifest of OpenEmbedded's Python."""
    place = "openembedded-core/meta/recipes-devtools/python/python3/python3-manifest.json"
    text = (builder.work / place).read_text()
    manifest = json.loads("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    found: dict[str, set[str]] = {}
    for portion, entry in manifest.items():
        for file in entry["files"]:
            inside = re.sub(r"^\$\{libdir\}/python\$\{PYTHON_MAJMIN\}/(lib-dynload/)?", "", file)
            found.setdefault(re.split(r"[/.]", inside)[0], set()).add(portion)
    for module, portion in test_layer.PORTIONS.items():
        assert portion in found[module], (module, found[module])
        # What comes with Python's core anyway needs no portion of its own.
        assert module in {"fcntl", "http", "urllib"} or "core" not in found[module], module
    compiled_in = set(sys.builtin_module_names) | {"errno", "zlib", "math"}
    for module in test_layer.CORE.split():
        assert "core" in found.get(module, set()) or module in compiled_in, (module, found.get(module))


@pytest.mark.parametrize("machine", MACHINES)
def test_whole_task_graph(builder: Builder, machine: str) -> None:
    if machine not in configured():
        pytest.skip(f"the folder has not every repository of kas/{machine}.yml")
    done = builder.run("bitbake", "-n", "trustme-base", machine=machine)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "ERROR:" not in said
    summary = re.search(r"Attempted (\d+) tasks .* all succeeded", said)
    assert summary
    assert int(summary[1]) > 2000


@pytest.mark.parametrize("layer", ["meta-trustme-py", "recipes"])
def test_yocto_check_layer(builder: Builder, layer: str) -> None:
    others = [
        *("meta-openembedded/meta-oe", "meta-openembedded/meta-python", "meta-openembedded/meta-networking"),
        *("meta-security/meta-tpm", "meta-secure-core/meta-signing-key"),
    ]
    dependencies = [str(builder.work / name) for name in others]
    if layer == "recipes":
        dependencies.append(str(ROOT / "meta-trustme-py"))
    # A recipe of meta-signing-key, which nothing here uses, needs a layer that is not here: world would fail.
    mask = ["BB_ENV_PASSTHROUGH_ADDITIONS=BBMASK", "BBMASK=/gen-sbkeys/"]
    words = [
        *mask,
        "yocto-check-layer",
        str(ROOT / layer),
        "--no-auto-dependency",
        "--dependency",
        *dependencies,
    ]
    done = builder.run(*words)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert "FAIL" not in said
