"""Which values of a dataset's segmentations name structures, and which say only where the body is."""

from collections.abc import Mapping
from typing import Any

BODY = "body"
"""Name of the mask that ``nnssl_plugin prepare`` gives to scans without labels."""


def structure_labels(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Values of the segmentations that name structures, with their names; without background and ``ignore``.

    Empty for a dataset whose one label is the body mask of unlabelled scans. Where nnU-Net's labels are regions, each
    value is named after the first region that holds it.

    Args:
        dataset_json: nnU-Net's ``dataset.json``.
    """
    structures: dict[int, str] = {}
    for name, values in dataset_json["labels"].items():
        if name in ("background", "ignore"):
            continue
        for value in values if isinstance(values, list | tuple) else (values,):
            structures.setdefault(int(value), name)
    return {} if list(structures.values()) == [BODY] else structures
