"""Checks of a plan's ``pretraining``, ``finetuning`` and ``classification`` blocks against what their trainers read."""

import pydoc
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning import settings as finetuning
from nnssl_plugin.pretraining import settings as pretraining
from nnssl_plugin.pretraining.initial_weights import take_weights_entry
from nnssl_plugin.registry import METHODS, TASKS
from nnssl_plugin.settings import closest
from nnssl_plugin.tasks.classification import settings as classification


def check_blocks(plans: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Refuse a block that differs from that of ``source`` and that its trainer would not read.

    Raises:
        UserError: for a setting that does not exist, or a value that it does not take.
    """
    known = _names(plans)
    if plans.get(pretraining.BLOCK) != source.get(pretraining.BLOCK):
        _check_pretraining(plans, known)
    if plans.get(finetuning.BLOCK) != source.get(finetuning.BLOCK):
        finetuning.settings_of(plans, elsewhere=known)
        _check_finetuning_method(plans, known)
    if plans.get(classification.BLOCK) != source.get(classification.BLOCK):
        classification.read_classification(plans, elsewhere=known)


def _check_pretraining(plans: Mapping[str, Any], known: list[str]) -> None:
    pretraining.read_training_settings(plans, pretraining.TrainingSettings(), elsewhere=known)
    block = plans[pretraining.BLOCK]
    take_weights_entry(dict(block))
    method = block.get(pretraining.METHOD_NAME)
    if method is None:
        method = _likeliest_method(block.get(pretraining.METHOD, {}))
    if method in METHODS:
        entry = METHODS[method]
        pretraining.read_settings(plans, method, _located(entry.training), _located(entry.settings)(), elsewhere=known)
    elif method is not None:
        _check_name(method)


def _check_finetuning_method(plans: Mapping[str, Any], known: list[str]) -> None:
    """By the trainer that knows most of the names of the ``method`` part."""
    given = plans.get(finetuning.BLOCK, {}).get(finetuning.METHOD)
    if given is not None:
        names = given if isinstance(given, Mapping) else ()
        settings = max(_finetuning_methods(), key=lambda each: sum(name in _fields(each) for name in names))
        finetuning.method_settings_of(plans, settings(), elsewhere=known)


def _finetuning_methods() -> list[Any]:
    return [_located(dotted) for dotted in dict.fromkeys(task.settings for task in TASKS.values() if task.settings)]


def _likeliest_method(block: Any) -> str | None:
    """The method that knows most of the names of a ``method`` part, or names like them; none for an empty part."""
    if not block:
        return None
    known = {method: _fields(_located(METHODS[method].settings)) for method in METHODS}
    return max(
        METHODS,
        key=lambda method: (
            sum(name in known[method] for name in block),
            sum(closest(name, known[method]) is not None for name in block),
        ),
    )


def _check_name(method: Any) -> None:
    """Refuse what looks like a slip; a method of someone's own is checked when its trainer starts."""
    close = closest(method, METHODS) if isinstance(method, str) else None
    if close is not None or not isinstance(method, str):
        raise UserError(
            f"'{pretraining.METHOD_NAME}' of the pretraining block is {method!r}, which names no method"
            + (f"; did you mean '{close}'?" if close else "."),
            f"Known methods: {', '.join(METHODS)}.",
        )


def _names(plans: Mapping[str, Any]) -> list[str]:
    """Everything that ``--set`` takes for a plan, with what stands before it."""
    configuration = next(iter(plans["configurations"]), "")
    return [
        *_fields(pretraining.TrainingSettings),
        *pretraining.OTHERS,
        *(f"method.{name}" for method in METHODS.values() for name in _fields(_located(method.settings))),
        *(f"configurations.{configuration}.{name}" for name in plans["configurations"].get(configuration, {})),
        *(f"finetuning.{name}" for name in _fields(finetuning.FinetuningSettings)),
        *(f"finetuning.{finetuning.METHOD}.{name}" for each in _finetuning_methods() for name in _fields(each)),
        *(f"classification.{name}" for name in _fields(classification.ClassificationSettings)),
    ]


def _fields(settings: Any) -> list[str]:
    return [field.name for field in fields(settings)]


def _located(dotted: str) -> Any:
    return pydoc.locate(dotted)
