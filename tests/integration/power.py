# SPDX-License-Identifier: Apache-2.0
"""Power cuts: a process that dies at a numbered effect, and every disk that the next boot may then find.

`run` forks a child which does some work below a directory. Whatever would outlast the child is an effect and
has a number. At the number of the cut the child ends by `_exit`, right before that effect and so right after
the one before it: nothing of the interpreter's, no `finally` and no `except`, gets a chance. With `full_from`
the disk is full from that effect on, and the child lives.

Effects are, below the directory: creating and truncating a file (open(2)), writing, setting a mode or a
length, fsync, link, rename, unlink, mkdir and rmdir; and the TPM commands that change what a TPM keeps over a
reset (`TPM_COMMANDS`). An effect that is made in another way is not missed in silence: after each run the
directory must be what the recorded effects make of it.

What a power cut leaves (`Volume.survivors`) is modelled as pessimistically as POSIX allows, not as kindly as
ext4 in fact is:
- A file has the content of its last fsync, or what was written since, or half of that.
- A directory has the names of its last fsync; of what was done to names since then, in any directory, any
  part may have reached the disk (of more than `SUBSETS` things: each beginning, each alone, all but each).
  A rename within a directory is one such thing: never both names, never none.
- What was never reached by an fsync of its directory may not be there; a file that is there although it was
  never synced itself may be empty.
- A TPM has done what it was told before the cut, durably. It does not sync the disk.
- Modes are not modelled: a file has the one it was last given.
States of different runs are the same, and need to be looked at once, when the same effects made them
(`Survivor.made_by`): what differs is the random numbers in them.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from tpm2_pytss import ESAPI

from trustme_init.errors import Refusal
from trustme_init.tpm import ownership

SUBSETS: Final = 3
TPM_COMMANDS: Final = (
    *("nv_define_space", "nv_undefine_space", "nv_undefine_space_special"),
    *("nv_write", "nv_increment", "nv_extend", "nv_set_bits", "nv_change_auth"),
    *("nv_write_lock", "nv_read_lock", "nv_global_write_lock"),
    *("evict_control", "hierarchy_change_auth", "hierarchy_control", "set_primary_policy", "clear"),
    *("clear_control", "change_eps", "change_pps", "pcr_allocate", "set_algorithm_set"),
    *("dictionary_attack_parameters", "dictionary_attack_lock_reset"),
)
"""Methods of ESAPI."""

ROOM: Final = ("create", "mkdir", "link", "write", "sync-file", "rename")
"""What a full disk refuses: space for names and content, at once or, allocated later, at the fsync."""

_REAL: Final[Mapping[str, Callable[..., Any]]] = {
    name: getattr(os, name)
    for name in (
        *("open", "write", "fsync", "fdatasync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir"),
        *("link", "fchmod", "chmod", "truncate", "ftruncate", "stat", "close"),
    )
}
_EVERY_CONTENT: Final = ("synced", "torn", "written")


@dataclass(frozen=True, slots=True)
class Effect:
    """One thing that outlasts the process; of which file or directory (by its number in the volume)."""

    kind: str
    node: int = -1
    name: str = ""
    target: int = -1
    other: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass
class _Node:
    """A file or a directory, as it is and as it was last synced. `made_by`: effects, negative before any."""

    mode: int
    data: bytes = b""
    made_by: int = -1
    names: dict[str, int] | None = None
    synced_data: bytes = b""
    synced_made_by: int = -1
    synced_names: dict[str, int] = field(default_factory=dict)


Tree = dict[str, tuple[int, bytes | None]]
"""Paths to mode and content; None is a directory."""


@dataclass(frozen=True)
class Survivor:
    """What the next boot may find."""

    how: str
    """Which of what was not synced is there."""
    tree: Tree
    made_by: tuple[tuple[str, int, str], ...]
    """Of each path: the effect that made it last, and whether it is whole."""

    def put(self, root: Path) -> None:
        """Make this the content of the empty directory `root`."""
        for path, (mode, data) in self.tree.items():
            place = root / path
            if data is None:
                place.mkdir()
            else:
                place.write_bytes(data)
            place.chmod(mode)


class Volume:
    """A directory with everything in it, and what has become of it."""

    def __init__(self, root: Path) -> None:
        self._nodes: list[_Node] = []
        self.numbers: dict[tuple[int, int], int] = {}
        """Device and inode numbers to nodes; the kernel gives an inode number again once it is free."""
        self._pending: list[dict[tuple[int, str], int | None]] = []
        self._count = 0
        self._scan(root)

    def _scan(self, path: Path) -> int:
        """Take over what is there: all of it is durable."""
        info = path.lstat()
        number = len(self._nodes)
        node = _Node(stat.S_IMODE(info.st_mode), made_by=-2 - number, synced_made_by=-2 - number)
        self._nodes.append(node)
        self.numbers[info.st_dev, info.st_ino] = number
        if stat.S_ISDIR(info.st_mode):
            node.names = {each.name: self._scan(each) for each in sorted(path.iterdir())}
            node.synced_names = dict(node.names)
        else:
            node.data = node.synced_data = path.read_bytes()
        return number

    def new(self) -> int:
        """Return the number that the next file or directory will have."""
        return len(self._nodes)

    def is_folder(self, number: int) -> bool:
        """Whether a node is a directory."""
        return self._nodes[number].names is not None

    def apply(self, effect: Effect) -> None:
        """Let an effect happen."""
        made_by = self._count
        self._count += 1
        node = self._nodes[effect.node] if effect.node >= 0 else None
        match effect.kind:
            case "create" | "mkdir":
                names: dict[str, int] | None = {} if effect.kind == "mkdir" else None
                self._nodes.append(_Node(effect.offset, b"", made_by, names, synced_made_by=made_by))
                self._rename({(effect.node, effect.name): effect.target})
            case "unlink" | "rmdir" | "link":
                self._rename({(effect.node, effect.name): effect.target if effect.kind == "link" else None})
            case "rename":
                moved = self._names(effect.node)[effect.name]
                self._rename(
                    {(effect.node, effect.name): None, (effect.target, effect.other): moved},
                )
            case "write" if node is not None:
                held = node.data.ljust(effect.offset, b"\0")
                node.data = held[: effect.offset] + effect.data + held[effect.offset + len(effect.data) :]
                node.made_by = made_by
            case "length" if node is not None:
                node.data = node.data[: effect.offset].ljust(effect.offset, b"\0")
                node.made_by = made_by
            case "mode" if node is not None:
                node.mode = effect.offset
            case "sync-file" if node is not None:
                node.synced_data, node.synced_made_by = node.data, node.made_by
            case "sync-directory":
                self._sync_names(effect.node)
            case "tpm":
                pass
            case _:
                raise AssertionError(effect)

    def _names(self, number: int) -> dict[str, int]:
        names = self._nodes[number].names
        assert names is not None
        return names

    def _rename(self, change: dict[tuple[int, str], int | None]) -> None:
        self._pending.append(change)
        for (folder, name), target in change.items():
            _set(self._names(folder), name, target)

    def _sync_names(self, number: int) -> None:
        self._nodes[number].synced_names = dict(self._names(number))
        for change in self._pending:
            for folder, name in list(change):
                if folder == number:
                    del change[folder, name]
        self._pending = [change for change in self._pending if change]

    def everything(self) -> Tree:
        """Return the tree of a disk that loses nothing."""
        return self._survivor(range(len(self._pending)), "written").tree

    def survivors(self) -> list[Survivor]:
        """Return what may be found after a cut now, each once."""
        found: dict[object, Survivor] = {}
        for chosen, content in itertools.product(_subsets(len(self._pending)), _EVERY_CONTENT):
            survivor = self._survivor(chosen, content)
            found.setdefault(survivor.made_by, survivor)
        return list(found.values())

    def _survivor(self, chosen: range | tuple[int, ...], content: str) -> Survivor:
        tree: Tree = {}
        made_by: list[tuple[str, int, str]] = []

        def walk(number: int, path: str) -> None:
            node = self._nodes[number]
            if node.names is not None:
                names = dict(node.synced_names)
                for each in chosen:
                    for (folder, name), target in self._pending[each].items():
                        if folder == number:
                            _set(names, name, target)
                if path:
                    tree[path] = (node.mode, None)
                    made_by.append((path, -1, "directory"))
                for name, target in sorted(names.items()):
                    walk(target, f"{path}/{name}" if path else name)
                return
            whole = node.data == node.synced_data
            kept = "written" if whole else content
            data = {
                "synced": node.synced_data,
                "written": node.data,
                "torn": node.data[: len(node.data) // 2],
            }
            tree[path] = (node.mode, data[kept])
            made_by.append((path, node.synced_made_by if kept == "synced" else node.made_by, kept))

        walk(0, "")
        how = f"{len(chosen)} of {len(self._pending)} unsynced changes of names, content {content}"
        return Survivor(how, tree, tuple(made_by))


def _set(names: dict[str, int], name: str, target: int | None) -> None:
    if target is None:
        names.pop(name, None)
    else:
        names[name] = target


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    every = tuple(range(count))
    if count <= SUBSETS:
        for size in range(count + 1):
            yield from itertools.combinations(every, size)
        return
    yield from (every[:size] for size in range(count + 1))
    for each in every:
        yield (each,)
        yield (*every[:each], *every[each + 1 :])


@dataclass(frozen=True)
class Outcome:
    """What a child did."""

    effects: tuple[Effect, ...]
    ended: str
    """ "cut", "returned", "refused", or "failed" by what is no refusal."""
    code: str = ""
    """Of the refusal."""
    text: str = ""
    """The refusal or the failure in words."""
    notes: tuple[tuple[int, str], ...] = ()
    """What was noted (`note`), with the number of effects before it."""


@dataclass(frozen=True)
class Run:
    """A child's outcome and what it left of the directory."""

    outcome: Outcome
    volume: Volume

    @property
    def tpm_effects(self) -> int:
        """How many commands changed the TPM."""
        return sum(effect.kind == "tpm" for effect in self.outcome.effects)


