"""A tiny preprocessed nnU-Net dataset and its plan, made without nnU-Net's planning, for tests in one process."""

import os
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnssl_plugin.data.triplets import TRIPLETS_FILE, Embeddings, Triplet, text_sha256, write_embeddings, write_triplets
from nnssl_plugin.io.files import write_json

NAME = "Dataset901_Fake"


def write_fake_dataset(
    *,
    cases: int = 6,
    channels: int = 1,
    dimensions: int = 3,
    pretraining: dict | None = None,
    residual: bool = False,
    batch_norm: bool = False,
    shape=(18, 20, 17),
    name: str = NAME,
) -> dict:
    """Write the dataset into nnU-Net's folders of this process and return its plan."""
    raw = Path(os.environ["nnUNet_raw"]) / name
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / name
    for folder in (raw, preprocessed / "fake_data"):
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"case_{i:02d}" for i in range(cases)]
    for case in names if not (preprocessed / "fake_data" / "case_00.b2nd").exists() else ():
        _write_case(preprocessed / "fake_data" / case, rng, channels, shape)
    dataset_json = {
        "channel_names": {str(c): "MR" for c in range(channels)},
        "labels": {"background": 0, "body": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    plan = fake_plan(dimensions=dimensions, pretraining=pretraining, residual=residual, batch_norm=batch_norm)
    plan["dataset_name"] = name
    write_json(preprocessed / "dataset.json", dataset_json)
    write_json(preprocessed / "dataset_fingerprint.json", {})
    write_json(preprocessed / "nnUNetPlans.json", plan)
    if not (raw / TRIPLETS_FILE).exists():
        _write_triplets(raw, names, rng, shape)
    return plan


def fake_plan(
    *, dimensions: int = 3, pretraining: dict | None = None, residual: bool = False, batch_norm: bool = False
) -> dict:
    """A plan with a three-stage PlainConvUNet (or ResidualEncoderUNet) of 4, 8 and 16 features, patch of 16 voxels."""
    name, blocks = ("ResidualEncoderUNet", "n_blocks_per_stage") if residual else ("PlainConvUNet", "n_conv_per_stage")
    conv = f"torch.nn.modules.conv.Conv{dimensions}d"
    norm = f"batchnorm.BatchNorm{dimensions}d" if batch_norm else f"instancenorm.InstanceNorm{dimensions}d"
    configuration = {
        "data_identifier": "fake_data",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16] * dimensions,
        "spacing": [1.0] * dimensions,
        "median_image_size_in_voxels": [18] * dimensions,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 16],
                "conv_op": conv,
                "kernel_sizes": [[3] * dimensions] * 3,
                "strides": [[1] * dimensions, [2] * dimensions, [2] * dimensions],
                blocks: [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.{norm}",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    plan = {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [18, 20, 17],
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"2d" if dimensions == 2 else "3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }
    return plan | ({"pretraining": pretraining} if pretraining is not None else {})


def _write_case(path: Path, rng: np.random.Generator, channels: int, shape) -> None:
    image = rng.normal(size=(channels, *shape)).astype(np.float32)
    body = np.s_[:, slice(5, 12) if shape[0] > 1 else slice(None), 6:14, 4:12]  # a picture is one slice
    image[body] += 3 * rng.uniform(0.5, 1.5, (channels, 1, 1, 1))
    seg = np.zeros((1, *shape), dtype=np.int8)
    seg[body] = 1
    properties = {
        "spacing": [1.0, 1.0, 1.0],
        "nibabel_stuff": {"original_affine": np.eye(4), "reoriented_affine": np.eye(4)},
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, s] for s in shape],
        "shape_after_cropping_and_before_resampling": shape,
        "class_locations": {1: np.argwhere(seg)},
    }
    nnUNetDatasetBlosc2.save_case(image, seg, properties, str(path), chunks=(1, *shape), blocks=(1, *shape))


def _write_triplets(raw: Path, names: list[str], rng: np.random.Generator, shape) -> None:
    triplets = [
        Triplet(name, "axial", int(rng.integers(shape[0])), shape[0], f"text of {name}", "test") for name in names
    ]
    write_triplets(raw, triplets)
    vectors = rng.normal(size=(2, len(names), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    keys = np.array([text_sha256(t.text) for t in triplets])
    write_embeddings(raw, Embeddings(np.array(names), keys, keys, vectors[0], vectors[1], "test"))
