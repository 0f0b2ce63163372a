"""An export folder, and its conversion."""

import pytest

from nnssl_plugin.intake.dicom.choosing import SeriesChoice
from nnssl_plugin.intake.dicom.export import convert_export, local_places
from nnssl_plugin.intake.dicom.rules import parse_channels, parse_rules
from nnssl_plugin.intake.dicom.structures import parse_structures


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    return folder


@pytest.fixture
def convert(export, tmp_path):
    """A function (modality, rules …) that converts the export: the ConvertedExport."""

    def run(modality=None, *rules, structures=(), channels=(), source=None, **others):
        return convert_export(
            source or export,
            local_places("Dataset501_X", local=tmp_path / "local"),
            SeriesChoice(modality, parse_rules(rules), parse_channels(channels), parse_structures(structures)),
            processes=1,
            **others,
        )

    return run
