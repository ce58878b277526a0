# SPDX-License-Identifier: Apache-2.0
"""At which moment certificates are judged, when the only clock at hand is one that anybody can set.

Rules:
- Never earlier than the floor (the build date, or a later moment the device has durably seen).
- A clock more than 20 years past the floor is not believed; the floor is used instead. That is no door: a
  person who can set the clock far ahead can as well set it to 1970 and get the floor. The other way round,
  believing it would let a flat battery or a glitch stop a device for good.
- Which of the two was used, and why, is part of the result, so that it is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

PLAUSIBLE: Final = timedelta(days=20 * 365.25)
"""Longest time a build may be in use without a newer floor; also beyond any certificate of ours."""


class ClockReason(StrEnum):
    """Where the time of judgement comes from."""

    RTC = "rtc"
    RTC_BEFORE_FLOOR = "rtc-before-floor"
    RTC_IMPLAUSIBLE = "rtc-implausible"


@dataclass(frozen=True, slots=True)
class ClockDecision:
    """The time of judgement (UTC) and why it is not simply the clock's (`rtc`)."""

    at: datetime
    reason: ClockReason
    rtc: datetime


def effective_time(rtc: datetime, floor: datetime) -> ClockDecision:
    """Decide between clock and floor; both aware, else ValueError."""
    if rtc.tzinfo is None or floor.tzinfo is None:
        raise ValueError("a time without a zone is no moment")
    rtc = rtc.astimezone(UTC)
    floor = floor.astimezone(UTC)
    if rtc < floor:
        return ClockDecision(floor, ClockReason.RTC_BEFORE_FLOOR, rtc)
    if rtc - floor > PLAUSIBLE:
        return ClockDecision(floor, ClockReason.RTC_IMPLAUSIBLE, rtc)
    return ClockDecision(rtc, ClockReason.RTC, rtc)
