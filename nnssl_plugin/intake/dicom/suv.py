"""Standardised uptake values of PET by body weight, as in QIBA's profile (SUVbw vendor-neutral pseudo-code):

    SUV = activity [Bq/ml] · weight [g] / (dose [Bq] · 2^(−Δt / half-life)),

with Δt from the injection to the time that the activities are corrected to.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from nnssl_plugin.io.refusals import RejectedScan

LONGEST = timedelta(hours=24)
"""Between injection and scan; more, or less than nothing, means that one of the times is wrong."""
_PHILIPS_SUV, _PHILIPS_ACTIVITY = (0x7053, 0x1000), (0x7053, 0x1009)
_GE_SCAN_TIME = (0x0009, 0x100D)


def suv_factor(headers: Iterable[Any]) -> tuple[float, str]:
    """What the rescaled values of a PET series have to be multiplied by to be SUV, and how it was found, in words.

    Args:
        headers: pydicom's datasets of the series' files.

    Raises:
        RejectedScan: a tag is missing or says something that no SUV can be computed from; it is named.
    """
    headers = list(headers)
    first = headers[0]
    units = str(first.get("Units") or "").upper()
    if units == "GML":
        kind = str(first.get("SUVType") or "BW").upper()
        if kind != "BW":
            raise RejectedScan(f"no SUV by body weight: SUVType (0054,1006) is {kind}")
        return 1.0, "SUV as stored"
    if units == "CNTS":
        factor = _private(first, _PHILIPS_SUV)
        if factor:
            return factor, "SUV by Philips' factor"
        activity = _private(first, _PHILIPS_ACTIVITY)
        if not activity:
            raise RejectedScan("no SUV: Units (0054,1001) are CNTS, without (7053,1000) or (7053,1009)")
        return activity * _per_activity(headers), "SUV computed from counts"
    if units != "BQML":
        raise RejectedScan(f"no SUV: Units (0054,1001) are {units or 'missing'}, not BQML, GML or CNTS")
    return _per_activity(headers), "SUV computed from Bq/ml"


def _per_activity(headers: list[Any]) -> float:
    first = headers[0]
    weight = _needed(first, "PatientWeight", "(0010,1030)")
    sequence = first.get("RadiopharmaceuticalInformationSequence")
    if not sequence:
        raise RejectedScan("no SUV: RadiopharmaceuticalInformationSequence (0054,0016) is missing")
    dose = _needed(sequence[0], "RadionuclideTotalDose", "(0018,1074)")
    correction = str(first.get("DecayCorrection") or "").upper()
    if correction == "ADMIN":
        return weight * 1000 / dose
    if correction != "START":
        raise RejectedScan(f"no SUV: DecayCorrection (0054,1102) is {correction or 'missing'}, not START or ADMIN")
    half_life = _needed(sequence[0], "RadionuclideHalfLife", "(0018,1075)")
    elapsed = _elapsed(sequence[0], _scan_time(headers))
    return weight * 1000 / (dose * 2 ** (-elapsed.total_seconds() / half_life))


def _scan_time(headers: list[Any]) -> datetime:
    """The time that ``START`` corrects to: that of the series, unless the series was made later than acquired."""
    series = _moment(headers[0], "Series")
    acquired = [time for header in headers if (time := _moment(header, "Acquisition")) is not None]
    stated = headers[0].get(_GE_SCAN_TIME)
    if stated is not None and stated.value:
        return _parsed(str(stated.value))
    if series is not None and (not acquired or series <= min(acquired)):
        return series
    if not acquired:
        raise RejectedScan("no SUV: SeriesDate (0008,0021) and SeriesTime (0008,0031) are missing")
    return min(acquired)


def _elapsed(injection: Any, scan: datetime) -> timedelta:
    stated = str(injection.get("RadiopharmaceuticalStartDateTime") or "")
    clock = str(injection.get("RadiopharmaceuticalStartTime") or "")
    if not stated and not clock:
        raise RejectedScan("no SUV: RadiopharmaceuticalStartDateTime (0018,1078) is missing")
    start = _parsed(stated) if stated else _parsed(f"{scan:%Y%m%d}{clock}")
    if not stated and start > scan:
        start -= timedelta(days=1)  # injected before midnight
    if not timedelta(0) <= scan - start <= LONGEST:
        raise RejectedScan(f"no SUV: {scan - start} between injection (0018,1078) and scan (0008,0031)")
    return scan - start


def _moment(header: Any, what: str) -> datetime | None:
    date, time = (str(header.get(f"{what}{part}") or "") for part in ("Date", "Time"))
    return _parsed(date + time) if date and time else None


def _parsed(text: str) -> datetime:
    digits = text.split("+")[0].split("-")[0].replace(":", "").split(".")[0].ljust(14, "0")
    try:
        return datetime.strptime(digits[:14], "%Y%m%d%H%M%S")
    except ValueError as error:
        raise RejectedScan(f"no SUV: {text!r} is no date and time") from error


def _needed(header: Any, name: str, tag: str) -> float:
    value = header.get(name)
    if value is None or value == "" or not float(value) > 0:
        raise RejectedScan(f"no SUV: {name} {tag} is {'missing' if value in (None, '') else value}")
    return float(value)


def _private(header: Any, tag: tuple[int, int]) -> float:
    element = header.get(tag)
    try:
        return float(element.value) if element is not None else 0.0
    except (TypeError, ValueError):
        return 0.0
