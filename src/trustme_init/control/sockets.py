# SPDX-License-Identifier: Apache-2.0
"""Listening Unix sockets that appear complete, and who is at the other end of a connection."""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

from trustme_init.errors import ControlRefusal

BACKLOG: Final = 128
SO_PASSRIGHTS: Final = 83
"""Whether descriptors may be sent over a Unix socket (Linux 6.16; include/uapi/asm-generic/socket.h)."""

SO_PEERPIDFD: Final = 77
"""A descriptor of the process that connected (Linux 6.5; include/uapi/asm-generic/socket.h)."""


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Return process id and user id of the other end, as they were when it connected (SO_PEERCRED)."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def peer_process(sock: socket.socket) -> int:
    """Return a pidfd of the process that connected, which nobody else's can be; whoever asks closes it.

    ControlRefusal("caller-gone") when that process has ended, or the kernel is older than Linux 6.5.
    """
    try:
        (fd,) = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4))
    except OSError as exc:
        raise ControlRefusal(
            "caller-gone",
            "the process that made this connection has ended",
            evidence=str(exc.strerror),
            remedy="ask from a process that stays; this needs Linux 6.5",
        ) from exc
    os.set_inheritable(fd, False)
    return int(fd)


def no_peer() -> int:
    """Stand for a connection without a process."""
    raise ControlRefusal("caller-gone", "this request comes from no process")


def listen(path: Path, *, uid: int, gid: int) -> tuple[socket.socket, int]:
    """Return a listening, non-blocking socket that appears at `path` in one step, and its inode number.

    It is made beside `path`, gets mode 0600 and its owner before anyone could connect, listens, and is then
    renamed over whatever a predecessor left. ControlRefusal("socket-unavailable").
    """
    beside = f".{path.name}.{os.getpid()}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    directory = -1
    # A descriptor that a client sends would be closed by this process, which can take as long as the client
    # likes (SO_LINGER). Connections inherit this. For older kernels see compartments/callfilter.py.
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(FileNotFoundError):
            os.unlink(beside, dir_fd=directory)
        umask = os.umask(0o177)
        try:
            # By way of the directory's descriptor: a socket address holds no more than 107 bytes of path.
            sock.bind(f"/proc/self/fd/{directory}/{beside}")
        finally:
            os.umask(umask)
        os.chown(beside, uid, gid, dir_fd=directory, follow_symlinks=False)
        sock.listen(BACKLOG)
        inode = os.stat(beside, dir_fd=directory, follow_symlinks=False).st_ino
        os.rename(beside, path.name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as exc:
        sock.close()
        raise ControlRefusal(
            "socket-unavailable",
            "a control socket cannot be made",
            evidence=f"{path}: {exc.strerror or errno.errorcode.get(exc.errno or 0, exc)}",
        ) from exc
    finally:
        if directory >= 0:
            os.close(directory)
    return sock, inode
