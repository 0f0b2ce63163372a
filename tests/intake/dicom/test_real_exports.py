"""Real DICOM: geometry as its headers say, and equal to the same scans and masks in NIfTI."""

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK

from nnssl_plugin.intake.dicom.table import LEFT_OUT, TAKEN

pytestmark = pytest.mark.slow


@pytest.fixture
def real(data_folder):
    folder = data_folder / "dicom"
    if not folder.is_dir():
        pytest.skip(f"no dicom below {data_folder}")
    return folder


def corners_by_headers(folder):
    """LPS mm of the first voxel of every slice and of its far corner, from the headers alone, along the normal."""
    places = []
    for path in folder.iterdir():
        header = pydicom.dcmread(path, stop_before_pixels=True)
        orientation = np.array(header.ImageOrientationPatient, dtype=float)
        first = np.array(header.ImagePositionPatient, dtype=float)
        far = first + (header.Columns - 1) * header.PixelSpacing[1] * orientation[:3]
        far = far + (header.Rows - 1) * header.PixelSpacing[0] * orientation[3:]
        places.append((first @ np.cross(orientation[:3], orientation[3:]), first, far))
    return [place[1:] for place in sorted(places, key=lambda place: place[0])]


@pytest.mark.parametrize(
    ("name", "taken", "left_out"),
    [("ct_totalseg_20slices", 1, 0), ("mr_btp_study3", 4, 1), ("sts_002", 1, 5)],
)
def test_every_series_lies_where_its_headers_say(name, taken, left_out, real, convert):
    converted = convert(None, source=real / name)
    assert len(converted.with_status(TAKEN)) == taken and len(converted.with_status(LEFT_OUT)) == left_out
    for row in converted.with_status(TAKEN):
        image = SimpleITK.ReadImage(str(converted.places.scans / row["scan"]))
        columns, rows, slices = image.GetSize()
        corners = corners_by_headers(real / row["folder"])
        assert len(corners) == slices
        for k, (first, far) in enumerate(corners):
            found = (
                image.TransformIndexToPhysicalPoint((0, 0, k)),
                image.TransformIndexToPhysicalPoint((columns - 1, rows - 1, k)),
            )
            assert np.allclose(found, (first, far), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("modality", "name"), [("CT", "CT"), ("PET", "PET"), ("MR", "MR_T1")])
def test_images_and_structures_equal_those_in_nifti(modality, name, real, data_folder, convert):
    nifti = data_folder / "sts_petctmr" / "STS_002"
    if not nifti.is_dir():
        pytest.skip(f"no sts_petctmr below {data_folder}")
    converted = convert(modality, "ImageType~.", source=real / "sts_002", structures=["GTV=1"])
    (row,) = converted.with_status(TAKEN)
    image, labels = (nibabel.load(folder / row["scan"]) for folder in (converted.places.scans, converted.places.labels))
    expected, mask = (nibabel.load(nifti / f"{name}_{kind}.nii.gz") for kind in ("image", "mask"))
    assert np.allclose(image.affine, expected.affine, rtol=0, atol=1e-4)
    assert np.allclose(image.get_fdata(), expected.get_fdata(), rtol=1e-5, atol=1e-4)
    assert np.array_equal(labels.get_fdata(), mask.get_fdata())
