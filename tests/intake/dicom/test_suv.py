"""Standardised uptake values against the formula, and refusals that name the tag."""

import re

import nibabel
import numpy as np
import pytest
from dicom_export import item, phantom, write_series

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.table import TAKEN

PET = {
    "modality": "PT",
    "Units": "BQML",
    "DecayCorrection": "START",
    "PatientWeight": "80",
    "SeriesDate": "20200101",
    "SeriesTime": "110000",
    "AcquisitionDate": "20200101",
    "AcquisitionTime": "110000",
}
INJECTION = {
    "RadionuclideTotalDose": "400000000",
    "RadionuclideHalfLife": "6588",
    "RadiopharmaceuticalStartDateTime": "20200101100000",
}


def pet(folder, *, injection=None, **changes):
    attributes = {**PET, **changes}
    planes = phantom()
    given = {name: value for name, value in attributes.items() if value is not None}
    sequence = {name: value for name, value in {**INJECTION, **(injection or {})}.items() if value is not None}
    write_series(folder, planes, RadiopharmaceuticalInformationSequence=[item(**sequence)], **given)
    return planes


def scan_of(converted):
    (row,) = converted.with_status(TAKEN)
    return np.asarray(nibabel.load(converted.places.scans / row["scan"]).dataobj).T


DECAYED = 2 ** (3600 / 6588)  # an hour


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 80e3 / 4e8 * DECAYED),
        ({"DecayCorrection": "ADMIN"}, 80e3 / 4e8),
        ({"Units": "GML"}, 1.0),
        # reconstructed later: the acquisition counts
        ({"SeriesTime": "150000"}, 80e3 / 4e8 * DECAYED),
        # the series began before this bed position
        ({"AcquisitionTime": "112000"}, 80e3 / 4e8 * DECAYED),
        ({"injection": {"RadiopharmaceuticalStartDateTime": None, "RadiopharmaceuticalStartTime": "100000.00"}},
         80e3 / 4e8 * DECAYED),
        ({"injection": {"RadiopharmaceuticalStartDateTime": None, "RadiopharmaceuticalStartTime": "233000"},
          "SeriesTime": "003000", "AcquisitionTime": "003000"}, 80e3 / 4e8 * DECAYED),
    ],
)  # fmt: skip
def test_values_are_those_of_the_formula(changes, factor, export, convert):
    planes = pet(export, **changes)
    found = scan_of(convert("PET"))
    assert np.allclose(found, planes * factor, rtol=1e-5, atol=1e-6)


def test_philips_factor_is_used(export, convert):
    def private(dataset, index):
        block = dataset.private_block(0x7053, "Philips PET Private Group", create=True)
        block.add_new(0x00, "DS", "0.25")

    planes = phantom()
    write_series(export, planes, change=private, **{**PET, "Units": "CNTS"})
    assert np.allclose(scan_of(convert("PET")), planes * 0.25)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"PatientWeight": None}, r"PatientWeight \(0010,1030\) is missing"),
        ({"PatientWeight": "0"}, r"PatientWeight \(0010,1030\)"),
        ({"Units": None}, r"Units \(0054,1001\) are missing"),
        ({"Units": "CNTS"}, r"\(7053,1000\)"),
        ({"Units": "GML", "SUVType": "LBM"}, r"SUVType \(0054,1006\) is LBM"),
        ({"DecayCorrection": "NONE"}, r"DecayCorrection \(0054,1102\) is NONE"),
        ({"injection": {"RadionuclideTotalDose": None}}, r"RadionuclideTotalDose \(0018,1074\) is missing"),
        ({"injection": {"RadionuclideHalfLife": None}}, r"RadionuclideHalfLife \(0018,1075\) is missing"),
        ({"injection": {"RadiopharmaceuticalStartDateTime": None}}, r"\(0018,1078\) is missing"),
        ({"injection": {"RadiopharmaceuticalStartDateTime": "20190101100000"}}, "between injection"),
        ({"SeriesDate": None, "AcquisitionDate": None}, r"SeriesDate \(0008,0021\)"),
    ],
)
def test_a_series_without_suv_is_refused_with_the_tag(changes, named, export, convert, tmp_path):
    pet(export, **changes)
    with pytest.raises(UserError, match="1 x no SUV"):
        convert("PET")
    text = (tmp_path / "local" / "Dataset501_X" / "series.csv").read_text()
    assert re.search(named, text), text
