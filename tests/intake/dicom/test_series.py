"""What a series is: nested folders, zip files, order, doubles, gaps, and images that are kept apart."""

import shutil
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from dicom_export import enhanced, item, phantom, write_series
from pydicom.uid import JPEG2000Lossless, RLELossless, generate_uid

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom import pixels
from nnssl_plugin.intake.dicom.geometry import normal_of
from nnssl_plugin.intake.dicom.table import LEFT_OUT, REFUSED, TAKEN


def taken(converted):
    return [converted.places.scans / row["scan"] for row in converted.with_status(TAKEN)]


def only_scan(converted):
    (path,) = taken(converted)
    return path


def planes_of(path):
    """The planes (slices, rows, columns) of a converted scan, as DICOM stores them."""
    return np.asarray(nibabel.load(path).dataobj).T


def assert_lies_where(path, *, origin, orientation, spacing, step):
    """Every corner is where DICOM says, to 1e-4 mm, as SimpleITK reads the file."""
    image = SimpleITK.ReadImage(str(path))
    columns, rows, slices = image.GetSize()
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    for i, j, k in [(0, 0, 0), (columns - 1, 0, 0), (0, rows - 1, 0), (columns - 1, rows - 1, slices - 1)]:
        expected = np.array(origin) + i * spacing[1] * row + j * spacing[0] * column + k * np.array(step)
        assert np.allclose(image.TransformIndexToPhysicalPoint((i, j, k)), expected, rtol=0, atol=1e-4)


def test_a_series_in_nested_folders_is_sorted_by_place_and_not_by_name(export, convert):
    planes = phantom()
    uids = (generate_uid(), generate_uid())
    for index, plane in enumerate(planes):  # names and numbers run against the order of the places
        folder = export / f"disk{index % 3}" / "a b"
        write_series(folder, plane[None], origin=(-30, -20, 5 + 3 * index), uids=uids, first=100 - index)
    path = only_scan(convert("MR"))
    assert np.array_equal(planes_of(path), planes)
    assert_lies_where(path, origin=(-30, -20, 5), orientation=(1, 0, 0, 0, 1, 0), spacing=(1.5, 1.25), step=(0, 0, 3))


@pytest.mark.parametrize("seed", range(4))
def test_an_oblique_series_lies_where_dicom_says_to_a_ten_thousandth_mm(seed, export, convert):
    rng = np.random.default_rng(seed)
    row, column, _ = np.linalg.qr(rng.normal(size=(3, 3)))[0].T
    orientation = (*row, *column)
    step, origin, spacing = 2.7 * normal_of(orientation), tuple(rng.uniform(-300, 300, 3)), (0.683, 0.912)
    planes = phantom(slices=7, seed=seed)
    write_series(export, planes, orientation=orientation, step=step, origin=origin, spacing=spacing)
    path = only_scan(convert("MR"))
    assert np.array_equal(planes_of(path), planes)
    assert_lies_where(path, origin=origin, orientation=orientation, spacing=spacing, step=step)


def test_zip_files_are_read_in_folders_and_alone(export, convert, tmp_path):
    planes = phantom()
    write_series(tmp_path / "loose", planes)
    with zipfile.ZipFile(export / "patient.zip", "w") as archive:
        archive.writestr("readme.txt", "no DICOM")
        for path in sorted((tmp_path / "loose").iterdir()):
            archive.write(path, f"../../deep/{path.name}")  # names that would lead out of a folder
    assert np.array_equal(planes_of(only_scan(convert("MR"))), planes)
    shutil.rmtree(tmp_path / "local")
    assert np.array_equal(planes_of(only_scan(convert("MR", source=export / "patient.zip"))), planes)
    assert not (tmp_path.parent / "deep").exists() and not (tmp_path / "deep").exists()


