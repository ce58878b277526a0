# SPDX-License-Identifier: Apache-2.0
"""Image directories of both builders, and what is not one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trustme_tools.cli import main
from trustme_tools.errors import ToolError
from trustme_tools.machine import images

DEPLOYED = ("bzImage", "core-image-minimal.testdata.json", "modules-qemux86-64.tgz")


def make(directory: Path, *, without: str = "") -> Path:
    directory.mkdir(parents=True)
    (directory / "pki").mkdir()
    for name in ("trustme-base.img", "trustme-base.efi"):
        (directory / name).touch()
    (directory / "manifest.json").write_text(json.dumps({"version": 1, "builder": "a builder"}))
    if without:
        (directory / without).unlink()
    return directory


def deploy(build: Path) -> Path:
    """A deploy directory as bitbake leaves it: versioned files, links, and much that is not ours."""
    directory = make(build / "tmp/deploy/images/qemux86-64")
    (directory / "trustme-base.img").rename(directory / "trustme-base-qemux86-64-20260101.img")
    (directory / "trustme-base.img").symlink_to("trustme-base-qemux86-64-20260101.img")
    for name in DEPLOYED:
        (directory / name).touch()
    return directory


def failure(path: Path) -> ToolError:
    with pytest.raises(ToolError) as caught:
        images.load(path)
    assert caught.value.remedy
    return caught.value


def test_the_reference_builders(tmp_path: Path) -> None:
    image = images.load(make(tmp_path / "image"))
    assert image.manifest["builder"] == "a builder"
    assert image.disk == tmp_path / "image/trustme-base.img"


def test_a_deploy_directory(tmp_path: Path) -> None:
    assert (
        images.load(deploy(tmp_path / "build")).disk.resolve().name == "trustme-base-qemux86-64-20260101.img"
    )


def test_a_deploy_directory_without_our_image(tmp_path: Path) -> None:
    directory = deploy(tmp_path / "build")
    (directory / "trustme-base-qemux86-64-20260101.img").unlink()
    error = failure(directory)
    assert error.code == "image-not-deployed"
    assert "trustme-base.img: a link to what is gone" in error.evidence
    assert "bitbake trustme-base" in error.remedy


@pytest.mark.parametrize("place", ["", "tmp", "tmp/deploy", "tmp/deploy/images"])
def test_a_directory_above_names_the_right_one(tmp_path: Path, place: str) -> None:
    directory = deploy(tmp_path / "build")
    if place == "tmp":
        place = "tmp/../tmp"
    error = failure(tmp_path / "build" / place)
    assert error.code == "no-image"
    assert directory.name in error.remedy


@pytest.mark.parametrize("name", ["trustme-base.img", "trustme-base.efi", "manifest.json"])
def test_something_is_missing(tmp_path: Path, name: str) -> None:
    error = failure(make(tmp_path / "image", without=name))
    assert (error.code, error.evidence) == ("no-image", f"missing: {name}")


def test_no_directory_at_all(tmp_path: Path) -> None:
    assert failure(tmp_path / "never-there").code == "no-image"


@pytest.mark.parametrize(
    ("text", "code"),
    [("{", "bad-manifest"), ("[]", "manifest-version"), ('{"version": 2}', "manifest-version")],
)
def test_a_manifest_that_cannot_be_read(tmp_path: Path, text: str, code: str) -> None:
    (make(tmp_path / "image") / "manifest.json").write_text(text)
    assert failure(tmp_path / "image").code == code


@pytest.mark.parametrize("words", [[], ["one", "--image-dir", "two"]])
def test_run_takes_one_image_directory(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "--once", *words]) == 2
    assert "image directories are named" in capsys.readouterr().err


def test_run_takes_it_either_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(tmp_path)], ["--image-dir", str(tmp_path)]):
        assert main.main(["run", "--once", *words]) == 1
        assert f"{tmp_path} is not an image directory" in capsys.readouterr().err
