"""Does a text find the volumes that it describes? Phantoms of four kinds, Med3DInsight with a pair that clip trained.

    OMP_NUM_THREADS=1 python benchmarks/text_retrieval.py WORK_FOLDER --steps 300

Volumes of 24³ voxels with a ball, a cube, stripes or two small balls, of random size, place, brightness and noise; one
text per kind, the same for every slice. 80 cases are trained on, 40 others are searched. Beside chance stands the same
network with its alignment as it was before training. Everything is made only where it is missing.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nibabel
import numpy as np
import torch

from nnssl_plugin.cli.embed import alignment_of
from nnssl_plugin.cli.env import search_path
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.statistics.ranking import expected_by_chance, query_metrics
from nnssl_plugin.tasks.retrieval.embedding import embed_images
from nnssl_plugin.tasks.retrieval.index import load_index
from nnssl_plugin.tasks.retrieval.texts import search_texts, text_queries

TEXTS = {
    "ball": "one large bright ball in the middle of darkness",
    "cube": "a box with sharp corners and flat sides",
    "stripes": "many parallel stripes from one side to the other",
    "pair": "two small round spots apart from each other",
}
SIDE, TRAINING, EVALUATION = 24, 80, 40
NAME = "Dataset701_Phantoms"
WIDTHS = [8, 16, 32]


def main() -> None:
    """Make what is missing, search, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="of 8 volumes")
    parser.add_argument("--pair-epochs", type=int, default=20)
    args = parser.parse_args()
    work = args.work.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(work / name)
    os.environ["nnUNet_extTrainer"] = search_path()
    raw = work / "nnUNet_raw" / NAME
    if not (raw / "dataset.json").is_file():
        write(raw, work / "evaluation")
    checkpoint = trained(raw, args)
    found = {"chance": chance()}
    for name, weights in (("trained", checkpoint), ("before training", fresh(checkpoint, work / "fresh.pth"))):
        folder = work / f"index_{name.replace(' ', '_')}"
        embed_images(work / "evaluation", folder, weights, processes=0, alignments=alignment_of)
        found[name] = measured(folder)
    write_json(work / "text_retrieval.json", found)
    print(json.dumps(found, indent=2))


def phantom(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A volume (SIDE, SIDE, SIDE) float32."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij"))
    moved = grid - rng.uniform(-0.2, 0.2, (3, 1, 1, 1))
    size = rng.uniform(0.45, 0.65)
    if kind == "ball":
        shape = np.linalg.norm(moved, axis=0) < size
    elif kind == "cube":
        shape = np.abs(moved).max(axis=0) < 0.8 * size
    elif kind == "stripes":
        shape = np.sin(rng.uniform(9, 13) * moved[rng.integers(3)] + rng.uniform(0, 6)) > 0.3
    else:
        apart = rng.normal(size=3)
        apart = (0.5 * apart / np.linalg.norm(apart)).reshape(3, 1, 1, 1)
        shape = np.minimum(np.linalg.norm(moved - apart, axis=0), np.linalg.norm(moved + apart, axis=0)) < 0.5 * size
    return (rng.uniform(50, 150) * shape + rng.normal(0, 8, shape.shape) + 20).astype(np.float32)


def write(raw: Path, evaluation: Path) -> None:
    """The training cases as a raw dataset with texts, the others as a folder of images."""
    texts = []
    for case in range(TRAINING + EVALUATION):
        kind = list(TEXTS)[case % len(TEXTS)]
        name = f"{kind}_{case:03d}"
        folder = raw / "imagesTr" if case < TRAINING else evaluation
        for place, content in (
            (folder / f"{name}_0000.nii.gz", phantom(kind, np.random.default_rng(case))),
            (raw / "labelsTr" / f"{name}.nii.gz", np.ones([SIDE] * 3, dtype=np.uint8)),
        ):
            if case < TRAINING or place.parent == evaluation:
                place.parent.mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(content, np.eye(4)), place)
        texts.append((name, TEXTS[kind]))
    with open(raw / "texts.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("case", "text"), *texts])
    reader = {"overwrite_image_reader_writer": "NibabelIOWithReorient", "file_ending": ".nii.gz"}
    facts = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}, "numTraining": TRAINING}
    write_json(raw / "dataset.json", facts | reader)


def trained(raw: Path, args: argparse.Namespace) -> Path:
    """The checkpoint of Med3DInsight."""
    number, folder = NAME[7:10], Path(os.environ["nnUNet_results"], NAME, "Med3DInsightPretrainer__text__3d_fullres")
    checkpoint = folder / "fold_all" / "checkpoint_final.pth"
    if checkpoint.is_file():
        return checkpoint
    if not (raw / "clip_pair").is_dir():
        words = ["--captioner", "file", "--texts", str(raw / "texts.csv"), "--slices", "6"]
        _run("nnssl_plugin", "caption", "-d", number, *words)
        _run("nnssl_plugin", "clip", "-d", number, "--epochs", str(args.pair_epochs))
    plans = Path(os.environ["nnUNet_preprocessed"], NAME, "nnUNetPlans.json")
    if not plans.with_name("text.json").is_file():
        _run("nnUNetv2_extract_fingerprint", "-d", number, "-np", "1")
        _run("nnUNetv2_plan_experiment", "-d", number)
        content = read_json(plans)
        planned = content["configurations"]["3d_fullres"] | {"patch_size": [SIDE] * 3, "spacing": [1.0] * 3}
        planned["architecture"]["arch_kwargs"] |= {
            "n_stages": len(WIDTHS),
            "features_per_stage": WIDTHS,
            "kernel_sizes": [[3] * 3] * len(WIDTHS),
            "strides": [[1] * 3] + [[2] * 3] * (len(WIDTHS) - 1),
            "n_conv_per_stage": [2] * len(WIDTHS),
            "n_conv_per_stage_decoder": [1] * (len(WIDTHS) - 1),
        }
        content["configurations"] = {"3d_fullres": planned}
        write_json(plans, content)
        _run("nnUNetv2_preprocess", "-d", number, "-c", "3d_fullres", "-np", "1")
        settings = {"epochs": max(1, args.steps // 25), "iterations_per_epoch": 25, "validation_iterations": 2,
                    "batch_size": 8, "lr": 0.001, "figure_every": 1000, "method.queries": 16, "method.dim": 96,
                    "method.heads": 4, "method.layers": 1, "method.mask_block": 4,
                    "method.mask_ratio": 0.3}  # fmt: skip
        edits = [f"pretraining.{name}={value}" for name, value in settings.items()]
        _run("nnssl_plugin", "plan", "-d", number, "-n", "text", "--preset", "med3dinsight", "--set", *edits)
    script = str(Path(__file__).parent / "one_thread.py")
    words = [number, "3d_fullres", "all", "-tr", "Med3DInsightPretrainer", "-p", "text", "-device", "cpu", "--c"]
    _run(sys.executable, script, *words)
    return checkpoint


def fresh(checkpoint: Path, path: Path) -> Path:
    """The checkpoint with the alignment as it was before training."""
    from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
    from nnssl_plugin.methods.med3dinsight.objective import Med3DInsight
    from nnssl_plugin.methods.med3dinsight.settings import Settings
    from nnssl_plugin.networks.backbone import Backbone
    from nnssl_plugin.nnunet.plans import build_network

    content = read_checkpoint(checkpoint)
    given, method = content["init_args"], Settings(**content["provenance"]["settings"])
    torch.manual_seed(0)
    network = build_network(given["plans"], given["configuration"], given["dataset_json"])
    task = Med3DInsight(Backbone(network, 1), method, len(content["ssl_state"]["task"]["metric"]))
    state = {key: value for key, value in task.state_dict().items() if not key.startswith("backbone.network.")}
    content["ssl_state"]["task"] = state
    content["provenance"]["settings"] = asdict(method)
    save_checkpoint(content | {"network_weights": network.state_dict()}, path)
    return path


def measured(folder: Path) -> dict:
    """Each text as a query over the volumes of the evaluation."""
    index = load_index(folder)
    queries = text_queries(list(TEXTS.values()), index)
    found = search_texts(index, queries, len(index.vectors))
    kinds = np.array([row["case"].split("_")[0] for row in index.table])
    scores = np.empty(found.rows.shape)
    np.put_along_axis(scores, found.rows, -found.distances, axis=1)
    right = kinds[None] == np.array(list(TEXTS))[:, None]
    values = query_metrics(scores, right)
    of_kind = {kind: float(value) for kind, value in zip(TEXTS, values["average_precision"], strict=True)}
    nearest = kinds[np.argmax(scores, axis=1)].tolist()
    best_text = np.array(list(TEXTS))[np.argmax(scores, axis=0)]  # the other way round: a volume and four texts
    return {
        "map": float(values["average_precision"].mean()),
        "average_precision": of_kind,
        "first_found": dict(zip(TEXTS, nearest, strict=True)),
        "volumes_whose_nearest_text_is_theirs": float(np.mean(best_text == kinds)),
    }


def chance() -> dict:
    number, right = np.full(len(TEXTS), EVALUATION), np.full(len(TEXTS), EVALUATION // len(TEXTS))
    return {
        "map": expected_by_chance(number, right)["average_precision"],
        "volumes_whose_nearest_text_is_theirs": 1 / len(TEXTS),
    }


def _run(*words: str) -> None:
    print("$", *words, file=sys.stderr, flush=True)
    workers = {"nnUNet_n_proc_DA": "0"} if "-tr" in words else {}
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    subprocess.run(command, check=True, env=os.environ | workers, stdout=sys.stderr)


if __name__ == "__main__":
    main()
