"""nnU-Net's augmentation of images that carry their templates as further channels."""

from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform


class ImageHalf(BasicTransform):
    """A transform of intensities for the first half of the channels; the second half, the templates, stays.

    Args:
        transform: of images of C channels; it draws what it would draw without templates.
    """

    def __init__(self, transform: BasicTransform):
        super().__init__()
        self.transform = transform

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Transform channels 0 … C − 1 of ``image`` (2C, *spatial)."""
        image = data_dict["image"]
        channels = len(image) // 2
        image[:channels] = self.transform(image=image[:channels])["image"]
        return data_dict


def sparing_templates(augmentation: ComposeTransforms) -> ComposeTransforms:
    """nnU-Net's augmentation for images of 2C channels: both halves move together, intensities change in the first.

    Args:
        augmentation: what ``get_training_transforms`` gave.
    """
    return ComposeTransforms([_sparing(each) for each in augmentation.transforms])


def _sparing(transform: BasicTransform) -> BasicTransform:
    if isinstance(transform, RandomTransform):
        return RandomTransform(_sparing(transform.transform), transform.apply_probability)
    return ImageHalf(transform) if isinstance(transform, ImageOnlyTransform) else transform
