"""What a pretraining checkpoint says of the run that wrote it."""

from dataclasses import asdict
from typing import Any

from nnssl_plugin.checkpoints.format.provenance import describe_pretraining, nnssl_adaptation_plan, nnssl_citations


def describe_run(trainer) -> dict[str, Any]:
    """The ``provenance`` of a ``Pretrainer``'s checkpoint; with sources, ``data`` and ``licence`` are lists."""
    backbone, origin = trainer.task.backbone, trainer.continued_from or {}
    datasets = [each.describe(cases) for each, cases in zip(trainer.datasets, trainer.cases_of_datasets, strict=True)]
    described = describe_pretraining(
        method=trainer.method,
        settings=asdict(trainer.method_settings),
        training=asdict(trainer.training_settings),
        plans=trainer.plans_manager.plans,
        configuration=trainer.configuration_name,
        dataset_json=trainer.dataset_json,
        network_channels=backbone.input_channels,
        trained=list(dict.fromkeys([*backbone.trained_prefixes(), *origin.get("trained", ())])),
        steps=trainer.step,
        cases=trainer.training_cases,
        citations=list(trainer.citations),
        licence=datasets[0]["licence"],
        weights=backbone.network.state_dict(),
    )
    if trainer.training_settings.sources:
        described |= {"data": datasets, "licence": list(dict.fromkeys(each["licence"] for each in datasets))}
    return described | ({"continued_from": origin} if origin else {})


def describe_weights(trainer) -> dict[str, Any]:
    """What nnssl's readers look for in the checkpoint of a ``Pretrainer``."""
    backbone = trainer.task.backbone
    return {
        "nnssl_adaptation_plan": nnssl_adaptation_plan(
            trainer.plans_manager.plans,
            trainer.configuration_name,
            network=backbone.network,
            input_channels=backbone.input_channels,
        ),
        "citations": nnssl_citations(trainer.method, trainer.citations),
    }
