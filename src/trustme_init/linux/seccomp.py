# SPDX-License-Identifier: Apache-2.0
"""System call filters (Documentation/userspace-api/seccomp_filter.rst): rules as classic BPF.

A filter sees numbers and register values, never what a pointer leads to. It is inherited by everything the
process becomes, and cannot be taken off. Its length costs nothing where it matters: of a call that is allowed
whatever its arguments the kernel remembers that, and does not run the filter again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from trustme_init.linux.syscalls import SYS_seccomp, syscall

SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_RET_ALLOW: Final = 0x7FFF0000
SECCOMP_RET_ERRNO: Final = 0x00050000

# include/uapi/linux/audit.h
_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT: Final = 0x40000000
"""On x86-64, set in the numbers of a second set of calls (arch/x86/include/uapi/asm/unistd.h)."""

# struct seccomp_data: int nr, u32 arch, u64 instruction pointer, u64 args[6]; both architectures are
# little-endian, so the low half of an argument comes first.
_NR: Final = 0
_ARCH: Final = 4
_ARGS: Final = 16

# linux/bpf_common.h: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_JMP|BPF_JGE|BPF_K, BPF_RET|BPF_K
_LOAD: Final = 0x20
_EQUAL: Final = 0x15
_AT_LEAST: Final = 0x35
_RETURN: Final = 0x06
_INSTRUCTION: Final = struct.Struct("=HBBI")


class Argument(NamedTuple):
    """A condition on one argument, of which the kernel uses the low 32 bits."""

    place: int
    values: frozenset[int]
    inside: bool = True
    """Met when the argument is one of `values`; else, when it is none of them."""


class Rule(NamedTuple):
    """A call that fails with `errno` where all `arguments` are met (always, without any)."""

    number: int
    errno: int
    arguments: tuple[Argument, ...] = ()


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def program(
    rules: Iterable[Rule], machine: str = os.uname().machine, *, highest: int = _X32_BIT - 1
) -> bytes:
    """Return the filter that refuses what `rules` name and allows the rest, at most one rule per call.

    Calls above `highest` do not exist (ENOSYS): what a kernel of tomorrow adds is not allowed unseen.
    Calls of another architecture or of x32 fail with ENOSYS: their numbers mean something else, and to a
    filter that looked at numbers alone each would be a way around it.
    """
    missing = _refuse(errno.ENOSYS)
    code = [
        _step(_LOAD, _ARCH),
        _step(_EQUAL, _ARCHITECTURES[machine], yes=1),
        missing,
        _step(_LOAD, _NR),
        _step(_AT_LEAST, min(highest + 1, _X32_BIT), no=1),
        missing,
    ]
    for rule in rules:
        body = [step for argument in rule.arguments for step in _unless_met(argument)]
        body.append(_refuse(rule.errno))
        code += [_step(_EQUAL, rule.number, no=len(body)), *body]
    return b"".join([*code, _ALLOW])


def install(rules: Iterable[Rule], *, highest: int = _X32_BIT - 1) -> None:
    """Put the calling thread, and whatever it becomes, under a filter. Raises OSError.

    EACCES without no_new_privs and without sys_admin in its user namespace; EINVAL or ENOSYS if the kernel
    lacks CONFIG_SECCOMP_FILTER.
    """
    code = program(rules, highest=highest)
    argument = _Program(len(code) // _INSTRUCTION.size, code)
    syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(argument), filename="seccomp")


def _unless_met(argument: Argument) -> list[bytes]:
    """Return what allows the call where the condition is not met, and goes on behind itself where it is."""
    code = [_step(_LOAD, _ARGS + 8 * argument.place)]
    values = sorted(argument.values)
    if argument.inside:
        code += [_step(_EQUAL, value, yes=len(values) - at) for at, value in enumerate(values)]
        return [*code, _ALLOW]
    for value in values:
        code += [_step(_EQUAL, value, no=1), _ALLOW]
    return code


def _step(code: int, operand: int, *, yes: int = 0, no: int = 0) -> bytes:
    """Encode one instruction; `yes` and `no` are how many to skip after a comparison."""
    return _INSTRUCTION.pack(code, yes, no, operand)


def _refuse(number: int) -> bytes:
    return _step(_RETURN, SECCOMP_RET_ERRNO | number)


_ALLOW: Final = _step(_RETURN, SECCOMP_RET_ALLOW)
