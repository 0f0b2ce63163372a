"""M3Ret on real images: one pretraining on volumes, ultrasound and clips, then what its frozen vectors tell.

    python benchmarks/m3ret_real_images.py data WORK --shared SHARED_DATA
    python benchmarks/m3ret_real_images.py train WORK --device cuda --epochs 24
    python benchmarks/m3ret_real_images.py evaluate WORK --device cuda

``SHARED_DATA`` holds ``sts_petctmr`` (CT, PET and T1 MR of ten patients with a soft-tissue sarcoma) and
``busi_us_text`` (ultrasound of the breast, three classes). The clips are no videos: each runs through the slices of one
of these volumes. The pretraining sees the images that it is measured on, without their labels. What is there is not
made again; nnU-Net's three folders lie below ``WORK``.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

VOLUMES, PICTURES, CLIPS = "Dataset511_STS", "Dataset512_BUSI", "Dataset513_Clips"
METHODS = {"mae": "M3RetMAEPretrainer", "simdino": "M3RetSimDINOPretrainer"}
TARGETS = {VOLUMES: "modality", PICTURES: "diagnosis"}
SPACING = (2.5, 2.5, 5.0)
"""Millimetres (x, y, z) of the volumes: they fit into the patch in which they are seen whole."""
HOUNSFIELD = 1000
"""CT is clipped to ± this [paper]."""
PATCHES = {VOLUMES: [32, 64, 64], PICTURES: [128, 128], CLIPS: [24, 64, 64]}
TOKEN = [4, 8, 8]
BATCHES = {VOLUMES: 16, PICTURES: 32, CLIPS: 16}
KINDS = {VOLUMES: "volume", PICTURES: "ultrasound", CLIPS: "video"}
SHUFFLES = 5
"""Columns of labels that belong to other subjects: the control of every number."""
SIDE = 8
"""Voxels along each axis of the image whose intensities are the plain vector."""
HERE = Path(__file__).parent


def main() -> None:
    """One of the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("data", "plan", "train", "index", "evaluate"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--shared", type=Path, help="data: folder of the images")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--network", default="patch-vit-s", help="preset (default: patch-vit-s)")
    parser.add_argument("--epochs", type=int, default=24, help="of --steps steps (default: 24)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=float, default=1.0, help="batch sizes times this")
    parser.add_argument("--set", nargs="*", default=[], help="plan: more settings of the network and the training")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (args.work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str((args.work / name).resolve())
    if args.stage == "data":
        make_data(args.shared, args.work)
    if args.stage in ("data", "plan"):
        plan(args)
    if args.stage == "data":
        preprocess()
    if args.stage == "train":
        train(args)
    if args.stage in ("index", "evaluate"):
        for dataset in TARGETS:
            index(dataset, args)
    if args.stage == "evaluate":
        evaluate(args.work)


def make_data(shared: Path, work: Path) -> None:
    """Volumes at one spacing, clips through their slices, and the raw datasets of both and of the pictures."""
    for file in sorted((shared / "sts_petctmr").glob("*/*_image.nii.gz")):
        target = work / "scans" / file.parent.name / file.name
        if not target.is_file():
            write_volume(file, target, work / "clips")
    run(sys.executable, HERE / "sts_modality_data.py", "-i", work / "scans", "-o", work / "sts.csv")
    run(sys.executable, HERE / "busi_data.py", "-i", shared / "busi_us_text", "-o", work / "busi.csv")
    plugin("prepare", "-i", work / "scans", "-d", 511, "-n", "STS", "--modality", "noNorm", "--keep",
           "--class-labels", work / "sts.csv")  # fmt: skip
    plugin("prepare", "-i", shared / "busi_us_text", "-d", 512, "-n", "BUSI", "--class-labels", work / "busi.csv")
    plugin("prepare", "-i", work / "clips", "-d", 513, "-n", "Clips", "--video", 24)
    for number in (511, 512, 513):
        run("nnUNetv2_extract_fingerprint", "-d", number, "-np", 1)
        run("nnUNetv2_plan_experiment", "-d", number)


def write_volume(file: Path, target: Path, clips: Path) -> None:
    """A volume at :data:`SPACING` as whole numbers, and its axial and coronal slices as folders of frames."""
    import SimpleITK as sitk
    from PIL import Image

    image = sitk.ReadImage(str(file), sitk.sitkFloat32)
    is_ct = file.name.startswith("CT")
    if is_ct:
        image = sitk.Clamp(image, lowerBound=-HOUNSFIELD, upperBound=HOUNSFIELD)
    axes = zip(image.GetSize(), image.GetSpacing(), SPACING, strict=True)
    size = [max(1, round(number * own / new)) for number, own, new in axes]
    for axis, (own, new) in enumerate(zip(image.GetSpacing(), SPACING, strict=True)):
        if new > own:
            image = sitk.RecursiveGaussian(image, sigma=new / 2, direction=axis)
    image = sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), SPACING,
                          image.GetDirection(), -HOUNSFIELD if is_ct else 0)  # fmt: skip
    scale = 100 if file.name.startswith("PET") else 1  # SUV are small numbers
    image = sitk.Cast(sitk.Round(image * scale), sitk.sitkInt16)
    target.parent.mkdir(parents=True, exist_ok=True)
    voxels = sitk.GetArrayFromImage(image).astype(float)
    grey = ((voxels - voxels.min()) / np.ptp(voxels) * 255).round().astype(np.uint8)
    for plane, frames in (("axial", grey), ("coronal", grey.transpose(1, 0, 2))):
        folder = clips / f"{file.parent.name}_{file.name.removesuffix('_image.nii.gz')}_{plane}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(frames):
            Image.fromarray(frame).convert("RGB").save(folder / f"{number:03d}.png")
    sitk.WriteImage(image, str(target), True)


