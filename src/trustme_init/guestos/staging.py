# SPDX-License-Identifier: Apache-2.0
"""The changing side of the store: a version is put together beside it, and appears in one step.

    .staging-<name>-<version>/config|signature|certificate    judged before they were written
    .staging-<name>-<version>/images/<image>.img ...          fetched by another process

Rules:
- Nothing here is believed by a later step: each judges configuration and sizes again.
- Publishing goes images, signature, certificate, and the configuration last; removing goes the other way.
  Each is durable before the next. So after a power cut a version is there as a whole, or not at all; what
  is left of the other kind `tidy` removes, or the next push goes on with.
- At most one staging for each name: what an interrupted installation can take of the disk has a bound.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from trustme_init.errors import StorageRefusal
from trustme_init.guestos.plan import Plan
from trustme_init.guestos.store import (
    FOLDER_MODE,
    IMAGES,
    MARK,
    STAGING,
    SUFFIXES,
    GuestOsStore,
    SignedFiles,
    list_names,
    open_file,
    open_folder,
    read_file,
    unwritable,
)
from trustme_init.linux.files import statfs, write_atomic
from trustme_init.trust.selection import GuestOsId, parse_stem

RESERVE: Final = 16 * 1024 * 1024
"""Bytes of the data volume that installations leave free, for everything else that has to be written."""

_PARTS: Final = dict(zip(("config", "signature", "certificate"), SUFFIXES, strict=True))


class Staging:
    """Changes to a store. StorageRefusal: those of GuestOsStore, "guestos-unwritable", "guestos-no-space"."""

    def __init__(self, store: GuestOsStore) -> None:
        self._store = store

    def staged(self) -> tuple[GuestOsId, ...]:
        """Return what is being, or was not completely, installed."""
        if not self._store.path.exists():
            return ()
        with self._root() as root:
            stems = [name.removeprefix(STAGING) for name in list_names(root) if name.startswith(STAGING)]
        return tuple(sorted(filter(None, map(parse_stem, stems))))

    def read(self, stem: str) -> SignedFiles:
        """Return the signed configuration that was staged."""
        with self._root() as root, _folder(root, STAGING + stem) as folder:
            return SignedFiles(*(read_file(folder, part, SUFFIXES[end]) for part, end in _PARTS.items()))

    def images(self, stem: str) -> Path:
        """Return the folder that the images of a staged version are fetched into."""
        return self._store.path / (STAGING + stem) / IMAGES

    def require_space(self, plan: Plan) -> None:
        """Refuse what does not fit beside what is there; nothing is changed."""
        have = sum(self._present(plan).values())
        missing = plan.size - have
        try:
            free = statfs(
                self._store.path if self._store.path.exists() else self._store.path.parent
            ).available
        except OSError as exc:
            raise unwritable(self._store.path.name, exc) from exc
        if missing + RESERVE > free:
            raise StorageRefusal(
                "guestos-no-space",
                "the data volume has no room for this GuestOS",
                evidence=f"{missing} bytes to come and {RESERVE} to stay free, {free} are",
                remedy="remove what is not needed (`control list_guestos`, `control remove_guestos`)",
            )

    def begin(self, files: SignedFiles, plan: Plan, *, reuse: bool) -> None:
        """Stage a judged configuration; what an earlier attempt at the very same has fetched stays.

        `reuse`: images of the same version that are in the store already, whole, need not be fetched.
        """
        guest_os = _identity(plan.stem)
        with self._root() as root:
            for other in self.staged():
                if other.name == guest_os.name and (other != guest_os or not self._is_for(root, files, plan)):
                    self._drop(root, STAGING + other.stem)
            name = STAGING + plan.stem
            try:
                with suppress(FileExistsError):
                    os.mkdir(name, FOLDER_MODE, dir_fd=root)
                with _folder(root, name) as folder:
                    with suppress(FileExistsError):
                        os.mkdir(IMAGES, FOLDER_MODE, dir_fd=folder)
                    for part in ("certificate", "signature", "config"):
                        write_atomic(_path(folder, part), getattr(files, part), 0o600)
                    with _folder(folder, IMAGES) as images:
                        _keep_only(images, plan)
                        if reuse:
                            _link(root, images, plan)
                os.fsync(root)
            except OSError as exc:
                raise unwritable(name, exc) from exc

    def publish(self, plan: Plan) -> None:
        """Make a staged version, whose images were checked, part of the store.

        StorageRefusal("guestos-incomplete") if an image has not its signed size.
        """
        stem = plan.stem
        with self._root() as root:
            try:
                with _folder(root, STAGING + stem) as folder, _folder(folder, IMAGES) as images:
                    self._settle_images(images, plan)
                    self._unpublish(root, stem)
                    _move(folder, IMAGES, root, stem)
                    _move(folder, "signature", root, f"{stem}.sig")
                    _move(folder, "certificate", root, f"{stem}.cert")
                    os.fsync(folder)
                    os.fsync(root)
                    _move(folder, "config", root, f"{stem}.conf")
                    os.fsync(root)
                    os.fsync(folder)
                self._drop(root, STAGING + stem)
            except OSError as exc:
                raise unwritable(stem, exc) from exc

    def discard(self, stem: str) -> None:
        """Remove what was staged; harmless when nothing was."""
        if not self._store.path.exists():
            return
        with self._root() as root:
            self._drop(root, STAGING + stem)

    def remove(self, guest_os: GuestOsId) -> None:
        """Remove a version, its configuration first."""
        with self._root() as root:
            try:
                self._unpublish(root, guest_os.stem)
            except OSError as exc:
                raise unwritable(guest_os.stem, exc) from exc

    def left_over(self) -> tuple[str, ...]:
        """Return the names of parts without a configuration, which interrupted changes left behind."""
        if not self._store.path.exists():
            return ()
        with self._root() as root:
            names = set(list_names(root))
        found = []
        for name in sorted(names):
            stem = next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)
            if parse_stem(stem) is not None and f"{stem}.conf" not in names:
                found.append(name)
        return tuple(found)

    def remove_left_over(self) -> None:
        """Remove them."""
        names = self.left_over()
        if not names:
            return
        with self._root() as root:
            for name in names:
                self._drop(root, name)

    @contextmanager
    def _root(self) -> Iterator[int]:
        root = self._store.make()
        try:
            yield root
        finally:
            os.close(root)

    def _present(self, plan: Plan) -> dict[str, int]:
        """Return the bytes of each file of the plan that are staged already."""
        folder = self.images(plan.stem)
        found = {}
        for file in plan.files:
            with suppress(OSError):
                found[file.name] = min((folder / file.name).lstat().st_size, file.size)
        return found

    def _is_for(self, root: int, files: SignedFiles, plan: Plan) -> bool:
        """Whether what is staged under the plan's name is the start of this very version."""
        try:
            with _folder(root, STAGING + plan.stem) as folder:
                return read_file(folder, "config", SUFFIXES[".conf"]) == files.config
        except OSError:
            return False

    def _settle_images(self, images: int, plan: Plan) -> None:
        _keep_only(images, plan)
        for file in plan.files:
            with suppress(FileNotFoundError):
                os.unlink(file.name + MARK, dir_fd=images)
            fd = open_file(images, file.name)
            try:
                size = os.fstat(fd).st_size
                if size != file.size:
                    raise StorageRefusal(
                        "guestos-incomplete",
                        "an image of the GuestOS is not complete",
                        evidence=f"{file.name}: {size} of {file.size} bytes",
                        remedy="push the GuestOS again",
                    )
                os.fsync(fd)
            finally:
                os.close(fd)
        os.fsync(images)

    def _unpublish(self, root: int, stem: str) -> None:
        present = set(list_names(root))
        if f"{stem}.conf" in present:
            os.unlink(f"{stem}.conf", dir_fd=root)
            os.fsync(root)
        for name in (f"{stem}.sig", f"{stem}.cert", stem):
            if name in present:
                self._drop(root, name)

    def _drop(self, root: int, name: str) -> None:
        """Remove a file or folder of the store, durably; harmless when it is not there."""
        try:
            mode = os.stat(name, dir_fd=root, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        except OSError as exc:
            raise unwritable(name, exc) from exc
        try:
            if stat.S_ISDIR(mode):
                shutil.rmtree(name, dir_fd=root)
            else:
                os.unlink(name, dir_fd=root)
            os.fsync(root)
        except OSError as exc:
            raise unwritable(name, exc) from exc


@contextmanager
def _folder(parent: int, name: str) -> Iterator[int]:
    fd = open_folder(parent, name)
    try:
        yield fd
    finally:
        os.close(fd)


def _path(folder: int, name: str) -> Path:
    # By the descriptor: the folder that was looked at is the one that is written to.
    return Path(f"/proc/self/fd/{folder}") / name


def _keep_only(images: int, plan: Plan) -> None:
    """Remove from a staged folder what does not belong to the plan, or is longer than it may be."""
    sizes = {file.name: file.size for file in plan.files}
    for name in list_names(images):
        info = os.stat(name, dir_fd=images, follow_symlinks=False)
        is_ours = stat.S_ISREG(info.st_mode) and (
            info.st_size <= sizes.get(name, -1) or name.removesuffix(MARK) in sizes.keys() - {name}
        )
        if is_ours:
            continue
        if stat.S_ISDIR(info.st_mode):
            shutil.rmtree(name, dir_fd=images)
        else:
            os.unlink(name, dir_fd=images)


def _link(root: int, images: int, plan: Plan) -> None:
    """Link whole images of the version in the store; what is whole is never written to again."""
    try:
        with _folder(root, plan.stem) as installed:
            for file in plan.files:
                with suppress(OSError):
                    _link_whole(installed, images, file.name, file.size)
    except OSError:
        return  # then everything is fetched


def _link_whole(installed: int, images: int, name: str, size: int) -> None:
    info = os.stat(name, dir_fd=installed, follow_symlinks=False)
    if stat.S_ISREG(info.st_mode) and info.st_size == size:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=images)
        os.link(name, name, src_dir_fd=installed, dst_dir_fd=images, follow_symlinks=False)


def _move(source: int, name: str, target: int, new_name: str) -> None:
    os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)


def _identity(stem: str) -> GuestOsId:
    guest_os = parse_stem(stem)
    if guest_os is None:
        raise ValueError(f"no judged configuration is called {stem!a}")
    return guest_os
