"""Short videos, and folders of their frames, as volumes of three colours whose slices are frames.

Each becomes three NIfTI files below a local folder, ``NAME_red.nii.gz`` and so on, which ``prepare`` then takes as the
channels of one case. OpenCV reads the videos (extra ``video``), Pillow GIF files.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image, ImageSequence
from tqdm import tqdm

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.file_search import matches
from nnssl_plugin.intake.pictures import FORMATS, is_picture
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.io.scans import RejectedScan, check_memory
from nnssl_plugin.io.text import printable, some

log = logging.getLogger(__name__)

VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
GIF = ".gif"
COLOURS = ("red", "green", "blue")
FEWEST = 4
"""Frames of a video; a folder with fewer images is none."""


@dataclass(frozen=True)
class ConvertedVideos:
    """What :func:`convert_videos` did."""

    folder: Path  # of the converted files
    converted: tuple[str, ...]  # by their paths below the source
    refused: tuple[str, ...]  # the same, each with the reason


def convert_videos(
    source: Path, folder: Path, *, frames: int, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> ConvertedVideos:
    """Write evenly spaced frames of every video below a folder as volumes (frames, H, W) of three colours.

    A video that was converted before and has not changed since is left as it is.

    Args:
        source: folder, searched with its subfolders: video files, GIF files with several frames, and folders with
            images alone, sorted by the numbers in their names.
        folder: of the written files; a video lies there as below ``source``.
        frames: of each video; all of one that has no more.
        include: patterns of videos to take, see :func:`~nnssl_plugin.intake.file_search.matches`; none: all.
        exclude: patterns of videos to leave out.

    Raises:
        UserError: OpenCV is missing, ``frames`` is too small, or there is no video.
    """
    if frames < FEWEST:
        raise UserError(f"--video {frames}: a video has {FEWEST} frames at least.", "For example: --video 32")
    found = [path for path in find_videos(source) if _wanted(path.relative_to(source).as_posix(), include, exclude)]
    if not found:
        raise UserError(
            f"{printable(str(source))} holds no videos.",
            f"Give a folder with {', '.join((*VIDEO_ENDINGS, GIF))} files, or with a folder of images for each.",
        )
    converted, refused = [], []
    for path in tqdm(found, desc="videos", unit="video"):
        name = path.relative_to(source).as_posix()
        try:
            _convert(path, folder / name.replace(".", "_"), frames)
        except RejectedScan as error:
            refused.append(f"{printable(name)}: {error}")
        else:
            converted.append(name)
    if not converted:
        raise UserError(f"None of {len(found)} videos could be read: {some(refused)}.", "Convert them to MP4 or AVI.")
    return ConvertedVideos(folder, tuple(converted), tuple(refused))


def find_videos(source: Path) -> Iterator[Path]:
    """Video files, and folders that hold images alone, in the order of their names; links are not followed."""
    for path in sorted(source.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(source).parts):
            continue
        is_video = path.is_file() and path.name.lower().endswith((*VIDEO_ENDINGS, GIF))
        if is_video or (path.is_dir() and len(_frames_of_folder(path)) >= FEWEST):
            yield path


def read_frames(path: Path, frames: int) -> np.ndarray:
    """Evenly spaced frames (T, H, W, 3) uint8 of a video file, a GIF, or a folder of images; the first among them.

    Raises:
        RejectedScan: it cannot be read, has too few frames, or its images differ in size.
    """
    if path.is_dir():
        pictures = _spread(_frames_of_folder(path), frames)
        return _stacked([_frame(picture) for picture in pictures])
    return _stacked(_frames_of_gif(path, frames) if path.name.lower().endswith(GIF) else _frames_of_video(path, frames))


def _convert(path: Path, target: Path, frames: int) -> None:
    files = [target.with_name(f"{target.name}_{colour}.nii.gz") for colour in COLOURS]
    newest = max((each.stat().st_mtime for each in _parts(path)), default=0.0)
    if all(file.is_file() and file.stat().st_mtime >= newest for file in files):
        return
    video = read_frames(path, frames)
    target.parent.mkdir(parents=True, exist_ok=True)
    for channel, file in enumerate(files):
        with atomic_path(file) as temporary:  # (x, y, frame), as NIfTI counts them
            image = nibabel.Nifti1Image(np.ascontiguousarray(video[..., channel].transpose(2, 1, 0)), np.eye(4))
            image.header.set_xyzt_units("mm")
            nibabel.save(image, temporary)


def _parts(path: Path) -> list[Path]:
    return _frames_of_folder(path) if path.is_dir() else [path]


def _frames_of_folder(folder: Path) -> list[Path]:
    """The images of a folder that holds nothing else, sorted by the numbers in their names."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if not all(path.is_file() and is_picture(path) for path in inside):
        return []
    return sorted(inside, key=lambda path: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", path.name)])


def _frame(path: Path) -> np.ndarray:
    """An image in colour (H, W, 3), which may be black."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            check_memory(file.width * file.height, 3)
            return np.asarray(file.convert("RGB"))
    except RejectedScan:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise RejectedScan(f"its frame {printable(path.name)} cannot be read: {error}") from error


def _spread(values: Sequence, number: int) -> list:
    """Evenly spaced values, the first among them."""
    kept = min(number, len(values))
    return [values[index * len(values) // kept] for index in range(kept)]


def _frames_of_gif(path: Path, frames: int) -> list[np.ndarray]:
    try:
        with Image.open(path, formats=["GIF"]) as file:
            wanted = set(_spread(range(getattr(file, "n_frames", 1)), frames))
            check_memory(file.width * file.height * len(wanted), 3)
            shown = enumerate(ImageSequence.Iterator(file))
            return [np.asarray(frame.convert("RGB")) for index, frame in shown if index in wanted]
    except RejectedScan:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise RejectedScan(f"is no GIF that can be read: {error}") from error


def _frames_of_video(path: Path, frames: int) -> list[np.ndarray]:
    cv2 = _opencv()
    count = _count(cv2, path)
    wanted = set(_spread(range(count), frames))
    capture, found = cv2.VideoCapture(str(path)), []
    try:
        for index in range(count):
            if not capture.grab():
                break
            if index in wanted:
                read, frame = capture.retrieve()
                if not read:
                    raise RejectedScan(f"frame {index} cannot be decoded")
                if not found:
                    check_memory(frame.size * len(wanted), 1)
                found.append(frame[..., ::-1])  # OpenCV's order is blue, green, red
    finally:
        capture.release()
    return found


def _count(cv2, path: Path) -> int:
    """Frames of a video, counted: what its header says is often wrong."""
    capture, count = cv2.VideoCapture(str(path)), 0
    try:
        if not capture.isOpened():
            raise RejectedScan("is no video that OpenCV can read")
        while capture.grab():
            count += 1
    finally:
        capture.release()
    if count == 0:
        raise RejectedScan("holds no frame that can be decoded")
    return count


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    if len(frames) < FEWEST:
        raise RejectedScan(f"has {len(frames)} frames; a video needs {FEWEST}")
    if len({frame.shape for frame in frames}) > 1:
        raise RejectedScan("its images differ in size")
    return np.stack(frames)


def _wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (not include or matches(name, include)) and not matches(name, exclude)


def _opencv():
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "Videos are read by OpenCV, which is not installed.", 'pip install "nnssl_plugin[video]"'
        ) from error
    return cv2
