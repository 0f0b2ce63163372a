"""``nnssl_plugin plan``: edits of a plan under a new name."""

import os
from copy import deepcopy
from pathlib import Path

import pytest
from fake_dataset import NAME, fake_plan, write_fake_dataset
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from small_primus import with_primus

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plan_edits import check_plan, edit_plan, parse_assignment, read_preset, write_edited_plan

DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}
FEATURES = "configurations.3d_fullres.architecture.arch_kwargs.features_per_stage"


@pytest.fixture
def folder(nnunet_environment) -> Path:
    write_fake_dataset(cases=1, pretraining={"epochs": 3, "method": {"epsilon": 0.05, "mass": 0.9}})
    return Path(os.environ["nnUNet_preprocessed"], NAME)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("epochs=50", ("pretraining", "epochs"), 50),
        ("method.epsilon=0.1", ("pretraining", "method", "epsilon"), 0.1),
        ("method.corruption=mask", ("pretraining", "method", "corruption"), "mask"),
        ("batch_size=null", ("pretraining", "batch_size"), None),
        ("finetuning.epochs=5", ("finetuning", "epochs"), 5),
        ("finetuning.method.consistency=0.2", ("finetuning", "method", "consistency"), 0.2),
        ("pretraining.seed=1", ("pretraining", "seed"), 1),
        ("configurations.2d.patch_size=[8,8]", ("configurations", "2d", "patch_size"), [8, 8]),
        ("name=a=b", ("pretraining", "name"), "a=b"),
    ],
)
def test_assignments_are_parsed(text, path, value):
    assert parse_assignment(text) == (path, value)


@pytest.mark.parametrize("text", ["epochs", "=3", "method..epsilon=1", ".=1"])
def test_what_is_no_assignment_is_refused(text):
    with pytest.raises(UserError, match="key=value"):
        parse_assignment(text)


def test_a_plan_of_the_new_name_is_written_and_every_change_printed(folder, capsys):
    source = read_json(folder / "nnUNetPlans.json")
    assert (
        main(
            [
                "plan",
                "-d",
                "901",
                "-n",
                "short",
                "--set",
                "epochs=50",
                "method.epsilon=0.1",
                "lr=0.01",
                "--set",
                f"{FEATURES}=[4,8,8]",
                "configurations.3d_fullres.batch_size=2",
            ]
        )
        == 0
    )
    plan = read_json(folder / "short.json")
    assert plan["plans_name"] == "short" and read_json(folder / "nnUNetPlans.json") == source
    assert plan["pretraining"] == {"epochs": 50, "lr": 0.01, "method": {"epsilon": 0.1, "mass": 0.9}}
    kwargs = PlansManager(plan).get_configuration("3d_fullres").network_arch_init_kwargs
    assert kwargs["features_per_stage"] == [4, 8, 8]
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed[:-1]) == sorted(
        [
            "pretraining.epochs: 3 → 50",
            "pretraining.method.epsilon: 0.05 → 0.1",
            "pretraining.lr: not set → 0.01",
            f"{FEATURES}: [4, 8, 16] → [4, 8, 8]",
        ]
    )
    assert printed[-1] == f"wrote {folder / 'short.json'}"


def test_a_preset_is_merged_before_the_assignments(folder):
    preset = read_preset("med3dinsight")["pretraining"]
    write_edited_plan("901", "recipe", presets=["med3dinsight"], assignments=["epochs=2"])
    block = read_json(folder / "recipe.json")["pretraining"]
    assert block == {**preset, "epochs": 2, "method": {**preset["method"]}}
    with pytest.raises(UserError, match="no preset 'gone'") as error:
        write_edited_plan("901", "other", presets=["gone"])
    assert "med3dinsight" in error.value.remedy


@pytest.mark.parametrize("size", ["s", "b", "m", "l"])
def test_a_network_preset_fits_the_patch_and_goes_together_with_a_methods(folder, size):
    from dynamic_network_architectures.architectures import primus

    plan = fake_plan()
    plan["configurations"]["3d_fullres"]["patch_size"] = [20, 30, 44]  # 20 is as near to 16 as to 24
    write_json(folder / "nnUNetPlans.json", plan)
    assert main(["plan", "-d", "901", "-n", "primus", "--preset", f"primus-{size}", "med3dinsight"]) == 0
    written = read_json(folder / "primus.json")
    configuration = written["configurations"]["3d_fullres"]
    kwargs = configuration["architecture"]["arch_kwargs"]
    assert configuration["patch_size"] == kwargs["input_shape"] == [16, 32, 40]
    published = primus._PRIMUS_CONFIGS[size.upper()]
    assert {key: kwargs[key] for key in published} == published
    assert written["pretraining"]["method"] == read_preset("med3dinsight")["pretraining"]["method"]


