"""Retrieval on small sets of real images: three short pretrainings beside what costs less.

    OMP_NUM_THREADS=1 python benchmarks/retrieval_arms.py SHARED_DATA WORK_FOLDER --steps 200

``SHARED_DATA`` holds ``sts_petctmr`` (CT, PET and MR of ten patients with a soft-tissue sarcoma), ``busi_us_text``
(ultrasound of the breast, three classes) and ``hippocampus`` (MR crops with labels). For each, one small U-Net:

- ``mae``, ``simdino``, ``s2dc``: pretrained on the images that retrieval is measured on, without their labels;
- ``supervised``: trained to segment them (tumours, parts of the hippocampus), of the ultrasound to tell the classes;
- ``untrained``: as it was at the start;
- ``pair``: the image encoder of the pair that ``nnssl_plugin clip`` trained from scratch on slices and texts, the mean
  over axial slices. The texts tell plane and place, those of the ultrasound name the class that is looked for;
- ``intensities``: the preprocessed image at 8 voxels along each axis, and its deciles;
- ``size``: the number of voxels along each axis, and nothing else.

Where labels or texts tell what is looked for (ultrasound, hippocampus), ``supervised`` and the ultrasound's pair learn
from every second image, and only the others are queries and gallery, for every arm. Rules named ``shuffled`` look for
the same labels, dealt out at random among these.

Everything below ``WORK_FOLDER`` is made only where it is missing, so that an interrupted run goes on.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

WIDTHS = [8, 16, 32, 64]
PER_EPOCH = 25
INTENSITY_SIDE = 8
"""Voxels along each axis of the image whose intensities are the plain vector."""
SLICES = 12
"""Axial slices of an image that the pair sees."""
SEGMENTATION, CLASSIFICATION = "PretrainedSegmentationTrainer", "PretrainedClassificationTrainer"
HELD_OUT, SHUFFLED = "held_out", [f"shuffled_{number}" for number in range(1, 6)]
"""Columns: what is looked for, only of the images that no label was learned of; the same, dealt out at random."""
PRETRAININGS = {
    "mae": ("MAEPretrainer", {}),
    "simdino": (
        "M3RetSimDINOPretrainer",
        {"lr": 0.001, "method.hidden": 256, "method.width": 64, "method.momentum": 0.99},
    ),
    "s2dc": (
        "S2DCPretrainer",
        {
            "lr": 0.001,
            "weight_decay": 0.01,
            "method.token_stride": 4,
            "method.hidden": 256,
            "method.dim": 128,
            "method.queue": 16,
            "method.momentum": 0.99,
        },
    ),
}
"""Name → trainer, and what differs from the method's defaults: heads as narrow as the network."""


@dataclass(frozen=True)
class Set:
    """One set of images."""

    name: str
    write: Callable[[Path, Path], None]
    patch: list[int]
    spacing: list[float]
    rules: tuple[str, ...]
    """What is right for a query, as ``--by`` takes it."""
    halved: bool = False
    """Whether every second image is held out from all that learns from labels."""
    classes: bool = False
    """Whether the labels are classes; else they are masks."""

    @property
    def number(self) -> str:
        return self.name[7:10]

    @property
    def configuration(self) -> str:
        return "2d" if len(self.patch) == 2 else "3d_fullres"

    def split(self, cases: list[str]) -> dict[str, list[str]]:
        """What the supervised arm learns from, and what it is watched on."""
        seen = cases[::2] if self.halved else cases[:-1]
        unseen = [case for case in cases if case not in seen]
        return {"train": seen, "val": unseen if self.classes else unseen[-1:]}


