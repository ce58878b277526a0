# SPDX-License-Identifier: Apache-2.0
"""The pipe between the compartment's processes and the manager, without any process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.compartments.report import Receiver, Sender
from trustme_init.errors import CompartmentRefusal


@pytest.fixture
def pipe() -> Iterator[tuple[Receiver, Sender]]:
    read, write = os.pipe()
    yield Receiver(read, 0.2), Sender(write)
    os.close(read)
    with suppress(OSError):  # the test may have closed it
        os.close(write)


def refusal(receiver: Receiver, name: str = "unshared") -> CompartmentRefusal:
    with pytest.raises(CompartmentRefusal) as caught:
        receiver.expect(name)
    return caught.value


def test_messages_arrive_in_order_with_their_words(pipe: tuple[Receiver, Sender]) -> None:
    receiver, sender = pipe
    sender.send("unshared")
    sender.send("init", "42")
    assert receiver.expect("unshared") == []
    assert receiver.expect("init") == ["42"]
    os.close(sender.fd)
    receiver.expect_end()


def test_a_failed_step_arrives_as_its_refusal(pipe: tuple[Receiver, Sender]) -> None:
    receiver, sender = pipe
    sender.step = "mount"
    sender.failed(PermissionError(1, "Operation not permitted", "/proc"))
    found = refusal(receiver)
    assert (found.code, found.evidence) == ("step-failed", "mount: /proc: Operation not permitted")


def test_a_refusal_arrives_whole(pipe: tuple[Receiver, Sender]) -> None:
    receiver, sender = pipe
    sender.failed(CompartmentRefusal("some-code", "a cause", evidence="two\nlines", remedy="do this"))
    found = refusal(receiver)
    assert found.as_dict() == {
        "kind": "CompartmentRefusal",
        "code": "some-code",
        "cause": "a cause",
        "evidence": "two lines",
        "remedy": "do this",
    }


def test_a_failure_is_seen_also_where_success_was_expected(pipe: tuple[Receiver, Sender]) -> None:
    receiver, sender = pipe
    sender.failed(ValueError("odd"))
    with pytest.raises(CompartmentRefusal) as caught:
        receiver.expect_end()
    assert caught.value.evidence == "start: ValueError: odd"


def test_the_end_or_silence_before_a_message_is_a_refusal(pipe: tuple[Receiver, Sender]) -> None:
    receiver, sender = pipe
    began = time.monotonic()
    assert refusal(receiver).code == "start-timeout"
    assert time.monotonic() - began < 2
    os.close(sender.fd)
    assert refusal(receiver).code == "step-failed"


@given(words=st.lists(st.text(), min_size=1, max_size=5))
def test_any_words_are_one_line(words: list[str]) -> None:
    read, write = os.pipe()
    Sender(write).send(*words)
    os.close(write)
    data = os.read(read, 1 << 16)
    os.close(read)
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    assert len(data) <= 4096
