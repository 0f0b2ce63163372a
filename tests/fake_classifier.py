"""A classifier without a network, whose probabilities follow from the image in closed form, and files to find it by."""

from types import SimpleNamespace

import numpy as np
import torch
from fake_dataset import fake_plan
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_plugin.nnunet.case_labels import Target
from nnssl_plugin.tasks.classification.batches import case_inputs

BINARY = Target("malignancy", "binary", ("benign", "malignant"))
FINDINGS = Target("findings", "multilabel", ("cyst", "mass"))
RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def inference_plan(*, dimensions=3, spacing=None, reader="NibabelIOWithReorient", channels=1, transpose=(0, 1, 2)):
    """The fake plan with what preprocessing reads."""
    plan = fake_plan(dimensions=dimensions)
    (configuration,) = plan["configurations"].values()
    configuration |= {
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
    }
    for what, is_seg in (("data", False), ("seg", True), ("probabilities", False)):
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{what}_kwargs"] = RESAMPLING | {"is_seg": is_seg}
    configuration["spacing"] = list(spacing or [1.0] * dimensions)
    return plan | {
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": [int(i) for i in np.argsort(transpose)],
        "foreground_intensity_properties_per_channel": {str(c): {} for c in range(channels)},
    }


class FakeClassifier:
    """What ``load_classifier`` returns; ``log_odds(x (B, W, C, *patch)) -> (B,)`` is what every target gets.

    The multi-label target has its second class with the opposite log-odds.
    """

    def __init__(
        self,
        plan,
        log_odds,
        *,
        targets=(BINARY,),
        ending=".nii.gz",
        mirroring=(),
        crop="none",
        strategy="resize",
        channels=1,
    ):
        self.plans_manager = PlansManager(plan)
        self.configuration_manager = self.plans_manager.get_configuration(next(iter(plan["configurations"])))
        self.dataset_json = {
            "channel_names": {str(c): f"MR{c}" for c in range(channels)},
            "file_ending": ending,
            "labels": {"background": 0, "body": 1},
        }
        self.targets, self.mirroring_axes, self.log_odds = tuple(targets), tuple(mirroring), log_odds
        arguments = {"crop": crop, "crop_margin": 0.0, "strategy": strategy, "windows": 2}
        self.settings = SimpleNamespace(crop=crop, input_arguments=lambda patch: arguments | {"patch_size": patch})
        self.images_seen = 0

    def inputs(self, data, segmentation=None):
        patch = self.configuration_manager.patch_size
        return torch.from_numpy(case_inputs(data, segmentation, **self.settings.input_arguments(patch)))

    def probabilities(self, x):
        self.images_seen += len(x)
        p = torch.sigmoid(self.log_odds(x))
        return {target.name: torch.stack([1 - p, p], dim=1) for target in self.targets}


def trained_folds(folder, folds=("0", "1"), checkpoint="checkpoint_final.pth"):
    """A model folder whose checkpoints can be found and hashed, but not loaded."""
    for fold in folds:
        (folder / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
        (folder / f"fold_{fold}" / checkpoint).write_text(f"weights of fold {fold}")
    return folder
