"""Real images: hippocampus crops whose maxima run from 112 to 1.7 million, and CT."""

import shutil

import nibabel
import numpy as np
import pytest

from nnssl_plugin.captions.template import TemplateCaptioner
from nnssl_plugin.captions.triplets import SLICES, caption_dataset
from nnssl_plugin.data.triplets import read_triplets
from nnssl_plugin.intake.body_mask import body_mask
from nnssl_plugin.intake.unlabelled import prepare_dataset


def copy_some(data_folder, relative, source, *, count):
    found = sorted((data_folder / relative).rglob("*.nii.gz"))[:count]
    if not found:
        pytest.skip(f"no {relative} below {data_folder}")
    for path in found:
        shutil.copyfile(path, source / path.name)
    return found


def test_hippocampus_of_any_intensity_gets_a_mask_of_sensible_size(raw, source, data_folder):
    copy_some(data_folder, "hippocampus/images", source, count=12)
    summary = prepare_dataset(source, 501, "Hippocampus", processes=1)
    assert (len(summary.added), summary.rejected) == (12, ())
    for path in (summary.folder / "labelsTr").iterdir():
        assert nibabel.load(path).get_fdata().mean() > 0.9  # a crop inside the head
    assert caption_dataset(summary.folder, TemplateCaptioner(), body_part="hippocampus").added == 12 * SLICES
    assert {t.plane for t in read_triplets(summary.folder)} == {
        "axial",
        "coronal",
        "sagittal",
    }


def test_ct_mask_covers_tissue_and_leaves_the_air_around(raw, source, data_folder):
    originals = copy_some(data_folder, "ct/images", source, count=2)
    summary = prepare_dataset(source, 501, "Ct", modality="CT", processes=1)
    assert summary.rejected == ()
    for path, case in zip(originals, sorted(summary.added), strict=True):
        hu = nibabel.load(path).get_fdata()
        mask = nibabel.load(summary.folder / "labelsTr" / f"{case}.nii.gz").get_fdata() > 0
        tissue = (hu > -200) & (hu < 300)
        assert mask[tissue].mean() > 0.95
        assert 0.3 < mask.mean() < 0.95
        assert np.median(hu[~mask]) < -700


@pytest.mark.parametrize(("modality", "name"), [("MR", "MR_T1"), ("CT", "CT"), ("PET", "PET")])
def test_body_masks_hold_the_tumours_and_leave_the_air(data_folder, modality, name):
    folders = sorted((data_folder / "sts_petctmr").glob("STS_*"))
    if not folders:
        pytest.skip(f"no sts_petctmr below {data_folder}")
    for folder in folders:
        image = nibabel.load(folder / f"{name}_image.nii.gz")
        tumour = np.asarray(nibabel.load(folder / f"{name}_mask.nii.gz").dataobj) > 0
        mask = body_mask(image.get_fdata(dtype=np.float32), image.affine, modality=modality) > 0
        assert mask[tumour].mean() >= 0.99, folder.name
        assert 0.05 <= mask.mean() <= 0.95, folder.name
