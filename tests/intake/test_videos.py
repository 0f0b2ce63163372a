"""Videos as volumes of three colours: which frames, in which order, and what is refused."""

import sys
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from PIL import Image

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.videos import convert_videos, find_videos, read_frames
from nnssl_plugin.io.files import read_json
from nnssl_plugin.io.scans import RejectedScan

SIZE = (24, 32)


def frames(number):
    """Grey levels that tell the frame, the right half red."""
    video = np.zeros((number, *SIZE, 3), dtype=np.uint8)
    for index in range(number):
        video[index] = 20 + 5 * index
        video[index, :, SIZE[1] // 2 :, 0] = 250
    return video


def write_video(path, number):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, SIZE[::-1])
    for frame in frames(number):
        writer.write(frame[..., ::-1])
    writer.release()
    return path


def write_gif(path, number):
    images = [Image.fromarray(frame) for frame in frames(number)]
    images[0].save(path, save_all=True, append_images=images[1:])
    return path


def write_folder(path, number):
    path.mkdir()
    for index, frame in enumerate(frames(number)):
        Image.fromarray(frame).save(path / f"frame{index}.png")  # frame10 comes after frame9
    return path


WRITERS = {"video.avi": write_video, "video.gif": write_gif, "video": write_folder}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("number", "wanted"), [(12, [0, 3, 6, 9]), (5, [0, 1, 2, 3]), (4, [0, 1, 2, 3])])
def test_frames_are_evenly_spaced_and_in_their_order_and_colours(tmp_path, name, number, wanted):
    read = read_frames(WRITERS[name](tmp_path / name, number), 4)
    expected = frames(number)[wanted]
    assert (
        read.shape == expected.shape and np.abs(read.astype(int) - expected).mean() < 4
    )  # JPEG and palettes lose some


def test_a_video_becomes_three_volumes_whose_slices_are_frames_once(tmp_path):
    (tmp_path / "in" / "siteA").mkdir(parents=True)
    write_folder(tmp_path / "in" / "siteA" / "clip.1", 6)
    write_video(tmp_path / "in" / "other.avi", 9)
    done = convert_videos(tmp_path / "in", tmp_path / "out", frames=6)
    assert done.converted == ("other.avi", "siteA/clip.1") and done.refused == ()
    red, blue = (nibabel.load(tmp_path / "out" / "siteA" / f"clip_1_{colour}.nii.gz") for colour in ("red", "blue"))
    np.testing.assert_array_equal(np.asarray(red.dataobj).transpose(2, 1, 0), frames(6)[..., 0])
    np.testing.assert_array_equal(np.asarray(blue.dataobj).transpose(2, 1, 0), frames(6)[..., 2])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii.gz")}
    convert_videos(tmp_path / "in", tmp_path / "out", frames=6)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii.gz")}


def test_what_is_no_video_is_named_and_the_rest_goes_on(tmp_path):
    write_video(tmp_path / "good.avi", 8)
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    write_gif(tmp_path / "still.gif", 1)
    done = convert_videos(tmp_path, tmp_path.parent / "out", frames=8)
    assert done.converted == ("good.avi",)
    assert [reason.partition(":")[0] for reason in done.refused] == ["damaged.mp4", "still.gif"]


def test_folders_with_other_files_are_no_videos_and_hidden_ones_are_left_out(tmp_path):
    write_folder(tmp_path / "frames", 4)
    write_folder(tmp_path / "few", 3)
    mixed = write_folder(tmp_path / "mixed", 4)
    (mixed / "notes.txt").touch()
    write_folder(tmp_path / ".hidden", 4)
    assert [path.name for path in find_videos(tmp_path)] == ["frames"]


def test_images_of_two_sizes_are_refused(tmp_path):
    folder = write_folder(tmp_path / "clip", 4)
    Image.new("RGB", (16, 16)).save(folder / "frame9.png")
    with pytest.raises(RejectedScan, match="differ in size"):
        read_frames(folder, 5)


def test_patterns_choose_and_nothing_left_is_said(tmp_path):
    write_video(tmp_path / "a.avi", 4)
    write_video(tmp_path / "b.avi", 4)
    done = convert_videos(tmp_path, tmp_path / ".out", frames=4, exclude=["b*"])
    assert done.converted == ("a.avi",)
    with pytest.raises(UserError, match="holds no videos"):
        convert_videos(tmp_path, tmp_path / ".out", frames=4, include=["c*"])
    with pytest.raises(UserError, match="4 frames at least"):
        convert_videos(tmp_path, tmp_path / ".out", frames=3)


def test_the_command_makes_a_dataset_of_three_colours(tmp_path, nnunet_environment, capsys):
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "a.avi", 12)
    write_folder(tmp_path / "clips" / "b", 12)
    (tmp_path / "clips" / "c.mp4").write_bytes(b"no video")
    words = ["prepare", "-i", str(tmp_path / "clips"), "-d", "504", "-n", "Clips", "--video", "8", "-np", "1"]
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "Videos: 2 read, 1 refused" in printed and "c.mp4" in printed
    folder = Path(nnunet_environment["nnUNet_raw"], "Dataset504_Clips")
    assert list(read_json(folder / "dataset.json")["channel_names"].values()) == ["red", "green", "blue"]
    images = sorted((folder / "imagesTr").iterdir())
    assert len(images) == 6 and nibabel.load(images[0]).shape == (*SIZE[::-1], 8)
    assert main(words) == 1 and len(list((folder / "imagesTr").iterdir())) == 6  # again: nothing new


def test_without_opencv_the_command_says_what_to_install(tmp_path, monkeypatch):
    write_video(tmp_path / "a.avi", 4)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="OpenCV") as error:
        convert_videos(tmp_path, tmp_path / ".out", frames=4)
    assert "nnssl_plugin[video]" in error.value.remedy