@pytest.mark.parametrize(("dimensions", "patch"), [(3, [4, 16, 16]), (2, [16, 16])])
def test_a_preset_may_have_a_network_for_2d_and_one_for_3d(folder, dimensions, patch):
    write_json(folder / "nnUNetPlans.json", fake_plan(dimensions=dimensions))
    write_edited_plan("901", "vit", presets=["patch-vit-t"])
    (configuration,) = read_json(folder / "vit.json")["configurations"].values()
    assert configuration["architecture"]["arch_kwargs"]["patch_size"] == patch
    assert all(size % edge == 0 for size, edge in zip(configuration["patch_size"], patch, strict=True))


def test_a_network_preset_needs_a_3d_configuration(folder):
    write_json(folder / "nnUNetPlans.json", fake_plan(dimensions=2))
    with pytest.raises(UserError, match="no 3D configuration"):
        write_edited_plan("901", "primus", presets=["primus-s"])


def test_a_patch_that_the_network_was_not_built_for_is_refused(folder):
    plan = with_primus(fake_plan())
    write_json(folder / "nnUNetPlans.json", plan)
    with pytest.raises(UserError, match=r"built for patches of \[16, 16, 16\], .* is \[16, 16, 32\]") as error:
        write_edited_plan("901", "long", assignments=["configurations.3d_fullres.patch_size=[16,16,32]"])
    assignments = error.value.remedy.removeprefix("--set ").split()
    write_edited_plan("901", "long", assignments=assignments)
    with pytest.raises(UserError, match=r"not divisible by the network's strides \[4, 4, 4\]|cannot be built"):
        write_edited_plan("901", "odd", assignments=[text.replace("32]", "18]") for text in assignments])


@pytest.mark.parametrize(
    ("assignment", "remedy"),
    [
        ("configurations.3d_fullres.batchsize=2", "Did you mean 'batch_size'?"),
        ("configurations.3d_fullres.architecture.arch_kwargs.feature_per_stage=[1]", "features_per_stage"),
        ("configurations.2d.batch_size=2", "nnUNetv2_plan_and_preprocess -d 901 -c 2d"),
        ("configurations.3d_fullres.batch_size.x=2", "There are: none"),
        ("configurations.3d_fullres=2", "For example"),
    ],
)
def test_a_typo_inside_configurations_is_refused(folder, assignment, remedy):
    with pytest.raises(UserError) as error:
        write_edited_plan("901", "typo", assignments=[assignment])
    assert remedy in error.value.remedy and not (folder / "typo.json").exists()


def test_inherited_values_are_changed_in_the_heir_alone():
    plans = fake_plan()
    plans["configurations"]["small"] = {"inherits_from": "3d_fullres"}
    before = deepcopy(plans)
    edited, changes = edit_plan(
        plans, "new", [parse_assignment("configurations.small.architecture.arch_kwargs.features_per_stage=[2,4,8]")]
    )
    assert plans == before and edited["configurations"]["3d_fullres"] == before["configurations"]["3d_fullres"]
    kwargs = PlansManager(edited).get_configuration("small").network_arch_init_kwargs
    assert kwargs["features_per_stage"] == [2, 4, 8] and kwargs["n_stages"] == 3
    assert changes


def test_a_value_is_not_silently_replaced_by_a_block():
    plans = fake_plan(pretraining={"epochs": 3})
    with pytest.raises(UserError, match=r"'pretraining\.epochs' is a value"):
        edit_plan(plans, "new", [parse_assignment("epochs.x=1")])


def test_a_patch_that_the_strides_do_not_divide_is_refused():
    edited, _ = edit_plan(fake_plan(), "new", [parse_assignment("configurations.3d_fullres.patch_size=[16,18,16]")])
    with pytest.raises(UserError, match=r"\[16, 18, 16\] .* not divisible by .*\[4, 4, 4\]") as error:
        check_plan(edited, fake_plan(), DATASET_JSON)
    assert "patch_size=[16,16,16]" in error.value.remedy


