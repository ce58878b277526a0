# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustme_init.trust.clock import PLAUSIBLE, ClockReason, effective_time

FLOOR = datetime(2026, 11, 24, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MOMENTS = st.datetimes(datetime(1971, 1, 1), datetime(2999, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds the zone


@pytest.mark.parametrize(
    ("rtc", "at", "reason"),
    [
        (EPOCH, FLOOR, ClockReason.RTC_BEFORE_FLOOR),
        (FLOOR - timedelta(seconds=1), FLOOR, ClockReason.RTC_BEFORE_FLOOR),
        (FLOOR, FLOOR, ClockReason.RTC),
        (FLOOR + timedelta(days=400), FLOOR + timedelta(days=400), ClockReason.RTC),
        (datetime(2038, 1, 19, 3, 14, 8, tzinfo=UTC), datetime(2038, 1, 19, 3, 14, 8, tzinfo=UTC),
         ClockReason.RTC),
        (FLOOR + PLAUSIBLE, FLOOR + PLAUSIBLE, ClockReason.RTC),
        (FLOOR + PLAUSIBLE + timedelta(seconds=1), FLOOR, ClockReason.RTC_IMPLAUSIBLE),
        (datetime(2106, 2, 7, tzinfo=UTC), FLOOR, ClockReason.RTC_IMPLAUSIBLE),
    ],
)  # fmt: skip
def test_row17_wrong_clocks(rtc: datetime, at: datetime, reason: ClockReason) -> None:
    decision = effective_time(rtc, FLOOR)
    assert (decision.at, decision.reason, decision.rtc) == (at, reason, rtc)


@given(MOMENTS, MOMENTS)
def test_row17_never_before_the_floor_nor_far_after_it(rtc: datetime, floor: datetime) -> None:
    decision = effective_time(rtc, floor)
    assert floor <= decision.at <= floor + PLAUSIBLE
    assert decision.at in {rtc, floor}
    assert (decision.reason is ClockReason.RTC) == (decision.at == rtc)


def test_row17_backwards_after_a_later_floor() -> None:
    seen = FLOOR + timedelta(days=100)
    assert effective_time(FLOOR + timedelta(days=1), seen).at == seen


def test_zones_are_moments() -> None:
    local = FLOOR.astimezone(timezone(timedelta(hours=5)))
    assert effective_time(local, FLOOR).at == FLOOR
    assert effective_time(local, FLOOR).at.tzinfo is UTC


def test_reason_is_text_for_reports() -> None:
    assert effective_time(EPOCH, FLOOR).reason == "rtc-before-floor"


def test_times_need_a_zone() -> None:
    naive = FLOOR.replace(tzinfo=None)
    for arguments in ((naive, FLOOR), (FLOOR, naive)):
        with pytest.raises(ValueError, match="zone"):
            effective_time(*arguments)