def test_files_without_the_preamble_are_read(export, convert):
    planes = phantom()
    for dataset in write_series(export, planes):
        (path,) = export.glob(f"*{dataset.SOPInstanceUID[-6:]}.dcm")
        path.write_bytes(path.read_bytes()[132:])
        path.rename(path.with_suffix(""))
    assert np.array_equal(planes_of(only_scan(convert("MR"))), planes)


def test_several_series_of_a_study_share_their_study_and_subject(export, convert):
    study = generate_uid()
    for number in range(3):
        write_series(export, phantom(seed=number), uids=(study, generate_uid()), SeriesDescription=f"T{number}")
    converted = convert("MR")
    assert len({path.parent for path in taken(converted)}) == 1 and len(taken(converted)) == 3
    assert len({row["subject"] for row in converted.rows}) == 1


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_pixels_are_read(syntax, export, convert):
    planes = phantom()

    def compress(dataset, index):
        if syntax == RLELossless:
            dataset.compress(syntax)
        else:
            compress_jpeg2000(dataset)

    try:
        write_series(export, planes, change=compress)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no encoder: {error}")
    assert np.array_equal(planes_of(only_scan(convert("MR"))), planes)


def compress_jpeg2000(dataset):
    from io import BytesIO

    from PIL import Image, features
    from pydicom.encaps import encapsulate

    if not features.check("jpg_2000"):
        raise ImportError("Pillow without JPEG 2000")
    plane = np.frombuffer(dataset.PixelData, "<i2").reshape(dataset.Rows, dataset.Columns).astype(np.uint16)
    stream = BytesIO()
    Image.fromarray(plane).save(stream, format="JPEG2000", irreversible=False, no_jp2=True)
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB"
    dataset.PixelRepresentation = 0
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless


def test_slope_and_intercept_of_every_file_are_applied(export, convert):
    planes = phantom()

    def rescale(dataset, index):
        dataset.RescaleSlope, dataset.RescaleIntercept = str(0.5 + index), str(-3 * index)

    write_series(export, planes, change=rescale)
    found = planes_of(only_scan(convert("MR")))
    expected = np.stack([(0.5 + k) * plane - 3.0 * k for k, plane in enumerate(planes)])
    assert np.allclose(found, expected, atol=1e-3)


def test_an_enhanced_object_is_sorted_and_rescaled_frame_by_frame(export, convert):
    planes = phantom()

    def own(group, index):
        group.PixelValueTransformationSequence = [item(RescaleSlope=1 + index, RescaleIntercept=-index)]

    enhanced(export / "e.dcm", planes, per_frame=own, order=[3, 0, 7, 1, 6, 2, 5, 4])
    path = only_scan(convert("MR"))
    expected = np.stack([(1.0 + k) * plane - k for k, plane in enumerate(planes)])
    assert np.allclose(planes_of(path), expected, atol=1e-3)
    assert_lies_where(path, origin=(-30, -20, 5), orientation=(1, 0, 0, 0, 1, 0), spacing=(1.5, 1.25), step=(0, 0, 3))