@pytest.mark.parametrize(
    "assignment",
    [
        f"{FEATURES}=[4,8]",
        "configurations.3d_fullres.architecture.arch_kwargs.n_stages=7",
    ],
)
def test_a_network_that_cannot_be_built_is_refused(assignment):
    edited, _ = edit_plan(fake_plan(), "new", [parse_assignment(assignment)])
    with pytest.raises(UserError, match="cannot be built"):
        check_plan(edited, fake_plan(), DATASET_JSON)


def test_a_network_of_an_unknown_class_is_not_looked_up():
    name = "configurations.3d_fullres.architecture.network_class_name=no.such.Network"
    edited, _ = edit_plan(fake_plan(), "new", [parse_assignment(name)])
    with pytest.raises(UserError, match=r"names no\.such\.Network") as error:
        check_plan(edited, fake_plan(), DATASET_JSON)
    assert "--trust" in error.value.remedy


def test_other_data_needs_another_identifier_and_preprocessing(folder, capsys):
    spacing = "configurations.3d_fullres.spacing=[2,2,2]"
    assert main(["plan", "-d", "901", "-n", "coarse", "--set", spacing]) == 2
    said = capsys.readouterr().err
    assert "spacing of 3d_fullres changed" in said and "data_identifier=coarse_3d_fullres" in said
    assert (
        main(
            [
                "plan",
                "-d",
                "901",
                "-n",
                "coarse",
                "--set",
                spacing,
                "configurations.3d_fullres.data_identifier=coarse_3d_fullres",
            ]
        )
        == 0
    )
    assert "nnUNetv2_preprocess -d 901 -plans_name coarse -c 3d_fullres" in capsys.readouterr().out


def test_an_existing_plan_is_kept_unless_asked(folder):
    write_edited_plan("901", "short", assignments=["epochs=50"])
    write_edited_plan("901", "short", assignments=["epochs=50"])
    with pytest.raises(UserError, match="exists and says something else"):
        write_edited_plan("901", "short", assignments=["epochs=51"])
    write_edited_plan("901", "short", assignments=["epochs=51"], overwrite=True)
    assert read_json(folder / "short.json")["pretraining"]["epochs"] == 51


@pytest.mark.parametrize("name", ["nnUNetPlans", "a__b", "dataset", "splits_final", "a/b", ""])
def test_bad_names_are_refused(folder, name):
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    with pytest.raises(UserError):
        write_edited_plan("901", name, overwrite=True)
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == before