def plan(args: argparse.Namespace) -> None:
    """Plans of the three sources, and one of each method that names them."""
    volume, flat = "configurations.3d_fullres", "configurations.2d"
    plugin("plan", "-d", 513, "-n", "sized", "--overwrite", "--set", f"{volume}.patch_size={PATCHES[CLIPS]}")
    of_network = [each for each in args.set if not each.startswith("method.")]
    plugin("plan", "-d", 512, "-n", "sized", "--overwrite", "--preset", args.network, "--set",
           f"{flat}.patch_size={PATCHES[PICTURES]}", f"{flat}.spacing=[2,2]", f"{flat}.data_identifier=sized_2d",
           f"{flat}.architecture.arch_kwargs.patch_size={TOKEN[1:]}",
           *(f"{flat}.architecture.arch_kwargs.{each}" for each in of_network))  # fmt: skip
    for method in args.methods:
        sources = [
            {"dataset": dataset[7:10], "plans": method if dataset == VOLUMES else "sized", "kind": KINDS[dataset],
             "configuration": "2d" if dataset == PICTURES else "3d_fullres",
             "batch_size": max(1, round(BATCHES[dataset] * args.batch))}
            for dataset in (VOLUMES, PICTURES, CLIPS)
        ]  # fmt: skip
        plugin("plan", "-d", 511, "-n", method, "--overwrite", "--preset", args.network, f"m3ret-{method}", "--set",
               f"{volume}.patch_size={PATCHES[VOLUMES]}", f"{volume}.architecture.arch_kwargs.patch_size={TOKEN}",
               *(f"{volume}.architecture.arch_kwargs.{each}" for each in of_network), "method.intensity=unit",
               *(each for each in args.set if each.startswith("method.") and method == "mae"),
               f"epochs={args.epochs}", f"iterations_per_epoch={args.steps}", "validation_iterations=3",
               f"warmup_epochs={args.epochs / 12:.3g}", f"figure_every={args.epochs}",
               f"sources={json.dumps(sources)}")  # fmt: skip


def preprocess() -> None:
    """All three datasets, as their plans have them."""
    for number, plans, configuration in (
        (511, "mae", "3d_fullres"),
        (512, "sized", "2d"),
        (513, "sized", "3d_fullres"),
    ):
        run("nnUNetv2_preprocess", "-d", number, "-plans_name", plans, "-c", configuration, "-np", 1)


def train(args: argparse.Namespace) -> None:
    """The methods side by side; one that was interrupted goes on."""
    started = []
    for method in args.methods:
        if checkpoint(method).name == "checkpoint_final.pth" and checkpoint(method).is_file():
            continue
        words = [sys.executable, str(HERE / "one_thread.py"), "511", "3d_fullres", "all", "-tr", METHODS[method],
                 "-p", method, "-device", args.device, "--c"]  # fmt: skip
        with (args.work / f"train_{method}.log").open("a") as log:
            started.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT))
    if any(process.wait() for process in started):
        raise SystemExit(f"A training failed: see {args.work}/train_*.log")


def checkpoint(method: str) -> Path:
    """The end of a pretraining; of one that was interrupted, what there is."""
    folder = Path(os.environ["nnUNet_results"], VOLUMES, f"{METHODS[method]}__{method}__3d_fullres", "fold_all")
    final, latest = folder / "checkpoint_final.pth", folder / "checkpoint_latest.pth"
    return latest if latest.is_file() and not final.is_file() else final


