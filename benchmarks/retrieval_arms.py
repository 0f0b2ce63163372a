"""Retrieval on two small sets of real images: a short MAE pretraining, its untrained network, plain intensities.

    python benchmarks/retrieval_arms.py SHARED_DATA WORK_FOLDER --epochs 30

``SHARED_DATA`` holds ``sts_petctmr`` (CT, PET and MR of ten patients with a soft-tissue sarcoma) and ``busi_us_text``
(ultrasound of the breast, three classes). The pretraining sees the images that retrieval is measured on, without their
labels. Everything below ``WORK_FOLDER`` is made anew only where it is missing.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

STS, BUSI = "Dataset601_STS", "Dataset602_BUSI"
WIDTHS = [8, 16, 32, 64]
PATCHES = {STS: [32, 32, 32], BUSI: [128, 128]}
SPACINGS = {STS: [4.0, 4.0, 4.0], BUSI: [1.0, 1.0]}
CONFIGURATIONS = {STS: "3d_fullres", BUSI: "2d"}
RULES = {STS: ("modality", "subject"), BUSI: ("class",)}
INTENSITY_SIDE = 8
"""Voxels along each axis of the image whose intensities are the plain vector."""


def main() -> None:
    """Make data, weights and indexes where they are missing, then evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=30, help="of 50 steps (default: 30)")
    parser.add_argument("--only", choices=(STS, BUSI), help="one of the two sets")
    args = parser.parse_args()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (args.work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str((args.work / name).resolve())
    for dataset, write in ((STS, write_sts), (BUSI, write_busi)):
        if args.only not in (None, dataset):
            continue
        raw = Path(os.environ["nnUNet_raw"], dataset)
        if not raw.is_dir():
            write(args.data, raw)
        evaluate(dataset, raw, args.work, args.epochs)


def write_sts(data: Path, raw: Path) -> None:
    """One case per patient and modality; the subject is the patient."""
    lines = ["case,subject,modality"]
    for patient in sorted((data / "sts_petctmr").glob("STS_*")):
        for modality in ("CT", "PET", "MR_T1"):
            if not (patient / f"{modality}_image.nii.gz").is_file():
                continue
            case = f"{patient.name}_{modality}"
            _copy(patient / f"{modality}_image.nii.gz", raw / "imagesTr" / f"{case}_0000.nii.gz")
            _copy(patient / f"{modality}_mask.nii.gz", raw / "labelsTr" / f"{case}.nii.gz")
            lines.append(f"{case},{patient.name},{modality}")
    _describe(raw, lines, ".nii.gz")


def write_busi(data: Path, raw: Path) -> None:
    """One case per picture; the whole picture is foreground."""
    lines = ["case,class"]
    for number, file in enumerate(sorted((data / "busi_us_text").glob("*/*.png"))):
        case = f"busi_{number:03d}"
        picture = np.asarray(Image.open(file).convert("L"))
        for folder, name, content in (
            ("imagesTr", f"{case}_0000.png", picture),
            ("labelsTr", f"{case}.png", np.ones_like(picture)),
        ):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(raw / folder / name)
        lines.append(f"{case},{file.parent.name}")
    _describe(raw, lines, ".png")


def _describe(raw: Path, lines: list[str], ending: str) -> None:
    from nnssl_plugin.io.files import write_json

    (raw / "metadata.csv").write_text("\n".join(lines) + "\n")
    labels = {"background": 0, "foreground": 1}
    content = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": len(lines) - 1, "file_ending": ending}
    write_json(raw / "dataset.json", content)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def plan(dataset: str, epochs: int) -> None:
    """A small U-Net, and the plan of its pretraining; preprocessed."""
    from nnssl_plugin.io.files import read_json, write_json

    number, configuration = dataset[7:10], CONFIGURATIONS[dataset]
    _run("nnUNetv2_extract_fingerprint", "-d", number, "-np", "1")
    _run("nnUNetv2_plan_experiment", "-d", number)
    path = Path(os.environ["nnUNet_preprocessed"], dataset, "nnUNetPlans.json")
    content = read_json(path)
    planned, dimensions = content["configurations"][configuration], len(PATCHES[dataset])
    planned |= {"patch_size": PATCHES[dataset], "spacing": SPACINGS[dataset], "batch_size": 4}
    planned["architecture"]["arch_kwargs"] |= {
        "n_stages": len(WIDTHS),
        "features_per_stage": WIDTHS,
        "kernel_sizes": [[3] * dimensions] * len(WIDTHS),
        "strides": [[1] * dimensions] + [[2] * dimensions] * (len(WIDTHS) - 1),
        "n_conv_per_stage": [2] * len(WIDTHS),
        "n_conv_per_stage_decoder": [1] * (len(WIDTHS) - 1),
    }
    content["configurations"] = {configuration: planned}
    write_json(path, content)
    _run("nnUNetv2_preprocess", "-d", number, "-c", configuration, "-np", "1")
    settings = [f"epochs={epochs}", "iterations_per_epoch=50", "warmup_epochs=3", "batch_size=4"]
    _run(
        "nnssl_plugin", "plan", "-d", number, "-n", "mae", "--preset", "mae",
        "--set", *(f"pretraining.{setting}" for setting in settings),
    )  # fmt: skip


def untrained(dataset: str, folder: Path) -> Path:
    """The network of the pretraining's checkpoint as it was at the start."""
    import torch

    from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
    from nnssl_plugin.nnunet.plans import build_network

    trained = read_checkpoint(pretrained(dataset))
    given = trained["init_args"]
    torch.manual_seed(0)
    network = build_network(given["plans"], given["configuration"], given["dataset_json"])
    path = folder / f"untrained_{dataset}.pth"
    save_checkpoint(
        {"network_weights": network.state_dict(), "init_args": given, "trainer_name": "nnUNetTrainer"}, path
    )
    return path


def pretrained(dataset: str) -> Path:
    """The checkpoint of MAE."""
    folder = f"MAEPretrainer__mae__{CONFIGURATIONS[dataset]}"
    return Path(os.environ["nnUNet_results"], dataset, folder, "fold_all", "checkpoint_final.pth")


def plain_index(dataset: str, raw: Path, like: Path, folder: Path) -> None:
    """An index of preprocessed intensities: the image at 8 voxels along each axis, and its deciles."""
    from nnssl_plugin.data.vector_store import VectorStore, writing
    from nnssl_plugin.data.windows import resize
    from nnssl_plugin.features.pretrained_backbone import load_backbone
    from nnssl_plugin.tasks.retrieval.standardisation import statistics_of

    backbone, store = load_backbone(pretrained(dataset)), VectorStore(like)
    vectors = []
    for row in store.table():
        data = backbone.preprocess(row["image"])
        data = data if data.shape[1] > 1 else data[:, 0]
        small = resize(data, [INTENSITY_SIDE] * (data.ndim - 1))
        vectors.append(np.concatenate((small.ravel(), np.quantile(data, np.linspace(0.1, 0.9, 9)))))
    facts = {"dimensions": len(vectors[0]), "made": store.facts["made"]}
    with writing(folder, facts | {"encoder": store.facts["encoder"] | {"network": "intensities"}}) as made:
        made.append(np.array(vectors), store.table())
        made.freeze(statistics_of(made.vectors()))


def evaluate(dataset: str, raw: Path, work: Path, epochs: int) -> None:
    """Train, embed and evaluate one dataset."""
    number = dataset[7:10]
    if not pretrained(dataset).is_file():
        if not Path(os.environ["nnUNet_preprocessed"], dataset, "mae.json").is_file():
            plan(dataset, epochs)
        _run("nnssl_plugin", "train", number, CONFIGURATIONS[dataset], "all",
             "-tr", "MAEPretrainer", "-p", "mae", "-device", "cpu")  # fmt: skip
    indexes = {name: work / f"{dataset}_{name}" for name in ("mae", "untrained", "intensities")}
    for name, weights in (("mae", pretrained(dataset)), ("untrained", untrained(dataset, work))):
        _run("nnssl_plugin", "embed", "-m", str(weights), "-i", str(raw / "imagesTr"), "-o", str(indexes[name]),
             "--metadata", str(raw / "metadata.csv"))  # fmt: skip
    if not indexes["intensities"].is_dir():
        plain_index(dataset, raw, indexes["mae"], indexes["intensities"])
    named = [f"{name}={folder}" for name, folder in indexes.items()]
    rules = [word for rule in RULES[dataset] for word in ("--by", rule)]
    _run("nnssl_plugin", "evaluate", "retrieval", "--index", *named, *rules, "-o", str(work / f"{dataset}_retrieval"))
    if dataset == BUSI:
        _run("nnssl_plugin", "evaluate", "probe", "--index", *named, "--target", "class")


def _run(*words: str) -> None:
    print("$", *words, flush=True)
    workers = {"nnUNet_n_proc_DA": "0"} if "train" in words else {}  # planning fails on 0
    subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:]], check=True, env=os.environ | workers)


if __name__ == "__main__":
    main()
