"""Images of a series put together: which planes form one volume, and which are of another echo, b-value or phase."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_plugin.intake.dicom.geometry import SAME_PLACE_MM, depths
from nnssl_plugin.intake.dicom.headers import Frame, Instance

SAME_DIRECTION = 1e-3
"""Largest difference between cosines that are taken for one orientation."""


@dataclass(frozen=True)
class Stack:
    """Planes of one series that belong together, in no particular order."""

    first: Instance  # of whose header the table shows the attributes
    frames: tuple[Frame, ...]
    part: str = ""  # what tells it from the series' other stacks; empty where there is one
    doubles: int = 0  # planes left out because the same instance is there twice
    colour: bool = False
    captured: bool = False
    ultrasound_regions: bool = False

    @property
    def files(self) -> int:
        """How many files hold the planes."""
        return len({frame.file for frame in self.frames})


def build_stacks(instances: Iterable[Instance]) -> list[Stack]:
    """The stacks of all images: by series, matrix, orientation, and what :class:`Frame` keeps ``apart``; where several
    planes still lie at one place, by acquisition, or one by one in the order of time."""
    series: dict[tuple[str, str], list[Instance]] = defaultdict(list)
    for instance in instances:
        if instance.is_image:
            series[instance.study, instance.series].append(instance)
    return [stack for images in series.values() for stack in _stacks_of_series(images)]


def _stacks_of_series(images: Sequence[Instance]) -> list[Stack]:
    by_uid = {image.uid or str(image.file): image for image in images}  # an export may hold a file twice
    kept = list(by_uid.values())
    by_frame = {(frame.file, frame.number): image for image in kept for frame in image.frames}
    parts: list[tuple[str, list[Frame]]] = []
    for group in _by_plane(kept):
        for labels, frames in _named_apart(group):
            parts += [(" ".join(filter(None, (labels, more))), part) for more, part in _one_per_place(frames)]
    names = _distinct([name for name, _ in parts])
    stacks = []
    for name, (_, frames) in zip(names, parts, strict=True):
        owners = [by_frame[frame.file, frame.number] for frame in frames]
        stacks.append(
            Stack(
                first=owners[0],
                frames=tuple(frames),
                part=name if len(parts) > 1 else "",
                doubles=len(images) - len(kept),
                colour=any(owner.colour for owner in owners),
                captured=any(owner.captured for owner in owners),
                ultrasound_regions=any(owner.ultrasound_regions for owner in owners),
            )
        )
    return stacks


def _by_plane(images: Sequence[Instance]) -> list[list[Frame]]:
    """Frames by class of object, matrix, spacing and orientation, the last within a tolerance."""
    exact: dict[tuple, list[list[Frame]]] = defaultdict(list)
    for image in images:
        for frame in image.frames:
            spacing = None if frame.spacing is None else tuple(round(size, 4) for size in frame.spacing)
            groups = exact[image.sop_class, image.shown.get("Rows"), image.shown.get("Columns"), spacing]
            for group in groups:
                if _same_orientation(group[0], frame):
                    group.append(frame)
                    break
            else:
                groups.append([frame])
    return [group for groups in exact.values() for group in groups]


def _same_orientation(one: Frame, other: Frame) -> bool:
    if one.orientation is None or other.orientation is None:
        return one.orientation is other.orientation
    return all(abs(a - b) <= SAME_DIRECTION for a, b in zip(one.orientation, other.orientation, strict=True))


def _named_apart(frames: Sequence[Frame]) -> list[tuple[str, list[Frame]]]:
    """Frames by what keeps them apart, with those of its values in which they differ as a name."""
    groups: dict[tuple[str, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[frame.apart].append(frame)
    titles = ("", "kernel ", "echo", "b", "time", "echo", "inversion", "stack", "")
    differ = [len(set(column)) > 1 for column in zip(*groups, strict=True)]
    return [
        (" ".join(f"{t}{v}" for t, v, is_told in zip(titles, key, differ, strict=True) if is_told and v), group)
        for key, group in groups.items()
    ]


def _one_per_place(frames: Sequence[Frame]) -> list[tuple[str, list[Frame]]]:
    """The frames as they are where each has a place of its own, and otherwise apart, where that can be done."""
    places = _places(frames)
    if places is None or len(set(places)) == len(frames):
        return [("", list(frames))]
    by_acquisition = _split(frames, lambda frame: frame.acquisition)
    if len(by_acquisition) > 1 and all(len(set(_places(part))) == len(part) for part in by_acquisition.values()):
        return [(f"acquisition {number}", part) for number, part in by_acquisition.items()]
    stacked: dict[int, list[Frame]] = defaultdict(list)
    for place, frame in zip(places, frames, strict=True):
        stacked[place].append(frame)
    counts = {len(group) for group in stacked.values()}
    if len(counts) > 1 or len(stacked) == 1:
        return [("", list(frames))]  # refused later: several planes at one place
    ordered = [sorted(group, key=lambda frame: frame.moment) for group in stacked.values()]
    return [(f"phase {number}", list(phase)) for number, phase in enumerate(zip(*ordered, strict=True), 1)]


def places_with_several(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames that share their place, a list for each such place."""
    groups = _split(list(zip(_places(frames) or (), frames, strict=False)), lambda pair: pair[0])
    return [[frame for _, frame in group] for group in groups.values() if len(group) > 1]


def without(stack: Stack, frames: Iterable[Frame]) -> Stack:
    """The stack without some of its frames, which count as doubles."""
    left_out = {(frame.file, frame.number) for frame in frames}
    kept = tuple(frame for frame in stack.frames if (frame.file, frame.number) not in left_out)
    return replace(stack, frames=kept, doubles=stack.doubles + len(stack.frames) - len(kept))


def _places(frames: Sequence[Frame]) -> list[int] | None:
    """The number of each frame's place along the normal; None where a frame has none."""
    if any(frame.position is None or frame.orientation is None for frame in frames):
        return None
    depth = depths([frame.position for frame in frames], frames[0].orientation)
    order = np.argsort(depth, kind="stable")
    numbers = np.empty(len(frames), dtype=int)
    numbers[order] = np.concatenate([[0], np.cumsum(np.diff(depth[order]) > SAME_PLACE_MM)])
    return numbers.tolist()


def _split(items: Sequence, key: Callable) -> dict:
    groups: dict = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _distinct(names: Sequence[str]) -> list[str]:
    """Names with a number where another has the same, or none."""
    seen: dict[str, int] = defaultdict(int)
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if name and seen[name] == 1 else f"{name or 'part'} {seen[name]}")
    return distinct
