"""2D images: what is read, what is refused, and that nnU-Net reads what is written."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.file_search import FoundFiles, find_scans
from nnssl_plugin.intake.pictures import load_picture, picture_mask, png_bytes
from nnssl_plugin.intake.unlabelled import made_grey, prepare_dataset
from nnssl_plugin.io.refusals import RejectedScan


def noise(shape, dtype=np.uint8, seed=0):
    high = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(1, high, shape, endpoint=True, dtype=dtype)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("ending", ["png", "tif", "PNG"])
def test_grey_images_keep_every_value(tmp_path, dtype, ending):
    array = noise((17, 23), dtype)
    picture = load_picture(write(tmp_path / f"a.{ending}", array), colour=False)
    np.testing.assert_array_equal(picture.array, array)
    assert picture.array.dtype == dtype and not picture.lost_colour
    assert picture.as_stored == (ending.lower() == "png")


def test_colour_is_kept_or_made_grey_by_luminance(tmp_path):
    array = noise((16, 16, 3))
    path = write(tmp_path / "a.png", array)
    kept, grey = load_picture(path, colour=True), load_picture(path, colour=False)
    np.testing.assert_array_equal(kept.array, array)
    assert kept.as_stored and not kept.lost_colour and grey.lost_colour and not grey.as_stored
    np.testing.assert_allclose(grey.array, array @ (0.299, 0.587, 0.114), atol=1)


def test_equal_channels_and_transparency_lose_nothing(tmp_path):
    array = noise((16, 16))
    path = write(tmp_path / "a.png", np.dstack([array] * 3 + [np.full_like(array, 9)]))
    picture = load_picture(path, colour=False)
    np.testing.assert_array_equal(picture.array, array)
    assert not picture.lost_colour
    np.testing.assert_array_equal(load_picture(path, colour=True).array, np.dstack([array] * 3))


def test_a_turned_photograph_stands_upright(tmp_path):
    array = noise((16, 24))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = load_picture(write(tmp_path / "a.png", array, exif=exif), colour=False)
    np.testing.assert_array_equal(picture.array, np.rot90(array, -1))
    assert not picture.as_stored


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_bytes(b"no image"), "unreadable"),
        (lambda path: path.write_bytes(png_bytes(noise((64, 64)))[:-400]), "truncated"),
        (lambda path: write(path, np.full((16, 16), 7, np.uint8)), "constant image: every pixel is 7"),
        (lambda path: write(path, noise((16, 4))), "4 x 16 pixels"),
        (lambda path: write(path, noise((16, 16)).astype(np.float32), format="TIFF"), "floating-point"),
        (
            lambda path: write(
                path, noise((16, 16)), format="TIFF", save_all=True, append_images=[Image.fromarray(noise((16, 16)))]
            ),
            "2 images in one file",
        ),
    ],
)
def test_what_is_no_single_image_is_refused(tmp_path, make, reason):
    make(tmp_path / "a.png")
    with pytest.raises(RejectedScan, match=reason):
        load_picture(tmp_path / "a.png", colour=False)


def test_the_mask_leaves_out_the_dark_border_and_keeps_dark_spots():
    array = np.zeros((20, 20), np.uint8)
    array[4:16, 5:15] = 100
    array[8:10, 8:10] = 0
    expected = np.zeros((20, 20), np.uint8)
    expected[4:16, 5:15] = 1
    np.testing.assert_array_equal(picture_mask(array), expected)
    np.testing.assert_array_equal(picture_mask(np.dstack([array * 0, array, array * 0])), expected)
    assert picture_mask(np.dstack([noise((9, 9)) * 0 + c for c in (1, 2, 3)]).astype(np.uint8)).all()


@pytest.mark.parametrize(("modality", "channels"), [(None, 1), ("grey", 1), ("RGB", 3)])
def test_a_folder_of_images_becomes_a_dataset_that_nnunet_reads(raw, source, modality, channels):
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    from nnssl_plugin.io.files import read_json

    arrays = {"a": noise((20, 24, 3), seed=1), "b": noise((16, 30), seed=2), "deep_c": noise((18, 18, 3), seed=3)}
    write(source / "a.png", arrays["a"])
    write(source / "b.bmp", arrays["b"])
    write(source / "deep" / "c.jpg", arrays["deep_c"])
    (source / "bad.png").write_bytes(b"")
    summary = prepare_dataset(source, 501, "Flat", modality=modality, processes=1)
    assert sorted(summary.added) == ["a", "b", "deep_c"] and len(summary.rejected) == 1
    assert made_grey(summary) == (2 if channels == 1 else 0)
    description = read_json(summary.folder / "dataset.json")
    assert len(description["channel_names"]) == channels and description["file_ending"] == ".png"
    for case, files in get_filenames_of_train_images_and_targets(str(summary.folder)).items():
        image, properties = NaturalImage2DIO().read_images(files["images"])
        label, _ = NaturalImage2DIO().read_seg(files["label"])
        assert image.shape == (channels, 1, *arrays[case].shape[:2]) and label.shape[1:] == image.shape[1:]
        assert set(np.unique(label)) <= {0, 1} and properties["spacing"] == (999, 1, 1)
        if case == "a" and channels == 3:
            np.testing.assert_array_equal(image[:, 0], arrays["a"].transpose(2, 0, 1))
    again = prepare_dataset(source, 501, "Flat", modality=modality, processes=1)
    assert (again.known, again.added) == (3, ())


def test_the_same_pixels_twice_are_one_case(raw, source):
    write(source / "a.png", noise((16, 16)))
    write(source / "b.bmp", noise((16, 16)))
    summary = prepare_dataset(source, 501, "Flat", processes=1)
    assert summary.added == ("a",) and "duplicate content" in summary.rejected[0].reason


def test_images_beside_volumes_are_other_files(source, save):
    save("a.nii.gz")
    write(source / "screenshot.png", noise((16, 16)))
    assert find_scans(source) == FoundFiles((source / "a.nii.gz",), others=1)


def test_images_and_volumes_do_not_mix(raw, source, save, tmp_path):
    flat = tmp_path / "flat"
    write(flat / "a.png", noise((16, 16)))
    with pytest.raises(UserError, match="'CT' for 2D images"):
        prepare_dataset(flat, 501, "Flat", modality="CT", processes=1)
    prepare_dataset(flat, 501, "Flat", modality="MR", processes=1)
    save("a.nii.gz")
    with pytest.raises(UserError, match="'RGB' for volumes"):
        prepare_dataset(source, 502, "Deep", modality="RGB", processes=1)
    with pytest.raises(UserError, match=r"holds .png files; these would be .nii.gz"):
        prepare_dataset(source, 501, "Flat", processes=1)
    with pytest.raises(UserError, match="--modality MR"):
        prepare_dataset(flat, 501, "Flat", modality="RGB", processes=1)
