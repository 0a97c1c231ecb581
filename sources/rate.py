"""The frame rate of a video, from the times of its frames: what containers say of themselves is often wrong."""

from collections.abc import Sequence
from fractions import Fraction
from statistics import median

COMMON_RATES = (1, 2, 5, 8, 10, 12, 15, 20, 24, 25, 30, 48, 50, 60, 72, 75, 90, 100, 120, 144, 240)


def frame_rate(
    gaps: Sequence[Fraction], stated: Sequence[Fraction], tick: Fraction, merges: bool = False
) -> Fraction | None:
    """Frames per second at which each picture is one frame, where pictures come evenly but for pauses.

    Args:
      gaps: Seconds from each picture to the next.
      stated: Rates that the file gives, the more trustworthy first.
      tick: Resolution of the times, in seconds.
      merges: Whether a picture that stays longer may stand for several, as in a gif: the shortest stay is then one.

    Returns:
      None where neither the gaps nor the file say anything.
    """
    gaps = [gap for gap in gaps if gap > 0]
    if not gaps:
        return stated[0] if stated else None
    for rate in stated:
        drift = abs(sum(gaps) - len(gaps) / rate)
        if not merges and drift <= 2 * tick and all(abs(gap - 1 / rate) <= tick for gap in gaps):
            return rate
    rate = _measured(gaps, merges)
    # Times in whole milliseconds or hundredths of a second, and those of a live recording, miss the true rate slightly.
    near = min(COMMON_RATES, key=lambda common: abs(common - rate))
    return Fraction(near) if abs(rate / near - 1) < Fraction(3, 100) else rate.limit_denominator(1001)


def _measured(gaps: Sequence[Fraction], merges: bool) -> Fraction:
    """The rate whose periods fit the gaps best."""
    typical = min(gaps) if merges else median(gaps)
    reach = Fraction(3, 2) if merges else Fraction(7, 4)
    usual = [gap for gap in gaps if typical / reach <= gap <= typical * reach]
    period = sum(usual, Fraction(0)) / len(usual)
    periods = [_half_up(gap / period) for gap in gaps]
    off = [abs(gap / period - n) for gap, n in zip(gaps, periods, strict=True)]
    if sum(off) < len(gaps) / 10:  # pictures are missing here and there, but those that are there keep the beat
        return sum(periods) / sum(gaps, Fraction(0))
    regular = [gap for gap in gaps if gap < typical * Fraction(5, 2)]  # they come as they come, with pauses
    return len(regular) / sum(regular, Fraction(0))


def _half_up(value: Fraction) -> int:
    return int(value + Fraction(1, 2))
