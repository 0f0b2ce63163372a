"""Headers of written NIfTI files hold geometry alone, whatever the source's header says."""

import gzip

import nibabel
import numpy as np
import pytest

from nnssl_plugin.intake.unlabelled import prepare_dataset

TEXTS = {"descrip": b"Jane Doe", "aux_file": b"doe.img", "intent_name": b"doe", "db_name": b"DOE^JANE"}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_written_files_carry_no_texts(ending, source, raw, phantom):
    image = nibabel.Nifti1Image(phantom(), np.diag([1.0, 2.0, 3.0, 1.0]))
    for name, text in TEXTS.items():
        image.header[name] = text
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nibabel.save(image, source / f"scan{ending}")
    folder = prepare_dataset(source, 501, "X", processes=1).folder
    written = [folder / "labelsTr" / "scan.nii.gz"]
    if ending == ".nii":  # a .nii.gz file is linked and stays as it is
        written.append(folder / "imagesTr" / "scan_0000.nii.gz")
    for path in written:
        header = nibabel.load(path).header
        assert all(bytes(header[name]).strip(b"\0") == b"" for name in TEXTS) and not header.extensions
        assert b"doe" not in gzip.decompress(path.read_bytes()).lower()
        assert np.allclose(nibabel.load(path).affine, image.affine)