def arms(args: argparse.Namespace) -> dict[str, Path]:
    """Name → checkpoint: each method, of SimDINO the teacher, and a network as it was before the first step."""
    import torch

    from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
    from nnssl_plugin.checkpoints.format.teacher import teacher_weights
    from nnssl_plugin.nnunet.plans import build_network

    found = {}
    for method in args.methods:
        content = read_checkpoint(checkpoint(method))
        given = content["init_args"]
        weights = {method: content["network_weights"] | (teacher_weights(content) or {})}
        if "untrained" not in found:
            torch.manual_seed(0)
            network = build_network(given["plans"], given["configuration"], given["dataset_json"], channels=3)
            weights["untrained"] = network.state_dict()
        for name, state in weights.items():
            found[name] = args.work / "weights" / f"{name}.pth"
            found[name].parent.mkdir(exist_ok=True)
            save_checkpoint(content | {"network_weights": state, "ssl_state": None}, found[name])
    return found


def index(dataset: str, args: argparse.Namespace) -> None:
    """An index for each arm, of the pair of ``nnssl_plugin clip`` where there is one, and of plain intensities."""
    number, folder = dataset[7:10], args.work / "indexes" / dataset
    folder.mkdir(parents=True, exist_ok=True)
    table = shuffled(dataset, folder / "shuffled.csv")
    for name, weights in arms(args).items():
        if dataset == PICTURES:
            weights = flat_weights(name, weights)
        plugin("embed", "-m", weights, "-d", number, "-o", folder / name, "--view", "whole", "--metadata", table,
               "-device", args.device, "--batch-size", 16)  # fmt: skip
    like = folder / next(iter(arms(args)))
    if not (folder / "intensities").is_dir():
        write_index(folder / "intensities", like, plain_vectors(like), standardise=True)
    pair = Path(os.environ["nnUNet_raw"], VOLUMES, "clip_pair")
    if pair.is_dir() and not (folder / "clip").is_dir():
        write_index(folder / "clip", like, clip_vectors(dataset, like, pair), standardise=False)


def flat_weights(name: str, weights: Path) -> Path:
    """The weights in the flat network of the pictures, which answers them as the other one answers them repeated."""
    plugin("adapt", "-d", 512, "-p", "sized", "-c", "2d", "-n", name, "-w", weights, "--inflate")
    (found,) = Path(os.environ["nnUNet_preprocessed"], PICTURES).glob(f"sized-{name}_2d*.pth")
    return found


def shuffled(dataset: str, path: Path) -> Path:
    """A table of the cases with the labels of others, :data:`SHUFFLES` times; of a patient's volumes among
    themselves, as every patient has each modality once."""
    import csv

    with Path(os.environ["nnUNet_raw"], dataset, "classification.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    labels = np.array([row[TARGETS[dataset]] for row in rows])
    subjects = np.array([row["subject"] if dataset == VOLUMES else "" for row in rows])
    columns = {}
    for number in range(SHUFFLES):
        rng, column = np.random.default_rng(number), labels.copy()
        for subject in np.unique(subjects):
            column[subjects == subject] = rng.permutation(labels[subjects == subject])
        columns[f"shuffled_{number}"] = column
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["case", "subject", *columns])
        for place, row in enumerate(rows):
            writer.writerow([row["case"], row["subject"], *(column[place] for column in columns.values())])
    return path


def plain_vectors(like: Path) -> np.ndarray:
    """Each image of an index, brought to [0, 1], at :data:`SIDE` voxels along each axis, and its deciles."""
    import nibabel
    from PIL import Image

    from nnssl_plugin.data.vector_store import VectorStore
    from nnssl_plugin.data.windows import resize

    vectors = []
    for row in VectorStore(like).table():
        path = row["image"]
        data = np.asarray(Image.open(path).convert("L") if path.endswith(".png") else nibabel.load(path).dataobj, float)
        data = (data - data.min()) / np.ptp(data)
        vectors.append(np.concatenate((resize(data[None], [SIDE] * data.ndim).ravel(),
                                       np.quantile(data, np.linspace(0.1, 0.9, 9)))))  # fmt: skip
    return np.array(vectors)


def clip_vectors(dataset: str, like: Path, folder: Path) -> np.ndarray:
    """By the image encoder of the pair: of a volume the mean over its captioned slices, of a picture the picture."""
    from PIL import Image

    from nnssl_plugin.captions.clip.pairs import load_pair
    from nnssl_plugin.captions.triplets import triplet_pictures
    from nnssl_plugin.data.triplets import read_triplets
    from nnssl_plugin.data.vector_store import VectorStore

    pair, table = load_pair(weights=str(folder)), VectorStore(like).table()
    if dataset == PICTURES:
        return pair.embed([np.asarray(Image.open(row["image"]).convert("RGB")) for row in table], [""])[0]
    raw = Path(os.environ["nnUNet_raw"], dataset)
    of_case: dict[str, list[np.ndarray]] = {}
    for triplet, picture in triplet_pictures(raw, read_triplets(raw)):
        of_case.setdefault(triplet.case, []).append(picture)
    return np.stack([pair.embed(of_case[row["case"]], [""])[0].mean(0) for row in table])


