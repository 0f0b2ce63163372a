"""Model cards: read by Hugging Face's own parser, true to the provenance, and silent on what it does not say."""

import math
import re

import pytest
import torch
from fake_dataset import fake_plan
from huggingface_hub import ModelCard

from nnssl_plugin.checkpoints.format.provenance import describe_pretraining
from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray
from nnssl_plugin.checkpoints.sharing.model_card import LICENCES, USAGE, model_card, read_results
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.registry import METHODS

SECTIONS = [
    "Model Details",
    "Uses",
    "Bias, Risks, and Limitations",
    "How to Get Started with the Model",
    "Training Details",
    "Evaluation",
    "Citation",
]
"""The sections of Hugging Face's template that we have something to say in, in its order."""
SUMMARY = {
    "foreground_mean": {"Dice": 0.75, "IoU": 0.6},
    "mean": {"1": {"Dice": 0.8, "IoU": 0.7}, "(1, 2)": {"Dice": math.nan, "IoU": math.nan}},
    "metric_per_case": [{"prediction_file": "/srv/Doe_Jane.nii.gz", "metrics": {}}],
}


def provenance(**changes):
    described = describe_pretraining(
        method="toy",
        settings={"widths": (4, 8), "table": "a|b"},
        training={"epochs": 3},
        plans=fake_plan(),
        configuration="3d_fullres",
        dataset_json={"channel_names": {"0": "CT"}},
        trained=["encoder."],
        steps=1234,
        cases=7,
        citations=["Doe, J.: A toy. 2020."],
        licence="not stated",
    )
    return described | changes


def card(layout="safetensors", results=(), papers=None, weights=None, **changes):
    return model_card(
        provenance(**changes),
        layout=layout,
        weights=weights or {"w": torch.ones(2, 3)},
        sha256="abc123",
        results=results,
        papers=papers,
    )


def front_matter(text):
    return ModelCard(text).data.to_dict()


def test_the_hub_reads_the_front_matter():
    data = front_matter(card(licence="CC-BY-4.0"))
    assert data["license"] == "cc-by-4.0" and data["library_name"] == "nnssl_plugin"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert {"self-supervised-learning", "toy", "computed-tomography"} <= set(data["tags"])


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("not stated", {"license": "unknown"}),
        ("MIT", {"license": "mit"}),
        ('our: "own" terms #1', {"license": "other", "license_name": 'our: "own" terms #1'}),
    ],
)
def test_a_licence_is_said_as_the_hub_knows_it(licence, expected):
    data = front_matter(card(licence=licence))
    assert {key: data.get(key) for key in ("license", "license_name")} == {"license_name": None} | expected


def test_known_licences_are_in_the_hubs_spelling():
    assert all(licence == licence.lower() for licence in LICENCES)


@pytest.mark.parametrize("layout", USAGE)
def test_it_has_the_sections_of_the_template_in_their_order(layout):
    text = card(layout)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert "More Information Needed" not in text and "{" not in USAGE[layout].format(method="x", configuration="y")


def test_it_says_what_the_provenance_says():
    text = card()
    for said in (
        "Optimiser steps: 1,234.",
        "7 cases",
        "channels CT",
        "spacing 1 × 1 × 1 mm",
        "ZScoreNormalization",
        "patches of 16 × 16 × 16 voxels",
        "orientation RAS",
        "`encoder.`",
        "abc123",
        "6 parameters",
        "nnssl_plugin adapt -d TARGET_ID",
        "Doe, J.: A toy. 2020.",
        "not a medical device",
    ):
        assert said in text, said
    assert "| `method.widths` | [4, 8] |" in text and "| `method.table` | a\\|b |" in text


def test_shared_memory_counts_once():
    weight = torch.ones(10)
    assert "10 parameters" in card(weights={"a": weight, "b": weight})


def test_bibtex_is_well_formed_and_has_nnunet():
    text = card(citations=["A. 2020.", "B. 2021."])
    block = re.search(r"```bibtex\n(.*?)```", text, re.DOTALL)[1]
    assert block.count("{") == block.count("}")
    assert re.findall(r"@\w+\{([^,]+),", block) == ["toy", "toy2", "isensee2021nnunet"]


def test_the_weights_that_it_started_from_are_named_and_cited():
    first = {
        "method": "older",
        "licence": "CC-BY-NC-4.0",
        "weights_sha256": "fed987",
        "citations": ["B. 2019."],
        "continued_from": {"kind": "nnunet", "citations": ["C. 2018."]},
    }
    text = card(citations=["A. 2020."], continued_from=first)
    assert "older, licence CC-BY-NC-4.0, weights `fed987`" in text
    assert text.endswith("- A. 2020.\n- B. 2019.\n- C. 2018.\n")


