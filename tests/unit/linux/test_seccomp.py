# SPDX-License-Identifier: Apache-2.0
"""The filter, run by a small interpreter; that the kernel takes it is in test_adversary_container.py."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.compartments.callfilter import RULES
from trustme_init.compartments.strictcalls import HIGHEST, STRICT_DENIED, STRICT_RULES
from trustme_init.linux.seccomp import Argument, Rule, program

ALLOW = 0x7FFF0000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
WORDS = st.integers(0, 2**32 - 1)
SMALL = st.integers(0, 5)
ARGUMENTS = st.builds(
    Argument, st.integers(0, 5), st.frozensets(SMALL, min_size=1, max_size=4), st.booleans()
)
TABLES = st.lists(
    st.builds(Rule, SMALL, st.integers(1, 100), st.lists(ARGUMENTS, max_size=3).map(tuple)),
    unique_by=lambda rule: rule.number,
    max_size=5,
)


def run(code: bytes, arch: int, number: int, args: tuple[int, ...]) -> int:
    """Interpret classic BPF as far as it is used; jumps go forward only, as the kernel demands."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *args)
    steps = list(struct.iter_unpack("=HBBI", code))
    accumulator = at = 0
    while True:
        opcode, yes, no, operand = steps[at]
        at += 1
        match opcode:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, operand)
            case 0x15:
                at += yes if accumulator == operand else no
            case 0x35:
                at += yes if accumulator >= operand else no
            case 0x06:
                result: int = operand
                return result
            case _:
                raise AssertionError(f"opcode {opcode:#x}")


def expected(rules: list[Rule], number: int, args: tuple[int, ...]) -> int:
    for rule in rules:
        if rule.number == number and all(
            (args[argument.place] % 2**32 in argument.values) == argument.inside
            for argument in rule.arguments
        ):
            return 0x00050000 | rule.errno
    return ALLOW


@given(TABLES, SMALL, st.tuples(*[st.one_of(SMALL, SMALL.map(lambda low: low | 1 << 32))] * 6))
def test_a_filter_does_what_its_rules_say(rules: list[Rule], number: int, args: tuple[int, ...]) -> None:
    assert run(program(rules, "x86_64"), ARCHITECTURES["x86_64"], number, args) == expected(
        rules, number, args
    )


@pytest.mark.parametrize("machine", ARCHITECTURES)
@given(arch=WORDS, number=WORDS)
def test_row25_calls_of_another_architecture_do_not_exist(machine: str, arch: int, number: int) -> None:
    code = program(RULES, machine)
    missing = 0x00050000 | errno.ENOSYS
    if arch != ARCHITECTURES[machine]:
        assert run(code, arch, number, (0,) * 6) == missing
    assert run(code, ARCHITECTURES[machine], number | 0x40000000, (0,) * 6) == missing


@pytest.mark.parametrize("rules", [RULES, STRICT_RULES])
def test_no_call_has_two_rules(rules: tuple[Rule, ...]) -> None:
    assert len({rule.number for rule in rules}) == len(rules)


@given(st.integers(0, 2**30 - 1))
def test_row25_a_call_that_nobody_has_looked_at_does_not_exist(number: int) -> None:
    code = program(STRICT_RULES, "x86_64", highest=HIGHEST)
    answer = run(code, ARCHITECTURES["x86_64"], number, (0,) * 6)
    assert (answer == 0x00050000 | errno.ENOSYS) == (number > HIGHEST)


@pytest.mark.parametrize("name", STRICT_DENIED)
def test_row25_calls_that_no_program_of_a_container_needs_are_refused(name: str) -> None:
    code = program(STRICT_RULES, highest=HIGHEST)
    arch = ARCHITECTURES[os.uname().machine]
    assert run(code, arch, STRICT_DENIED[name], (0x0040000,) * 6) == 0x00050000 | errno.EPERM


def test_what_programs_live_by_is_allowed() -> None:
    code = program(STRICT_RULES, highest=HIGHEST)
    arch = ARCHITECTURES[os.uname().machine]
    known = {"clone3": 435, "close_range": 436, "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441}
    assert {name for name, number in known.items() if run(code, arch, number, (0,) * 6) != ALLOW} == set()
    assert run(code, arch, STRICT_DENIED["personality"], (0xFFFFFFFF, *[0] * 5)) == ALLOW
