"""What frozen features of an M3Ret checkpoint tell of images, beside those of an untrained network and of intensities.

    python benchmarks/frozen_features.py -w …/fold_all/checkpoint_final.pth -d 512 -p sized -c 2d --classes class
    python benchmarks/frozen_features.py -w …/checkpoint_final.pth -d 511 -p m3-mae -c 3d_fullres --csv kinds.csv

Every case is shown whole, by the rules that the checkpoint's method has for its inputs. A linear probe (standardised
features, logistic regression) is scored by five folds, which keep the cases of a subject together where a csv with the
columns ``case``, ``subject`` and ``class`` says which they are. ``shuffled`` is the same probe on shuffled classes.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.data.batch import Needs
from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.cases import Cases, available_channels
from nnssl_plugin.io.files import read_json
from nnssl_plugin.methods.m3ret.inputs import as_volume, image_channels, unified
from nnssl_plugin.methods.m3ret.settings import InputSettings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network

SEED = 0


def backbone_of(content: dict, *, trained: bool) -> Backbone:
    """The network of a checkpoint, with its weights or freshly initialised."""
    provenance, plans = content["provenance"], content["init_args"]["plans"]
    dataset_json = content["init_args"]["dataset_json"]
    torch.manual_seed(SEED)
    channels = provenance["network_channels"]
    network = build_network(plans, provenance["configuration"], dataset_json, channels=channels)
    if trained:
        network.load_state_dict(content["network_weights"])
    return Backbone(network.eval(), channels)


def images_of(args: argparse.Namespace, settings: InputSettings, channels: int | None) -> tuple[list[str], list]:
    """Names and images (1, C, *window) of all cases of a dataset, whole."""
    name = maybe_convert_to_dataset_name(args.d)
    folder = Path(str(nnUNet_preprocessed), name)
    plan = read_json(folder / f"{args.p}.json")
    configuration = plan["configurations"][args.c]
    data = str(folder / configuration["data_identifier"])
    cases = sorted(infer_dataset_class(data).get_identifiers(data))
    raw = Path(str(nnUNet_raw), name)
    images = []
    for case in cases:
        available = available_channels(raw, [case], len(read_json(raw / "dataset.json")["channel_names"]))
        batches = StepBatches(
            Cases(data, [case], transpose_forward=plan["transpose_forward"]),
            Needs(window="fit"),
            patch_size=configuration["patch_size"],
            batch_size=1,
            available=available,
            stream=(SEED, 0),
            kind=args.kind,
        )
        images.append(unified(batches[0], settings, channels, torch.Generator().manual_seed(SEED)))
    return cases, images


@torch.no_grad()
def features(backbone: Backbone, images: list) -> np.ndarray:
    """Summary and mean token of each image (N, F)."""
    rows = []
    for image in images:
        image = as_volume(image, backbone.strides[-1])
        if backbone.has_summary:
            summary, maps = backbone.summarised(image)
            rows.append(torch.cat((summary, backbone.pooled(maps)), 1))
        else:
            rows.append(backbone.pooled(backbone.features(image)))
    return torch.cat(rows).numpy()


def intensities(images: list) -> np.ndarray:
    """Ten percentiles of the intensities of each image (N, 10)."""
    return np.stack([np.percentile(image, np.linspace(1, 99, 10)) for image in images])


def probe(values: np.ndarray, classes: np.ndarray, subjects: np.ndarray) -> tuple[float, float]:
    """Accuracy and macro F1 of a linear probe over five folds."""
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=SEED)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    predicted = cross_val_predict(model, values, classes, groups=subjects, cv=folds)
    return accuracy_score(classes, predicted), f1_score(classes, predicted, average="macro")


def table_of(args: argparse.Namespace, cases: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Class and subject of each case."""
    path = args.csv or Path(str(nnUNet_raw), maybe_convert_to_dataset_name(args.d), "classification.csv")
    with open(path, newline="", encoding="utf-8") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    return (
        np.array([rows[case][args.classes] for case in cases]),
        np.array([rows[case].get("subject") or case for case in cases]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-w", required=True, nargs="+", help="checkpoints of M3Ret's trainers")
    parser.add_argument("-d", required=True, help="preprocessed dataset")
    parser.add_argument("-p", default="nnUNetPlans", help="its plan")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("--kind", default="", help="what the source of such images was called in the pretraining")
    parser.add_argument("--classes", default="class", help="column of the classes")
    parser.add_argument("--csv", help="table of the cases (default: the dataset's classification.csv)")
    args = parser.parse_args()
    print("| features | accuracy | macro F1 |\n|---|---|---|")
    for number, path in enumerate(args.w):
        content = read_checkpoint(path)
        settings = content["provenance"]["settings"]
        chosen = InputSettings(**{name: settings[name] for name in ("channels", "frames", "colour", "intensity")})
        channels = image_channels(chosen, several=isinstance(content["provenance"]["data"], list))
        cases, images = images_of(args, chosen, channels)
        classes, subjects = table_of(args, cases)
        shuffled = np.random.default_rng(SEED).permutation(classes)
        rows = {}
        if number == 0:
            rows["intensities"] = (intensities(images), classes)
            rows["untrained network"] = (features(backbone_of(content, trained=False), images), classes)
        trained = features(backbone_of(content, trained=True), images)
        rows |= {content["provenance"]["method"]: (trained, classes), "the same, shuffled classes": (trained, shuffled)}
        for name, (values, labels) in rows.items():
            accuracy, f1 = probe(values, labels, subjects)
            print(f"| {name} | {accuracy:.3f} | {f1:.3f} |")


if __name__ == "__main__":
    main()