def test_a_teacher_is_named_with_its_licence_and_cited():
    teacher = {"method": "mae", "licence": "CC-BY-SA-4.0", "weights_sha256": "ab12", "citations": ["T. 2026."]}
    text = card(citations=["A. 2020."], teacher=teacher | {"continued_from": {"citations": ["D. 2015."]}})
    assert "- **Distilled from model:** mae, licence CC-BY-SA-4.0, weights `ab12`" in text
    assert text.index("A. 2020.") < text.index("T. 2026.") < text.index("D. 2015.")


def test_a_known_paper_has_an_entry_of_fields():
    method = next(iter(METHODS))
    text = card(method=method, papers={method: METHODS[method].paper})
    block = re.search(r"```bibtex\n(.*?)```", text, re.DOTALL)[1]
    assert f"title = {{{{{METHODS[method].paper.title}}}}}" in block
    assert " and ".join(METHODS[method].paper.authors) in block


@pytest.mark.parametrize(
    "field", ["method", "licence", "channels", "citations", "reader", "network", "training", "date"]
)
def test_what_the_file_says_is_shown_as_text(field):
    evil = "x<script>alert(1)</script>\n```\n# A|b\x1b[2J\u202e [click](js:x) ![i](http://e/p)\n---\nlicense: mit"
    values = {
        "channels": [evil],
        "citations": [evil],
        "network": {"class": f"a.{evil}", "kwargs": {}},
        "training": {evil: evil, "list": [evil]},
    }
    text = card(**{field: values.get(field, evil)}, **({} if field == "licence" else {"licence": "MIT"}))
    body = text.split("\n---\n", 1)[1]
    prose = re.sub(r"```bibtex\n.*?\n```", "", body, flags=re.DOTALL)
    assert "<script" not in prose and not re.search(r"(?<!\\\\)\[(click|i)\]", prose)
    assert "\x1b" not in text and "\u202e" not in text
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS and text.count("```") % 2 == 0
    data = front_matter(text)
    assert data["license"] == ("other" if field == "licence" else "mit")


def test_the_command_is_one_command_whatever_the_method_is_called():
    assert "-n rm--rf-x\n" in card(method="$(rm -rf ~); x`")


@pytest.mark.parametrize("field", ["method", "steps", "spacing_mm", "citations"])
def test_a_provenance_without_a_field_is_named(field):
    with pytest.raises(UserError, match=f"does not state {field}"):
        card(**{field: None})


def test_the_end_of_the_training_is_said():
    text = model_card(
        provenance(),
        layout="safetensors",
        weights={"w": torch.ones(2)},
        sha256="a",
        health={"feature_std": 0.91234, "skipped_steps": 3.0},
    )
    assert "At the end of the pretraining: feature_std 0.9123, skipped_steps 3." in text


def test_what_was_learned_beside_the_weights_is_named():
    array = SpatialArray(torch.zeros(2, 4, 5, 6), ("T1", "<b>"), (3.0, 1.0, 1.0), ("IS", "PA", "LR"), ("noNorm",) * 2)
    weights = {"w": torch.ones(2)}
    text = model_card(provenance(), layout="safetensors", weights=weights, sha256="a", arrays={"templates": array})
    assert "- **Beside the weights:** templates of T1, &lt;b&gt;: 4 × 5 × 6 voxels of 3.0 × 1.0 × 1.0 mm" in text
    assert "Beside the weights" not in card()


def test_results_are_means_without_cases(tmp_path):
    fold = tmp_path / "Doe_Jane" / "Dataset007_X" / "T__P__3d_fullres" / "fold_0" / "validation"
    write_json(fold / "summary.json", SUMMARY)
    text = card(results=[read_results(str(fold / "summary.json")), read_results(f"test set={fold / 'summary.json'}")])
    assert "| Dataset007_X, T__P__3d_fullres, fold_0 | 0.7500 | 0.6000 | 0.8000 |  |" in text
    assert "| test set | 0.7500 |" in text
    assert "Doe_Jane" not in text and "No results" not in text


def test_without_results_it_says_so():
    assert "No results were given with these weights." in card()


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "no json", '{"foreground_mean": {}, "mean": {}}', '{"foreground_mean": {"Dice": "high"}, "mean": {}}'],
)
def test_what_is_no_summary_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json is not (a summary|valid JSON)"):
        read_results(str(tmp_path / "x.json"))


def test_a_missing_summary_is_named(tmp_path):
    with pytest.raises(UserError, match="There is no summary"):
        read_results(str(tmp_path / "x.json"))