def write_index(folder: Path, like: Path, vectors: np.ndarray, *, standardise: bool) -> None:
    """An index of given vectors with the table of another one."""
    from nnssl_plugin.data.vector_store import VectorStore, writing
    from nnssl_plugin.tasks.retrieval.encoder import MAXIMUM, MEAN
    from nnssl_plugin.tasks.retrieval.standardisation import statistics_of

    store = VectorStore(like)
    encoder = store.facts["encoder"] | {"network": folder.name, "parts": [MEAN, MAXIMUM] if standardise else [MEAN]}
    facts = {"dimensions": vectors.shape[1], "made": store.facts["made"], "encoder": encoder}
    with writing(folder, facts) as made:
        made.append(vectors, store.table())
        made.freeze(statistics_of(made.vectors()))


def evaluate(work: Path) -> None:
    """Probe, retrieval and separation of each dataset, with the shuffled labels beside; ``report.json`` holds all."""
    from nnssl_plugin.io.files import write_json

    report: dict = {}
    for dataset, target in TARGETS.items():
        folder = work / "indexes" / dataset
        named = [f"{path.name}={path}" for path in sorted(folder.iterdir()) if (path / "index.json").is_file()]
        labels = [target, *(f"shuffled_{number}" for number in range(SHUFFLES))]
        report[dataset] = {"probe": {}, "separation": {}}
        for column in labels:
            plugin("evaluate", "probe", "--index", *named, "--target", column, "-o", folder / f"probe_{column}.json")
            report[dataset]["probe"][column] = json.loads((folder / f"probe_{column}.json").read_text())["results"]
        rules = [word for rule in labels + ["subject"] * (dataset == VOLUMES) for word in ("--by", rule)]
        plugin("evaluate", "retrieval", "--index", *named, *rules, "-o", folder / "retrieval")
        report[dataset]["retrieval"] = json.loads((folder / "retrieval" / "retrieval.json").read_text())["results"]
        for each in named:
            name, path = each.split("=", 1)
            report[dataset]["separation"][name] = separations(path, labels, dataset == VOLUMES)
        write_json(work / "report.json", report)


def separations(path: str, labels: list[str], has_patients: bool) -> dict:
    """Mean cosine of pairs with one label minus that of pairs with two, with intervals over subjects, and how often a
    pair of the first kind has the larger cosine; of patients, among pairs of two modalities."""
    from nnssl_plugin.tasks.retrieval.index import load_index

    found = load_index(path)
    unit = found.standardise(found.vectors[:])
    cosines, subjects = unit @ unit.T, found.column("subject")
    asked = {name: (found.column(name), np.ones_like(cosines, dtype=bool)) for name in labels}
    if has_patients:
        modality = found.column("modality")
        asked["subject"] = (subjects, modality[:, None] != modality)
    return {name: separation(cosines, *given, subjects) for name, given in asked.items()}


def separation(cosines: np.ndarray, labels: np.ndarray, among: np.ndarray, subjects: np.ndarray) -> dict:
    """See :func:`separations`; ``among`` (N, N) says which pairs count, beside that no row is compared with itself."""
    from sklearn.metrics import roc_auc_score

    from nnssl_plugin.statistics.bootstrap import percentile_interval, subject_weights

    same, pairs = labels[:, None] == labels, among & ~np.eye(len(labels), dtype=bool)
    parts = [(same & pairs).astype(float), (~same & pairs).astype(float)]

    def gap(weights: np.ndarray) -> np.ndarray:
        sums = [[((weights @ of) * weights).sum(1) for of in (cosines * part, part)] for part in parts]
        with np.errstate(invalid="ignore"):  # a draw of subjects may hold no pair of a kind
            return sums[0][0] / sums[0][1] - sums[1][0] / sums[1][1]

    drawn = np.concatenate([gap(weights) for weights in subject_weights(list(subjects), samples=2000, seed=0)])
    upper = np.triu(pairs, 1)
    return {
        "gap": float(gap(np.ones((1, len(labels))))[0]),
        "interval": percentile_interval(drawn),
        "auroc": float(roc_auc_score(same[upper], cosines[upper])),
    }


def plugin(*words: object) -> None:
    """A command of ``nnssl_plugin``, in this process."""
    from nnssl_plugin.cli.main import main as command

    print("$ nnssl_plugin", *words, flush=True)
    if command([str(word) for word in words]):
        raise SystemExit("It failed.")


def run(*words: object) -> None:
    """Another command."""
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True)


if __name__ == "__main__":
    main()