def test_a_damaged_plan_is_named(folder):
    (folder / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json is not valid JSON"):
        write_edited_plan("901", "new", source="broken")
    write_json(folder / "fine.json", {})


FULLRES = "configurations.3d_fullres"
MISTAKES = [
    ("epoch=3", "did you mean 'epochs'?"),
    ("epochs=three", "a whole number from 1"),
    ("epochs=true", "a whole number from 1"),
    ("epochs=0", "a whole number from 1"),
    ("lr=NaN", "a number above 0"),
    ("method.epsilonn=1", "did you mean 'method.epsilon'?"),
    ("epsilon=1", "did you mean 'method.epsilon'?"),
    ("method.epochs=1", "did you mean 'epochs'?"),
    ("method.mass=2", "a number in (0, 1]"),
    ("method=fast", "expected a block of settings"),
    ("pretraining=3", "expected a block of settings"),
    ("weights=3", "a file name or null"),
    ("method_name=med3dinsigt", "did you mean 'med3dinsight'?"),
    ("method_name=3", "names no method"),
    ("method_name=s2dc", "Unknown setting 'epsilon'"),
    ("patch_size=32,40,32", f"did you mean '{FULLRES}.patch_size'?"),
    ("finetuning.epoch=3", "did you mean 'finetuning.epochs'?"),
    ("finetuning.lr=fast", "a number above 0 or null"),
    ("finetuning.trains=encoder", "one of all, decoder, head"),
    ("finetuning=3", "expected a block of settings"),
    ("finetuning.method.consistence=1", "did you mean 'finetuning.method.consistency'?"),
    ("finetuning.method.most_replaced=-1", "a whole number from 0"),
    ("finetuning.method=3", "expected a block of settings"),
    ("classification.target=[]", "did you mean 'classification.targets'?"),
    ("classification.targets=grade", 'classification.targets=["grade"]'),
    (f"{FULLRES}.patch_size=16,16,16", f"--set '{FULLRES}.patch_size=[16,16,16]'"),
    (f"{FULLRES}.patch_size=[16,16]", "a list of 3, each a whole number from 1"),
    (f"{FULLRES}.patch_size=[16,16,16.5]", "a list of 3, each a whole number from 1"),
    (f"{FULLRES}.patch_size=16", "a list of 3, each a whole number from 1"),
    (f"{FULLRES}.patch_size=null", "a list of 3, each a whole number from 1"),
    (f"{FULLRES}.batch_size=two", "a whole number from 1"),
    (f"{FULLRES}.batch_size=2.5", "a whole number from 1"),
    (f"{FULLRES}.spacing=1,1,-1", "each a number above 0"),
    (f"{FULLRES}.normalization_schemes=ZScoreNormalization", '["ZScoreNormalization"]'),
    (f"{FEATURES}=4,8,8", f"--set '{FEATURES}=[4,8,8]'"),
    (f"{FULLRES}.architecture.arch_kwargs.n_stages=three", "a value like 3"),
    (f"{FULLRES}.architecture.network_class_name=3", "a value like"),
    (f"{FULLRES}.architecture=3", "a block of values"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES)
def test_slips_in_every_block_are_refused_before_anything_is_written(folder, capsys, text, said):
    assert main(["plan", "-d", "901", "-n", "slip", "--set", text]) == 2
    assert said in capsys.readouterr().err and not (folder / "slip.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "warmup_epochs=2",
        "batch_size=null",
        "weights=checkpoint.pth",
        "method_name=med3dinsight",
        "method.mask_ratio=0.5",
        "finetuning.epochs=5",
        'classification.targets=["grade"]',
        f"{FULLRES}.architecture.arch_kwargs.features_per_stage=[4,8,8]",
        f"{FULLRES}.architecture.arch_kwargs.n_conv_per_stage=1",
        f"{FULLRES}.architecture.arch_kwargs.conv_bias=false",
    ],
)
def test_what_the_trainers_read_is_written(folder, capsys, text):
    assert main(["plan", "-d", "901", "-n", "fine", "--set", text]) == 0, capsys.readouterr().err


def test_a_method_of_ones_own_is_left_to_its_trainer(folder):
    plan = read_json(folder / "nnUNetPlans.json") | {"pretraining": {}}
    write_json(folder / "nnUNetPlans.json", plan)
    arguments = ["plan", "-d", "901", "-n", "own", "--set", "method.temperature_of_mine=1"]
    assert main(arguments) == 2
    assert main([*arguments, "method_name=toy"]) == 0
    assert read_json(folder / "own.json")["pretraining"]["method_name"] == "toy"


def test_the_names_of_the_presets_method_are_checked(folder, capsys):
    write_json(folder / "nnUNetPlans.json", fake_plan())
    assert main(["plan", "-d", "901", "-n", "s2dc", "--preset", "s2dc"]) == 0
    assert read_json(folder / "s2dc.json")["pretraining"]["method_name"] == "s2dc"
    assert main(["plan", "-d", "901", "-n", "slip", "-p", "s2dc", "--set", "method.mass=0.5"]) == 2
    assert "Unknown setting 'mass'" in capsys.readouterr().err
    assert main(["plan", "-d", "901", "-n", "fine", "-p", "s2dc", "--set", "method.momentum=0.99"]) == 0


@pytest.mark.parametrize("preset", ["med3dinsight", "s2dc"])
def test_presets_of_two_methods_do_not_mix(folder, capsys, preset):
    write_json(folder / "nnUNetPlans.json", fake_plan())
    assert main(["plan", "-d", "901", "-n", "both", "--preset", "s2dc", "med3dinsight"]) == 2
    said = capsys.readouterr().err
    assert "preset s2dc (s2dc)" in said and "preset med3dinsight (med3dinsight)" in said
    assert main(["plan", "-d", "901", "-n", "first", "--preset", preset]) == 0
    other = {"med3dinsight": "s2dc", "s2dc": "med3dinsight"}[preset]
    assert main(["plan", "-d", "901", "-n", "second", "-p", "first", "--preset", other]) == 2
    assert f"plan first ({preset}), preset {other} ({other})" in capsys.readouterr().err
    assert main(["plan", "-d", "901", "-n", "again", "-p", "first", "--preset", f"{preset}-paper"]) == 0


def test_a_block_from_before_is_left_alone(folder):
    plan = read_json(folder / "nnUNetPlans.json") | {"pretraining": {"setting_of_old": 1}}
    write_json(folder / "nnUNetPlans.json", plan)
    assert main(["plan", "-d", "901", "-n", "fine", "--set", "finetuning.epochs=5"]) == 0
    assert main(["plan", "-d", "901", "-n", "other", "--set", "epochs=5"]) == 2