def test_b_values_of_an_enhanced_object_are_kept_apart(export, convert):
    planes = np.concatenate([phantom(seed=1), phantom(seed=2)])

    def own(group, index):
        group.MRDiffusionSequence = [item(DiffusionBValue=float(1000 * (index // 8)))]
        group.PlanePositionSequence[0].ImagePositionPatient = [-30.0, -20.0, 5.0 + 3.0 * (index % 8)]

    enhanced(export / "e.dcm", planes, per_frame=own)
    converted = convert("MR")
    assert sorted(row["part"] for row in converted.rows) == ["b0", "b1000"]
    rows = {row["part"]: row for row in converted.rows}
    for number, part in enumerate(("b0", "b1000")):
        found = planes_of(converted.places.scans / rows[part]["scan"])
        assert np.array_equal(found, planes[8 * number : 8 * number + 8])


@pytest.mark.parametrize(
    ("differ", "parts"),
    [
        ({"EchoTime": (10.0, 80.0)}, {"echo10", "echo80"}),
        ({"TemporalPositionIdentifier": (1, 2)}, {"time1", "time2"}),
        ({"AcquisitionNumber": (1, 2)}, {"acquisition 1", "acquisition 2"}),
        ({"TriggerTime": (0.0, 40.0)}, {"phase 1", "phase 2"}),
        ({"ImageType": (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"])},
         {"ORIGINAL\\PRIMARY\\M", "ORIGINAL\\PRIMARY\\P"}),
        ({"DiffusionBValue": (0.0, 800.0)}, {"b0", "b800"}),
        ({"ConvolutionKernel": ("B30f", "B70f")}, {"kernel B30f", "kernel B70f"}),
    ],
)  # fmt: skip
def test_images_at_the_same_places_are_kept_apart(differ, parts, export, convert):
    uids = (generate_uid(), generate_uid())
    ((name, values),) = differ.items()
    for number, value in enumerate(values):
        write_series(export, phantom(seed=number), uids=uids, first=1 + 8 * number, **{name: value})
    converted = convert("MR")
    assert {row["part"] for row in converted.with_status(TAKEN)} == parts
    found = [planes_of(path) for path in taken(converted)]
    assert any(np.array_equal(found[0], phantom(seed=s)) for s in (0, 1)) and not np.array_equal(*found)


@pytest.mark.parametrize("tag", [(0x0019, "SIEMENS MR HEADER", 0x0C, "IS"), (0x0043, "GEMS_PARM_01", 0x39, "IS")])
def test_private_b_values_are_kept_apart(tag, export, convert):
    group, creator, element, kind = tag
    uids = (generate_uid(), generate_uid())
    for number, value in enumerate((0, 800)):

        def private(dataset, index, value=value):
            stated = value if group == 0x0019 else [10**9 + value, 8, 0, 0]
            dataset.private_block(group, creator, create=True).add_new(element, kind, stated)

        write_series(export, phantom(seed=number), uids=uids, first=1 + 8 * number, change=private)
    assert {row["part"] for row in convert("MR").with_status(TAKEN)} == {"b0", "b800"}


def test_acquisitions_that_change_along_the_body_stay_one_volume(export, convert):
    planes = phantom()

    def number(dataset, index):
        dataset.AcquisitionNumber = index // 2
        dataset.TriggerTime = float(37 * (index % 3))
        dataset.EchoTime = 4.6 + 0.01 * (index % 3)

    write_series(export, planes, change=number)
    assert np.array_equal(planes_of(only_scan(convert("MR"))), planes)


def test_missing_slices_are_refused_and_named(export, convert):
    write_series(export, phantom(slices=12))
    sorted(export.iterdir())[5].unlink()
    with pytest.raises(UserError, match="1 x missing slices"):
        convert("MR")
    assert "missing slices: 1 of 12, the first after slice 5" in table_text(export)


def table_text(export):
    return (export.parent / "local" / "Dataset501_X" / "series.csv").read_text()


def test_uneven_distances_are_refused(export, convert):
    write_series(export, phantom(slices=8), change=lambda d, k: move(d, 0.2 * k * k))
    with pytest.raises(UserError, match="uneven distances"):
        convert("MR")


def move(dataset, by):
    dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], dataset.ImagePositionPatient[2] + by]


def test_copies_of_a_file_and_equal_slices_are_taken_once_and_told(export, convert):
    planes = phantom()
    datasets = write_series(export, planes)
    (path,) = export.glob(f"*{datasets[2].SOPInstanceUID[-6:]}.dcm")
    shutil.copyfile(path, export / "copy of it.dcm")
    datasets[4].SOPInstanceUID = datasets[4].file_meta.MediaStorageSOPInstanceUID = generate_uid()
    datasets[4].save_as(export / "again.dcm", enforce_file_format=True)
    converted = convert("MR")
    assert np.array_equal(planes_of(only_scan(converted)), planes)
    assert converted.told == ["1 x 2 planes were there twice"]


def test_different_slices_at_one_place_are_refused(export, convert):
    datasets = write_series(export, phantom())
    datasets[4].SOPInstanceUID = datasets[4].file_meta.MediaStorageSOPInstanceUID = generate_uid()
    datasets[4].PixelData = datasets[3].PixelData
    datasets[4].save_as(export / "again.dcm", enforce_file_format=True)
    with pytest.raises(UserError, match="2 different images at one place"):
        convert("MR")


def test_mixed_orientations_become_volumes_of_their_own(export, convert):
    uids = (generate_uid(), generate_uid())
    write_series(export / "a", phantom(seed=1), uids=uids)
    write_series(export / "c", phantom(seed=2), uids=uids, orientation=(1, 0, 0, 0, 0, -1), step=(0, 3, 0))
    converted = convert("MR")
    assert len(taken(converted)) == 2
    assert {nibabel.aff2axcodes(nibabel.load(path).affine)[2] for path in taken(converted)} == {"S", "P"}


def test_a_tilted_gantry_is_resampled_to_right_angles_and_told(export, convert):
    planes = np.zeros((10, 40, 16), dtype=np.int16)
    rows = np.arange(40)
    shift = 3.0 * np.tan(np.radians(15))  # mm along the columns, from plane to plane
    for k in range(10):  # the body stands upright: in a sheared stack it moves against the shift
        planes[k] = np.clip(1000 - 100 * np.abs(rows * 1.0 + shift * k - 20), 0, None)[:, None]
    write_series(export, planes, modality="CT", step=(0.0, shift, 3.0), spacing=(1.0, 1.0))
    converted = convert("CT")
    assert converted.told == ["1 x gantry tilt of 15.0 degrees: resampled to right angles"]
    image = nibabel.load(only_scan(converted))
    cosines = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    assert np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-6)
    assert np.allclose(np.linalg.norm(image.affine[:3, :3], axis=0), (1, 1, 3))
    peak = np.asarray(image.dataobj)[8].argmax(axis=0)  # in which row each plane is brightest
    assert np.ptp(peak) <= 1
    assert np.allclose(image.affine[1, 3] + image.affine[1, 1] * peak, -(-20.0 + 20.0), atol=1.0)  # RAS


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localiser"),
        ({"SeriesDescription": "Topogram 0.6 T20f"}, "localiser"),
        ({"ImageType": ["DERIVED", "PRIMARY", "MPR"]}, "derived image"),
        ({"ConversionType": "WSD"}, "secondary capture"),
        ({"BurnedInAnnotation": "YES"}, "burnt-in annotation"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "inverted grey"),
    ],
)
def test_what_is_no_scan_is_left_out_with_its_reason(attributes, reason, export, convert):
    write_series(export / "good", phantom())
    write_series(export / "bad", phantom(seed=1), **attributes)
    converted = convert("MR")
    (row,) = converted.with_status(LEFT_OUT)
    assert row["reason"].startswith(reason) and row["folder"].endswith("bad") and not converted.has_failures


def test_colour_cine_and_few_slices_are_left_out_with_their_reason(export, convert):
    def colour(dataset, index):
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        dataset.PixelData = bytes(3 * dataset.Rows * dataset.Columns)

    def cine(dataset, index):
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient
        dataset.NumberOfFrames = 3
        dataset.PixelData = dataset.PixelData * 3
        dataset.SequenceOfUltrasoundRegions = [item(RegionDataType=1)]

    write_series(export / "good", phantom())
    write_series(export / "rgb", phantom(), change=colour)
    write_series(export / "cine", phantom(slices=1), change=cine)
    write_series(export / "few", phantom(slices=3))
    converted = convert("MR")
    reasons = {Path(row["folder"]).name: row["reason"] for row in converted.with_status(LEFT_OUT)}
    assert reasons["rgb"].startswith("colour") and reasons["few"].startswith("only 3 slices")
    assert "cine" in reasons["cine"]
    (row,) = (row for row in converted.rows if row["folder"].endswith("cine"))
    assert "outside of the ultrasound regions" in row["burnt_in"]


def test_rules_choose_and_lift_what_is_left_out_otherwise(export, convert):
    write_series(export / "t1", phantom(seed=1), SeriesDescription="AX T1 post", EchoTime=9.0)
    write_series(export / "t2", phantom(seed=2), SeriesDescription="AX T2", EchoTime=90.0)
    write_series(export / "d", phantom(seed=3), SeriesDescription="T1 MPR", ImageType=["DERIVED", "PRIMARY"])
    write_series(export / "ct", phantom(seed=4), modality="CT")

    def names(*rules, modality=None):
        converted = convert(modality, *rules)
        return {Path(row["folder"]).name for row in converted.with_status(TAKEN)}

    assert names("SeriesDescription~t1") == {"t1"}
    assert names("Modality=MR,EchoTime>20", "SeriesDescription~post$") == {"t1", "t2"}
    assert names("ImageType~DERIVED") == {"d"}
    assert names("Modality!=MR") == {"ct"} and names(modality="CT") == {"ct"}
    with pytest.raises(UserError, match=r"CT, MR.*one modality"):
        names()


def test_a_codestream_of_another_size_than_the_header_is_not_expanded(export, convert, monkeypatch):
    try:
        written = write_series(export, phantom(), change=lambda dataset, _: compress_jpeg2000(dataset))
    except ImportError as error:
        pytest.skip(f"no encoder: {error}")
    path = next(export.glob(f"*{written[3].SOPInstanceUID[-6:]}.dcm"))
    content = bytearray(path.read_bytes())
    lower_edge = content.index(b"\xff\x4f\xff\x51") + 12
    content[lower_edge : lower_edge + 4] = (2_000_000).to_bytes(4, "big")
    path.write_bytes(content)
    opened, read = [], pixels._read_file
    monkeypatch.setattr(pixels, "_read_file", lambda path, file: opened.append(file.name) or read(path, file))
    write_series(export / "good", phantom(seed=1))
    (row,) = convert("MR").with_status(REFUSED)
    assert "2000000 x 24, its header says 20 x 24" in row["reason"] and path.name not in opened


def test_a_damaged_file_is_named_and_the_rest_goes_on(export, convert):
    planes = phantom()
    write_series(export / "good", planes)
    broken = write_series(export / "bad", phantom(seed=1))
    path = next((export / "bad").glob(f"*{broken[0].SOPInstanceUID[-6:]}.dcm"))
    path.write_bytes(path.read_bytes()[:-400])  # pixels are missing
    (export / "noise.dcm").write_bytes(bytes(128) + b"DICM" + bytes(200))
    converted = convert("MR")
    assert np.array_equal(planes_of(only_scan(converted)), planes)
    assert len(converted.with_status(REFUSED)) == 1 and len(converted.unreadable) == 1 and converted.has_failures


def test_a_header_that_promises_more_than_a_file_can_hold_is_not_believed(export, convert):
    planes = phantom()
    write_series(export / "good", planes)
    dataset = enhanced(export / "e.dcm", phantom(seed=1))
    dataset.Rows = dataset.Columns = 60000
    dataset.save_as(export / "e.dcm", enforce_file_format=True)
    converted = convert("MR")
    assert np.array_equal(planes_of(only_scan(converted)), planes)
    assert "the header promises" in converted.unreadable[0]


def test_an_export_without_series_says_so(export, convert):
    for number in range(3):
        (export / f"IM{number}.dcm").write_bytes(bytes(128) + b"DICM" + bytes(200))
    with pytest.raises(UserError, match=r"No DICOM series.*3 damaged DICOM files"):
        convert()
