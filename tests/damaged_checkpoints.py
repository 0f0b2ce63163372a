"""Checkpoints in which one field holds something else, for every command that reads them."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from fake_dataset import fake_plan

from nnssl_plugin.checkpoints.format.provenance import describe_pretraining, nnssl_adaptation_plan
from nnssl_plugin.nnunet.plans import build_network

DATASET_JSON = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "body": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def bad_values() -> list[Any]:
    """Of wrong types, absurd sizes, and shapes that nothing should follow."""
    return [
        None,
        True,
        -1,
        0,
        10**30,
        float("nan"),
        float("inf"),
        "text",
        "",
        "\x1b[2Jos.system",
        [],
        ["a", 1],
        [[[]]],
        {},
        {"a": 1},
        {1: 2},
        nested(100),
        torch.zeros(2),
    ]


def own_checkpoint() -> dict[str, Any]:
    """What this package's pretraining writes."""
    plans = fake_plan() | {"pretraining": {"epochs": 1}}
    torch.manual_seed(0)
    network = build_network(plans, "3d_fullres", DATASET_JSON)
    provenance = describe_pretraining(
        method="toy",
        settings={"widths": [4, 8]},
        training={"epochs": 3},
        plans=plans,
        configuration="3d_fullres",
        dataset_json=DATASET_JSON,
        trained=["encoder.", "decoder.encoder."],
        steps=12,
        cases=2,
        citations=["Doe, J.: A toy. 2020."],
        licence="CC-BY-4.0",
        weights=network.state_dict(),
    )
    return {
        "network_weights": network.state_dict(),
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": "all", "dataset_json": DATASET_JSON},
        "provenance": provenance | {"continued_from": {"method": "older", "citations": ["B. 2019."]}},
        "nnssl_adaptation_plan": nnssl_adaptation_plan(plans, "3d_fullres", network, 1),
        "citations": [{"type": "Pretraining", "name": "toy", "apa_citations": ["Doe, J.: A toy. 2020."]}],
        "trainer_name": "ToyTrainer",
        "current_epoch": 3,
        "inference_allowed_mirroring_axes": None,
        "logging": {"train_losses": [1.0, 0.5], "skipped_steps": [0.0, 1.0]},
        "ssl_state": {"step": 3, "teacher": {"w": torch.ones(2)}},
    }


def nnunet_checkpoint() -> dict[str, Any]:
    """What nnU-Net writes."""
    kept = ("network_weights", "init_args", "trainer_name", "current_epoch", "inference_allowed_mirroring_axes")
    content = own_checkpoint()
    return {name: content[name] for name in (*kept, "logging")}


def nnssl_checkpoint() -> dict[str, Any]:
    """What MIC-DKFZ/nnssl writes."""
    content = own_checkpoint()
    return {name: content[name] for name in ("network_weights", "nnssl_adaptation_plan", "citations", "trainer_name")}


WRITERS = {"own": own_checkpoint, "nnunet": nnunet_checkpoint, "nnssl": nnssl_checkpoint}


def places(value: Any, under: tuple = ()) -> Iterator[tuple]:
    """Every place in nested blocks, a tensor's as one; of the weights the first alone."""
    if under:
        yield under
    if not isinstance(value, dict):
        return
    for key in [*value][:1] if under == ("network_weights",) else [*value]:
        yield from places(value[key], (*under, key))


def with_value(content: dict[str, Any], place: tuple, value: Any) -> dict[str, Any]:
    """A copy with another value at a place."""
    changed = deepcopy(content)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed
