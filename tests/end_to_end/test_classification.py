"""Classification through nnU-Net's commands: plan, preprocess, train folds, validate; 2D and 3D, every kind of target.

The images are generated: a body in which bright and dark blobs say what the classes are. ``trained`` trains both
folds of both datasets; tests append to it what comes after.
"""

import csv
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from in_process import command, nnunet_folders
from nnunetv2.run.run_training import run_training
from skimage import io

from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.case_labels import ClassLabels, Target, write_class_labels
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.classification.folds import check_splits, make_class_splits
from nnssl_plugin.tasks.classification.loading import load_classifier

pytestmark = pytest.mark.slow

TRAINER, FOLDS, CASES, PER_SUBJECT = "PretrainedClassificationTrainer", 2, 20, 2
BLOB = Target("blob", "multiclass", ("none", "bright", "dark"))
LESION = Target("lesion", "binary", ("no", "yes"))
SIGNS = Target("signs", "multilabel", ("bright", "dark"))
TRAINING = (
    "classification.epochs=5",
    "classification.iterations_per_epoch=8",
    "classification.batch_size=4",
    "classification.lr=0.003",
)


def small(configuration):
    """Assignments that make the planned network narrow."""
    return f"configurations.{configuration}.architecture.arch_kwargs.features_per_stage"


def subjects():
    return {f"case_{i:02d}": f"subject_{i // PER_SUBJECT:02d}" for i in range(CASES)}


def picture(shape, blobs, rng):
    """A body with noise and, of each kind that is asked for, one blob at a random place; and where the body is."""
    grid = np.stack(np.meshgrid(*(np.arange(s) for s in shape), indexing="ij"), -1)
    centre, radius = (np.array(shape) - 1) / 2, min(shape) / 2
    body = np.linalg.norm(grid - centre, axis=-1) < radius
    image = np.where(body, 120.0, 90.0) + rng.normal(0, 6, shape)
    directions = rng.normal(size=(len(blobs), len(shape)))
    for value, way in zip(blobs, directions, strict=True):
        place = centre + 0.5 * radius * way / np.linalg.norm(way)
        image[np.linalg.norm(grid - place, axis=-1) < radius / 3] += value
    return np.clip(image, 0, 255), body.astype(np.uint8)


def write_dataset(root, name, labels, blobs_of, *, shape, ending):
    raw = root / "nnUNet_raw" / name
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for i, case in enumerate(labels.cases):
        image, mask = picture(shape, blobs_of(case), np.random.default_rng(i))
        for folder, stem, values in (("imagesTr", f"{case}_0000", image), ("labelsTr", case, mask)):
            path = raw / folder / f"{stem}{ending}"
            if ending == ".png":
                io.imsave(path, values.astype(np.uint8), check_contrast=False)
            else:
                nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), path)
    write_json(
        raw / "dataset.json",
        {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0, "body": 1},
            "numTraining": len(labels.cases),
            "file_ending": ending,
        },
    )
    write_class_labels(raw, labels)


def flat_labels():
    return ClassLabels((BLOB,), subjects(), {"blob": {case: i // PER_SUBJECT % 3 for i, case in enumerate(subjects())}})


def solid_labels():
    bright, dark = ({case: i // PER_SUBJECT // step % 2 for i, case in enumerate(subjects())} for step in (1, 2))
    return ClassLabels(
        (LESION, SIGNS),
        subjects(),
        {
            "lesion": bright,
            "signs": {case: tuple(k for k, has in enumerate((bright[case], dark[case])) if has) for case in bright},
        },
    )


def dataset(root, number, name, labels, blobs_of, *, configuration, shape, ending, settings):
    """Everything from files to two trained folds; fold 0 by the command, fold 1 by the function that it calls."""
    write_dataset(root, name, labels, blobs_of, shape=shape, ending=ending)
    command(
        root,
        "nnUNetv2_plan_and_preprocess",
        "-d",
        number,
        "-c",
        configuration,
        "-npfp",
        "1",
        "-np",
        "1",
        "--verify_dataset_integrity",
    )
    preprocessed = root / "nnUNet_preprocessed" / name
    stages = len(
        read_json(preprocessed / "nnUNetPlans.json")["configurations"][configuration]["architecture"]["arch_kwargs"][
            "features_per_stage"
        ]
    )
    narrow = f"{small(configuration)}={[8 * 2 ** min(s, 2) for s in range(stages)]}"
    assert main(["plan", "-d", number, "-n", "small", "--set", narrow, *TRAINING, *settings]) == 0
    write_json(preprocessed / "splits_final.json", make_class_splits(labels, labels.cases, folds=FOLDS))
    printed = command(
        root, "nnUNetv2_train", number, configuration, "0", "-tr", TRAINER, "-p", "small", "-device", "cpu"
    )
    train(number, configuration, 1)
    model = root / "nnUNet_results" / name / f"{TRAINER}__small__{configuration}"
    return SimpleNamespace(
        number=number,
        name=name,
        labels=labels,
        configuration=configuration,
        model=model,
        preprocessed=preprocessed,
        printed=printed,
        raw=root / "nnUNet_raw" / name,
    )


def train(number, configuration, fold, *, plan="small", **more):
    run_training(number, configuration, fold, TRAINER, plan, device=torch.device("cpu"), **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The root of nnU-Net's folders, and both datasets with their trained folds."""
    root = tmp_path_factory.mktemp("classify")
    with nnunet_folders(root) as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        flat, solid = flat_labels(), solid_labels()
        values = {0: [], 1: [90], 2: [-100]}
        yield SimpleNamespace(
            root=root,
            flat=dataset(
                root,
                "903",
                "Dataset903_Flat",
                flat,
                lambda case: values[flat.labels["blob"][case]],
                configuration="2d",
                shape=(44, 52),
                ending=".png",
                settings=(),
            ),
            solid=dataset(
                root,
                "904",
                "Dataset904_Solid",
                solid,
                lambda case: [(90, -100)[k] for k in solid.labels["signs"][case]],
                configuration="3d_fullres",
                shape=(22, 20, 24),
                ending=".nii.gz",
                settings=(
                    "classification.inputs=windows",
                    "classification.windows=2",
                    "classification.crop=foreground",
                    "finetuning.weights=null",
                ),
            ),
        )


def rows_of(which, target, fold=0):
    several = len(which.labels.targets) > 1
    path = which.model / f"fold_{fold}" / "validation" / f"predictions{'_' + target.name if several else ''}.csv"
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(("which", "target"), [("flat", BLOB), ("solid", LESION), ("solid", SIGNS)])
def test_the_validation_cases_of_the_folds_are_all_cases_with_their_labels(trained, which, target):
    which = getattr(trained, which)
    splits = read_json(which.preprocessed / "splits_final.json")
    check_splits(splits, which.labels)
    rows = [row for fold in range(FOLDS) for row in rows_of(which, target, fold)]
    assert sorted(row["case"] for row in rows) == list(which.labels.cases)
    for row in rows:
        assert row["subject"] == which.labels.subjects[row["case"]]
        assert target.parse(row["label"]) == which.labels.labels[target.name][row["case"]]
        chances = [float(row[f"p_{name}"]) for name in target.classes]
        assert min(chances) >= 0 and (target.kind == "multilabel" or sum(chances) == pytest.approx(1, abs=1e-4))


@pytest.mark.parametrize(("which", "target"), [("flat", BLOB), ("solid", LESION), ("solid", SIGNS)])
def test_what_can_be_seen_is_learned(trained, which, target):
    which = getattr(trained, which)
    several = len(which.labels.targets) > 1
    for fold in range(FOLDS):
        summary = read_json(
            which.model / f"fold_{fold}" / "validation" / f"summary{'_' + target.name if several else ''}.json"
        )
        assert summary["auroc"] > 0.8, (target.name, fold)


@pytest.mark.parametrize("which", ["flat", "solid"])
def test_a_fold_holds_what_a_person_looks_for(trained, which):
    which = getattr(trained, which)
    fold = which.model / "fold_0"
    assert (fold / "progress.png").stat().st_size > 0
    assert {path.name for path in fold.glob("*.pth")} == {"checkpoint_best.pth", "checkpoint_final.pth"}
    assert "Validation of" in which.printed and "Best epoch so far" in which.printed


def test_validating_again_gives_the_same_table(trained):
    before = rows_of(trained.flat, BLOB)
    train("903", "2d", 0, only_run_validation=True)
    assert rows_of(trained.flat, BLOB) == before


def test_going_on_after_the_end_changes_nothing(trained):
    path = trained.flat.model / "fold_0" / "checkpoint_final.pth"
    before = torch.load(path, weights_only=True)["network_weights"]
    train("903", "2d", 0, continue_training=True)
    after = torch.load(path, weights_only=True)["network_weights"]
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_pretrained_weights_reach_the_classifier_through_adapt(trained):
    plans = read_json(trained.solid.preprocessed / "small.json")
    dataset_json = read_json(trained.solid.preprocessed / "dataset.json")
    torch.manual_seed(5)
    weights = build_network(plans, "3d_fullres", dataset_json).state_dict()
    save_checkpoint({"network_weights": weights}, trained.root / "pretrained.pth")
    assert (
        main(
            [
                "plan",
                "-d",
                "904",
                "-p",
                "small",
                "-n",
                "probe",
                "--set",
                "classification.epochs=1",
                'classification.targets=["lesion"]',
                "finetuning.trains=head",
            ]
        )
        == 0
    )
    assert main(["adapt", "-d", "904", "-w", str(trained.root / "pretrained.pth"), "-p", "probe", "-n", "pre"]) == 0
    train("904", "3d_fullres", "all", plan="probe-pre")
    model = trained.solid.model.with_name(f"{TRAINER}__probe-pre__3d_fullres")
    loaded = load_classifier(model, "all").classifier.backbone.network.state_dict()
    encoder = [key for key in weights if key.startswith("encoder.")]
    assert encoder and all(torch.equal(loaded[key], weights[key]) for key in encoder)


@pytest.mark.parametrize(("which", "target"), [("flat", BLOB), ("solid", LESION)])
def test_the_folds_are_pooled_by_the_command(trained, which, target, capsys):
    which = getattr(trained, which)
    assert (
        main(
            ["evaluate", "classification", "-d", which.number, "-p", "small", "-c", which.configuration, "-f", "0", "1"]
        )
        == 0
    )
    assert f"{target.name}, {CASES} cases of {CASES // PER_SUBJECT} subjects" in capsys.readouterr().out
    several = f"_{target.name}" if len(which.labels.targets) > 1 else ""
    output = which.model / "crossval_results_folds_0_1"
    summary = read_json(output / f"summary{several}.json")
    assert summary["cases"] == CASES and summary["intervals"]["auroc"][0] <= summary["auroc"]
    assert (output / f"roc{several}.png").stat().st_size > 0


@pytest.mark.parametrize(("which", "targets"), [("flat", (BLOB,)), ("solid", (LESION, SIGNS))])
def test_new_images_get_the_probabilities_that_validation_gave_them(trained, which, targets, tmp_path):
    which = getattr(trained, which)
    pictures = ["--explain", str(tmp_path / "pictures")] if which is trained.flat else []
    for fold in range(FOLDS):
        images = tmp_path / f"images_{fold}"
        images.mkdir()
        held_out = read_json(which.preprocessed / "splits_final.json")[fold]["val"]
        for case in held_out[:3]:
            (file,) = (which.raw / "imagesTr").glob(f"{case}_0000*")
            (images / file.name).symlink_to(file)
        table = tmp_path / f"predictions_of_{fold}.csv"
        assert (
            main(
                [
                    "classify",
                    "-i",
                    str(images),
                    "-o",
                    str(table),
                    "-m",
                    str(which.model),
                    "-f",
                    str(fold),
                    "-seg",
                    str(which.raw / "labelsTr"),
                    *pictures,
                ]
            )
            == 0
        )
        for target in targets:
            several = f"_{target.name}" if len(targets) > 1 else ""
            with table.with_stem(table.stem + several).open(newline="") as stream:
                found = {row["case"]: row for row in csv.DictReader(stream)}
            expected = {row["case"]: row for row in rows_of(which, target, fold)}
            assert sorted(found) == sorted(held_out[:3])
            for case, row in found.items():
                for name in target.classes:
                    assert float(row[f"p_{name}"]) == pytest.approx(float(expected[case][f"p_{name}"]), abs=1e-4)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == (2 * 3 if pictures else 0)