def main() -> None:
    """Make data, weights and indexes where they are missing, then evaluate."""
    from nnssl_plugin.cli.env import search_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="of each training, of 4 patches (default: 200)")
    parser.add_argument("--pair-epochs", type=int, default=30, help="of the pair, at most (default: 30)")
    parser.add_argument("--only", nargs="+", metavar="SET", help=f"some of: {', '.join(each.name for each in SETS)}")
    args = parser.parse_args()
    args.data, args.work = args.data.resolve(), args.work.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (args.work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(args.work / name)
    os.environ |= {"nnUNet_extTrainer": search_path(), "nnUNet_def_n_proc": "1"}
    for each in SETS:
        if args.only in (None, []) or each.name in args.only:
            evaluate(each, args)


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
    _describe(raw, lines, {"background": 0, "tumour": 1})


def write_hippocampus(data: Path, raw: Path) -> None:
    """One case per crop, with the volume of the hippocampus by its labels."""
    volumes = {}
    for image in sorted((data / "hippocampus" / "images").glob("*.nii.gz")):
        case = image.name.removesuffix(".nii.gz")
        label = data / "hippocampus" / "labels" / image.name
        _copy(image, raw / "imagesTr" / f"{case}_0000.nii.gz")
        _copy(label, raw / "labelsTr" / f"{case}.nii.gz")
        read = nibabel.load(label)
        voxels = np.count_nonzero(np.asarray(read.dataobj))
        volumes[case] = f"{voxels * np.prod(read.header.get_zooms()[:3]) / 1000:.4f}"
    _describe(raw, _halved("volume_ml", volumes), {"background": 0, "anterior": 1, "posterior": 2})


def write_busi(data: Path, raw: Path) -> None:
    """One case per picture, a volume of one slice; the whole picture is foreground. Every second one has a text."""
    folder, classes, texts = data / "busi_us_text", {}, [("case", "plane", "slice", "text")]
    with open(folder / "captions.csv", encoding="utf-8-sig", newline="") as stream:
        text_of = {row["image_path"]: row["text_caption"] for row in csv.DictReader(stream)}
    for number, file in enumerate(sorted(folder.glob("*/*.png"))):
        case = f"busi_{number:03d}"
        picture = np.asarray(Image.open(file).convert("L")).T[:, ::-1, None]
        for place, content in (
            (raw / "imagesTr" / f"{case}_0000.nii.gz", picture),
            (raw / "labelsTr" / f"{case}.nii.gz", np.ones_like(picture)),
        ):
            place.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(content, np.eye(4)), place)
        classes[case] = file.parent.name
        if number % 2 == 0:
            texts.append((case, "axial", 0, text_of[f"{file.parent.name}/{file.name}"]))
    with open(raw / "texts.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(texts)
    _describe(raw, _halved("class", classes), {"background": 0, "foreground": 1})
    labels = str(raw / "metadata.csv")
    _run("nnssl_plugin", "prepare", "-d", raw.name[7:10], "--class-labels", labels, "--target", "class")


SETS = (
    Set("Dataset601_STS", write_sts, [32, 32, 32], [4.0, 4.0, 4.0], ("modality", "subject")),
    Set(
        "Dataset602_BUSI", write_busi, [128, 128], [1.0, 1.0], ("class", HELD_OUT, *SHUFFLED), halved=True, classes=True
    ),
    Set(
        "Dataset603_Hippocampus",
        write_hippocampus,
        [32, 40, 32],
        [1.0, 1.0, 1.0],
        tuple(f"{column}:within=1.05" for column in ("volume_ml", HELD_OUT, *SHUFFLED)),
        halved=True,
    ),
)


def _halved(name: str, labels: dict[str, str]) -> list[str]:
    """A table of cases and labels: all, those of every second case, and these dealt out at random, five times."""
    held_out = list(labels.values())[1::2]
    dealt = [held_out, *(np.random.default_rng(seed).permutation(held_out) for seed in range(len(SHUFFLED)))]
    lines = [",".join(("case", name, HELD_OUT, *SHUFFLED))]
    for number, (case, label) in enumerate(labels.items()):
        cells = [each[number // 2] for each in dealt] if number % 2 else [""] * len(dealt)
        lines.append(",".join((case, label, *cells)))
    return lines


def _describe(raw: Path, lines: list[str], labels: dict[str, int]) -> None:
    from nnssl_plugin.io.files import write_json

    content = {
        "channel_names": {"0": "MR"},
        "labels": labels,
        "numTraining": len(lines) - 1,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    write_json(raw / "dataset.json", content)
    (raw / "metadata.csv").write_text("\n".join(lines) + "\n")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def plan(each: Set, steps: int) -> None:
    """A small U-Net preprocessed, a plan for every pretraining, and one for the segmentation."""
    from nnssl_plugin.io.files import read_json, write_json

    _run("nnUNetv2_extract_fingerprint", "-d", each.number, "-np", "1")
    _run("nnUNetv2_plan_experiment", "-d", each.number)
    folder = Path(os.environ["nnUNet_preprocessed"], each.name)
    content = read_json(folder / "nnUNetPlans.json")
    planned, dimensions = content["configurations"][each.configuration], len(each.patch)
    planned |= {"patch_size": each.patch, "spacing": each.spacing, "batch_size": 4}
    planned["architecture"]["arch_kwargs"] |= {
        "n_stages": len(WIDTHS),
        "features_per_stage": WIDTHS,
        "kernel_sizes": [[3] * dimensions] * len(WIDTHS),
        "strides": [[1] * dimensions] + [[2] * dimensions] * (len(WIDTHS) - 1),
        "n_conv_per_stage": [2] * len(WIDTHS),
        "n_conv_per_stage_decoder": [1] * (len(WIDTHS) - 1),
    }
    content["configurations"] = {each.configuration: planned}
    write_json(folder / "nnUNetPlans.json", content)
    cases = [name.removesuffix(".nii.gz") for name in sorted(os.listdir(raw_of(each) / "labelsTr"))]
    write_json(folder / "splits_final.json", [each.split(cases)])
    _run("nnUNetv2_preprocess", "-d", each.number, "-c", each.configuration, "-np", "1")
    length = {"epochs": max(1, steps // PER_EPOCH), "iterations_per_epoch": min(steps, PER_EPOCH)}
    for name, (_, changes) in PRETRAININGS.items():
        preset = "m3ret-simdino" if name == "simdino" else name
        settings = length | {"batch_size": 4, "validation_iterations": 1, "warmup_epochs": 1, "figure_every": 1000}
        edits = [f"pretraining.{key}={value}" for key, value in (settings | changes).items()]
        _run("nnssl_plugin", "plan", "-d", each.number, "-n", name, "--preset", preset, "--set", *edits)
    edits = [f"finetuning.{key}={value}" for key, value in (length | {"validation_iterations": 1}).items()]
    edits += ["classification.inputs=windows", 'classification.targets=["class"]'] if each.classes else []
    _run("nnssl_plugin", "plan", "-d", each.number, "-n", "start", "--set", *edits)
    words = ["-d", each.number, "-c", each.configuration, "-p", "start", "-n", "supervised", "--from-scratch"]
    _run("nnssl_plugin", "adapt", *words)


def raw_of(each: Set) -> Path:
    """Its raw dataset."""
    return Path(os.environ["nnUNet_raw"], each.name)


def trained(each: Set, trainer: str, plans: str, fold: str) -> Path:
    """The checkpoint of a training, which runs where there is none."""
    folder = Path(os.environ["nnUNet_results"], each.name, f"{trainer}__{plans}__{each.configuration}", f"fold_{fold}")
    if not (folder / "checkpoint_final.pth").is_file():
        script = Path(__file__).parent / "one_thread.py"
        words = [str(script), each.number, each.configuration, fold, "-tr", trainer, "-p", plans]
        _run(sys.executable, *words, "-device", "cpu", "--c")
    return folder / "checkpoint_final.pth"


def untrained(each: Set, like: Path, folder: Path) -> Path:
    """The network of a checkpoint as it was at the start."""
    import torch

    from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
    from nnssl_plugin.nnunet.plans import build_network

    given = read_checkpoint(like)["init_args"]
    torch.manual_seed(0)
    network = build_network(given["plans"], given["configuration"], given["dataset_json"])
    path = folder / f"untrained_{each.name}.pth"
    save_checkpoint(
        {"network_weights": network.state_dict(), "init_args": given, "trainer_name": "nnUNetTrainer"}, path
    )
    return path


def intensities(image: str, backbone) -> np.ndarray:
    """The preprocessed image at 8 voxels along each axis, and its deciles."""
    from nnssl_plugin.data.windows import resize

    data = backbone.preprocess(image)
    small = resize(data, [INTENSITY_SIDE if size > 1 else 1 for size in data.shape[1:]])
    return np.concatenate((small.ravel(), np.quantile(data, np.linspace(0.1, 0.9, 9))))


def size_of(image: str, backbone) -> np.ndarray:
    """Of each axis, which numbers of voxels the preprocessed image exceeds: near sizes are near by their cosine."""
    return np.concatenate([np.arange(512) < size for size in backbone.preprocess(image).shape[1:]]).astype(np.float32)


def pair_of(each: Set, epochs: int):
    """The image encoder of the pair that was trained on slices and texts: a file → its vector."""
    from nnssl_plugin.captions.clip.pairs import load_pair
    from nnssl_plugin.captions.rendering import load_volume, slice_image
    from nnssl_plugin.data.triplets import PAIR_FOLDER, Triplet
    from nnssl_plugin.nnunet.planes import stored_axis

    raw = raw_of(each)
    if not (raw / PAIR_FOLDER).is_dir():
        given = ["--captioner", "file", "--texts", str(raw / "texts.csv")] if (raw / "texts.csv").is_file() else []
        _run("nnssl_plugin", "caption", "-d", each.number, "--slices", "2", *given)
        _run("nnssl_plugin", "clip", "-d", each.number, "--epochs", str(epochs))
    pair = load_pair(weights=str(raw / PAIR_FOLDER))

    def vector(image: str) -> np.ndarray:
        volume = load_volume(Path(image))
        size = volume.array.shape[stored_axis(volume.affine, "axial")[0]]
        places = sorted({int(place) for place in np.linspace(0, size - 1, SLICES + 2)[1:-1]} if size > 1 else {0})
        slices = [slice_image(volume, Triplet("", "axial", place, size, "", "")) for place in places]
        return pair.embed(slices, [""])[0].mean(axis=0)

    return vector


def index_of(vector: Callable[[str], np.ndarray], like: Path, folder: Path, parts: list[str]) -> None:
    """An index of vectors that no encoder of this package made, with the rows of another one."""
    from nnssl_plugin.data.vector_store import VectorStore, writing
    from nnssl_plugin.tasks.retrieval.standardisation import statistics_of

    if (folder / "statistics.npy").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    store = VectorStore(like)
    vectors = np.array([vector(row["image"]) for row in store.table()])
    facts = {"dimensions": vectors.shape[1], "made": store.facts["made"]}
    with writing(folder, facts | {"encoder": store.facts["encoder"] | {"network": "other", "parts": parts}}) as made:
        made.append(vectors, store.table())
        made.freeze(statistics_of(made.vectors()))


def evaluate(each: Set, args: argparse.Namespace) -> None:
    """Train, embed and evaluate one set."""
    from nnssl_plugin.features.pretrained_backbone import load_backbone

    raw, work = raw_of(each), args.work
    if not (raw / "metadata.csv").is_file():
        each.write(args.data, raw)
    if not Path(os.environ["nnUNet_preprocessed"], each.name, "start-supervised.json").is_file():
        plan(each, args.steps)
    weights = {name: trained(each, trainer, name, "all") for name, (trainer, _) in PRETRAININGS.items()}
    weights["untrained"] = untrained(each, weights["mae"], work)
    weights["supervised"] = trained(each, CLASSIFICATION if each.classes else SEGMENTATION, "start-supervised", "0")
    indexes = {name: work / f"{each.name}_{name}" for name in (*weights, "pair", "intensities", "size")}
    for name, checkpoint in weights.items():
        _run("nnssl_plugin", "embed", "-m", str(checkpoint), "-i", str(raw / "imagesTr"), "-o", str(indexes[name]),
             "--metadata", str(raw / "metadata.csv"), "-np", "1")  # fmt: skip
    backbone = load_backbone(weights["mae"])
    index_of(lambda image: intensities(image, backbone), indexes["mae"], indexes["intensities"], ["mean", "maximum"])
    index_of(lambda image: size_of(image, backbone), indexes["mae"], indexes["size"], ["maximum"])
    if not (indexes["pair"] / "statistics.npy").is_file():
        index_of(pair_of(each, args.pair_epochs), indexes["mae"], indexes["pair"], ["mean"])
    named = [f"{name}={folder}" for name, folder in indexes.items()]
    rules = [word for rule in each.rules for word in ("--by", rule)]
    _run("nnssl_plugin", "evaluate", "retrieval", "--index", *named, *rules, "-o", str(work / f"{each.name}_retrieval"))
    for target in (HELD_OUT, *SHUFFLED) if each.classes else ():
        _run("nnssl_plugin", "evaluate", "probe", "--index", *named, "--target", target)


def _run(*words: str) -> None:
    print("$", *words, flush=True)
    workers = {"nnUNet_n_proc_DA": "0"} if "-tr" in words else {}  # planning fails on 0
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    subprocess.run(command, check=True, env=os.environ | workers)


if __name__ == "__main__":
    main()
