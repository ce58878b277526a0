# SPDX-License-Identifier: Apache-2.0
"""A device filter for a control group: a BPF program made of rules (BPF_PROG_TYPE_CGROUP_DEVICE).

The kernel asks it at every open of a device node, and at every mknod, by a process of the group or below it.
The instruction set is Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from trustme_init.linux.syscalls import SYS_bpf, syscall

# include/uapi/linux/bpf.h
BPF_PROG_LOAD: Final = 5
BPF_PROG_ATTACH: Final = 8
BPF_PROG_TYPE_CGROUP_DEVICE: Final = 15
BPF_CGROUP_DEVICE: Final = 6
BPF_DEVCG_DEV_BLOCK: Final = 1
BPF_DEVCG_DEV_CHAR: Final = 2
BPF_DEVCG_ACC: Final = {"m": 1, "r": 2, "w": 4}

_INSTRUCTION: Final = struct.Struct("<BBhi")
_LOAD_WORD: Final = 0x61  # BPF_LDX | BPF_MEM | BPF_W
_MOVE: Final = 0xB7  # BPF_ALU64 | BPF_MOV | BPF_K
_COPY: Final = 0xBF  # BPF_ALU64 | BPF_MOV | BPF_X
_AND: Final = 0x57  # BPF_ALU64 | BPF_AND | BPF_K
_SHIFT_RIGHT: Final = 0x77  # BPF_ALU64 | BPF_RSH | BPF_K
_JUMP_UNLESS_EQUAL: Final = 0x55  # BPF_JMP | BPF_JNE | BPF_K
_EXIT: Final = 0x95
_RESULT, _CONTEXT, _TYPE, _ACCESS, _MAJOR, _MINOR, _SPARE = range(7)
"""Registers: r0 is the answer, r1 the kernel's struct bpf_cgroup_dev_ctx."""


class DeviceRule(NamedTuple):
    """Devices that may be used: `kind` is "b" or "c"; a number that is None stands for all."""

    kind: str
    major: int | None
    minor: int | None
    access: str = "rw"
    """Some of "r", "w" and "m", for mknod."""


def program(rules: Iterable[DeviceRule]) -> bytes:
    """Return the program that allows what a rule names, if one rule allows all of the access, and no more."""
    code = [
        _step(_LOAD_WORD, _TYPE, _CONTEXT),
        _step(_COPY, _ACCESS, _TYPE),
        _step(_SHIFT_RIGHT, _ACCESS, operand=16),
        _step(_AND, _TYPE, operand=0xFFFF),
        _step(_LOAD_WORD, _MAJOR, _CONTEXT, offset=4),
        _step(_LOAD_WORD, _MINOR, _CONTEXT, offset=8),
    ]
    for rule in rules:
        kind = BPF_DEVCG_DEV_BLOCK if rule.kind == "b" else BPF_DEVCG_DEV_CHAR
        excess = 7 & ~sum(BPF_DEVCG_ACC[letter] for letter in set(rule.access))
        # (instructions before the comparison, register, value)
        tests: list[tuple[list[bytes], int, int]] = [([], _TYPE, kind)]
        if excess:
            mask = [_step(_COPY, _SPARE, _ACCESS), _step(_AND, _SPARE, operand=excess)]
            tests.append((mask, _SPARE, 0))
        for register, number in ((_MAJOR, rule.major), (_MINOR, rule.minor)):
            if number is not None:
                tests.append(([], register, number))
        left = sum(len(before) + 1 for before, _, _ in tests) + 2
        for before, register, value in tests:
            left -= len(before) + 1
            code += [*before, _step(_JUMP_UNLESS_EQUAL, register, offset=left, operand=value)]
        code += [_step(_MOVE, _RESULT, operand=1), _step(_EXIT)]
    return b"".join([*code, _step(_MOVE, _RESULT, operand=0), _step(_EXIT)])


def attach(group: int, rules: Iterable[DeviceRule]) -> None:
    """Put the group (an open directory) under these rules, in the place of those before.

    They go with the group. OSError: EINVAL or ENOSYS if the kernel lacks CONFIG_CGROUP_BPF.
    """
    code = program(rules)
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    # union bpf_attr: type, count, instructions, licence; log level, size and buffer, kernel version, flags
    load = struct.pack(
        "<IIQQIIQII",
        BPF_PROG_TYPE_CGROUP_DEVICE,
        len(code) // _INSTRUCTION.size,
        ctypes.addressof(instructions),
        ctypes.addressof(licence),
        *(0, 0, 0, 0, 0),
    )
    fd = syscall(SYS_bpf, BPF_PROG_LOAD, load, len(load), filename="bpf: load")
    try:
        # target, program, attach type, flags: none, so that it replaces what the group had
        which = struct.pack("<IIII", group, fd, BPF_CGROUP_DEVICE, 0)
        syscall(SYS_bpf, BPF_PROG_ATTACH, which, len(which), filename="bpf: attach")
    finally:
        os.close(fd)


def _step(code: int, target: int = 0, source: int = 0, *, offset: int = 0, operand: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, target | source << 4, offset, operand)