def run(
    work: Callable[[], object], root: Path, *, cut: int | None = None, full_from: int | None = None
) -> Run:
    """Do `work` in a child, until its end or until the effect number `cut` is about to happen."""
    volume = Volume(root)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _Child(volume, writing, cut, full_from).do(work)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        report = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert (status, bool(report)) == (0, True), "the child ended in a way of its own"
    outcome: Outcome = pickle.loads(report)  # noqa: S301 - our own child's
    for effect in outcome.effects:
        volume.apply(effect)
    assert volume.everything() == Volume(root).everything(), "an effect that was not counted"
    return Run(outcome, volume)


_child: _Child | None = None


def note(word: str) -> None:
    """Have a word in the outcome, if this is a child."""
    if _child is not None:
        _child.notes.append((len(_child.effects), word))


class _Child:
    """The process that is going to die. It never returns, so nothing that it replaces is put back."""

    def __init__(self, volume: Volume, report: int, cut: int | None, full_from: int | None) -> None:
        self._volume = volume
        self._report = report
        self._cut = cut
        self._full_from = full_from
        self.effects: list[Effect] = []
        self.notes: list[tuple[int, str]] = []
        self._count = 0

    def do(self, work: Callable[[], object]) -> NoReturn:
        global _child  # noqa: PLW0603 - of this process
        _child = self
        try:
            self._replace_calls()
            work()
        except Refusal as refusal:
            self._end("refused", refusal.code, str(refusal))
        except BaseException as exc:  # noqa: BLE001 - the parent is told, whatever it is
            self._end("failed", text=f"{type(exc).__name__}: {exc}")
        self._end("returned")

    def _end(self, ended: str, code: str = "", text: str = "") -> NoReturn:
        outcome = Outcome(tuple(self.effects), ended, code, text, tuple(self.notes))
        view = memoryview(pickle.dumps(outcome))
        while view:
            view = view[_REAL["write"](self._report, view) :]
        os._exit(0)

    def _before(self, kind: str) -> None:
        """Pass the instant before an effect, or do not."""
        if self._count == self._cut:
            self._end("cut")
        self._count += 1
        if self._full_from is not None and self._count > self._full_from and kind in ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _record(self, effect: Effect) -> None:
        self.effects.append(effect)
        self._volume.apply(effect)

    # What is below the directory?

    def _node(self, info: os.stat_result) -> int | None:
        return self._volume.numbers.get((info.st_dev, info.st_ino))

    def _place(self, path: Any, dir_fd: int | None) -> tuple[int, str] | None:
        """Return the directory's number and the name in it; None for what is elsewhere."""
        head, name = os.path.split(os.fsdecode(path))
        if not head and dir_fd is not None:
            folder = self._node(os.fstat(dir_fd))
        else:
            folder = self._node(os.stat(head or ".", dir_fd=dir_fd))
        return None if folder is None or not self._volume.is_folder(folder) else (folder, name)

    def _appeared(self, kind: str, place: tuple[int, str], info: os.stat_result) -> None:
        number = self._volume.new()
        folder, name = place
        self._record(Effect(kind, folder, name, target=number, offset=stat.S_IMODE(info.st_mode)))
        self._volume.numbers[info.st_dev, info.st_ino] = number

    # The calls.

    def _replace_calls(self) -> None:
        calls: dict[str, Callable[..., Any]] = {
            "open": self._open,
            "write": self._write,
            "fsync": self._fsync,
            "fdatasync": self._fsync,
            "link": self._link,
            "rename": self._rename,
            "replace": self._rename,
            "unlink": self._unlink,
            "remove": self._unlink,
            "mkdir": self._mkdir,
            "rmdir": self._rmdir,
            "fchmod": self._chmod,
            "chmod": self._chmod,
            "truncate": self._truncate,
            "ftruncate": self._truncate,
        }
        for name, call in calls.items():
            setattr(os, name, call)
        for name in TPM_COMMANDS:
            if (method := getattr(ESAPI, name, None)) is not None:
                setattr(ESAPI, name, self._counted(name, method))
        # The one command that the product gives by the C library's own function.
        setattr(ownership, "lib", _Library(self))  # noqa: B010 - not for mypy

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self._before("tpm")
            try:
                return call(*arguments, **options)
            finally:
                self._record(Effect("tpm", name=name))

        return counted

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> Any:
        place = self._place(path, dir_fd) if flags & (os.O_CREAT | os.O_TRUNC) else None
        if place is None:
            return _REAL["open"](path, flags, mode, dir_fd=dir_fd)
        try:
            info: os.stat_result | None = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            info = None
        if info is None and flags & os.O_CREAT:
            self._before("create")
            fd = _REAL["open"](path, flags, mode, dir_fd=dir_fd)
            self._appeared("create", place, os.fstat(fd))
            return fd
        if info is not None and flags & os.O_TRUNC and not flags & os.O_EXCL:
            self._before("length")
            fd = _REAL["open"](path, flags, mode, dir_fd=dir_fd)
            self._record(Effect("length", self._volume.numbers[info.st_dev, info.st_ino]))
            return fd
        return _REAL["open"](path, flags, mode, dir_fd=dir_fd)

    def _write(self, fd: int, data: Any) -> Any:
        number = self._node(os.fstat(fd))
        if number is None:
            return _REAL["write"](fd, data)
        self._before("write")
        offset = os.lseek(fd, 0, os.SEEK_CUR)
        count = _REAL["write"](fd, data)
        self._record(Effect("write", number, offset=offset, data=bytes(data)[:count]))
        return count

    def _fsync(self, fd: int) -> None:
        number = self._node(os.fstat(fd))
        if number is not None:
            kind = "sync-directory" if self._volume.is_folder(number) else "sync-file"
            self._before(kind)
            self._record(Effect(kind, number))
        # The real one is left out: this machine's power stays on, and its disk is slow.

    def _rename(
        self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        here, there = self._place(old, src_dir_fd), self._place(new, dst_dir_fd)
        if here is not None and there is not None:
            self._before("rename")
        _REAL["rename"](old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        if here is not None and there is not None:
            self._record(Effect("rename", here[0], here[1], target=there[0], other=there[1]))

    def _link(
        self,
        source: Any,
        target: Any,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        place = self._place(target, dst_dir_fd)
        number = self._node(os.stat(source, dir_fd=src_dir_fd, follow_symlinks=follow_symlinks))
        if place is not None and number is not None:
            self._before("link")
        _REAL["link"](
            source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks
        )
        if place is not None and number is not None:
            self._record(Effect("link", *place, target=number))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", path, dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", path, dir_fd)

    def _remove(self, kind: str, path: Any, dir_fd: int | None) -> None:
        place = self._place(path, dir_fd)
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)  # what is not there has no effect
        if place is not None:
            self._before(kind)
        _REAL[kind](path, dir_fd=dir_fd)
        if place is not None:
            self._record(Effect(kind, *place))

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        place = self._place(os.fspath(path).rstrip("/"), dir_fd)
        if place is not None:
            self._before("mkdir")
        _REAL["mkdir"](path, mode, dir_fd=dir_fd)
        if place is not None:
            self._appeared("mkdir", place, os.stat(path, dir_fd=dir_fd))

    def _chmod(self, path: Any, mode: int, **options: Any) -> None:
        number = self._node(os.stat(path, **options))  # noqa: PTH116 - it may be a descriptor
        if number is not None:
            self._before("mode")
        _REAL["chmod"](path, mode, **options)
        if number is not None:
            self._record(Effect("mode", number, offset=mode))

    def _truncate(self, path: Any, length: int) -> None:
        number = self._node(os.stat(path))  # noqa: PTH116 - likewise
        if number is not None:
            self._before("length")
        _REAL["truncate"](path, length)
        if number is not None:
            self._record(Effect("length", number, offset=length))


class _Library:
    """The C library as `ownership` calls it, with its one persistent command counted."""

    def __init__(self, child: _Child) -> None:
        self._real: Any = vars(ownership)["lib"]
        self.Esys_SetPrimaryPolicy = child._counted("set_primary_policy", self._real.Esys_SetPrimaryPolicy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
