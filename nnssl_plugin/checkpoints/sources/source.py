"""Weights from whatever file they come in: who wrote it is recognised by its content, and said in plain types.

Nothing is built and no code of a file runs; the names of classes stay text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl_plugin.checkpoints.format.files import is_safetensors, read_checkpoint, read_safetensors
from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray, spatial_arrays_of
from nnssl_plugin.checkpoints.sources.description import (
    ENTRIES,
    check_fields,
    check_plan,
    check_provenance,
    plain,
    unreadable,
)
from nnssl_plugin.checkpoints.sources.description import NNSSL as NNSSL_FIELDS
from nnssl_plugin.checkpoints.sources.layouts import (
    UNUSABLE,
    first_layer_channels,
    keys_of_network,
    network_of_plan,
    nnunet_network,
    nnunet_plan_of,
    nnunet_provenance,
    plan_of_adapted,
)
from nnssl_plugin.checkpoints.sources.mappings import read_mapping
from nnssl_plugin.checkpoints.sources.nnssl_layout import (
    in_names_of,
    nnssl_network,
    nnssl_provenance,
    with_nnssl_block,
)
from nnssl_plugin.checkpoints.sources.state_dicts import (
    find_state_dict,
    is_state_dict,
    refuse_version_1,
    the_network,
    without_wrapping,
)
from nnssl_plugin.errors import UserError

OWN, NNUNET, NNSSL, PLAIN, SAFETENSORS = "nnssl_plugin", "nnunet", "nnssl", "plain", "safetensors"
"""Values of :attr:`Source.kind`."""
DESCRIBING = (
    "logging",
    "current_epoch",
    "epoch",
    "trainer_name",
    "citations",
    "adaptation",
    "health",
    "metadata",
    "nnssl_adaptation_plan",
)
"""Entries of a file that :attr:`Source.content` keeps; optimisers and teachers would double the memory."""


DESCRIPTIONS = ("provenance", "nnssl_adaptation_plan", "adaptation", "citations")
NAMING = ("plans", "configuration", "configuration_name", "dataset_json")
"""Entries of ``init_args`` that are read, of nnU-Net's and of nnssl's."""


@dataclass(frozen=True)
class Source:
    """Pretrained weights, and what their file says about them; what it does not say is None or absent."""

    weights: dict[str, Tensor]
    """Keys as the network itself names them, without ``module.``, ``_orig_mod.``, ``student.`` or ``teacher.``."""
    network: dict[str, Any] | None
    """``{"class": dotted name, "kwargs": {…}}``, as ``provenance.describe_network`` gives it."""
    provenance: dict[str, Any]
    """Fields of ``provenance.describe_pretraining``; for foreign files those that are known, and ``taken``: how the
    weights were found in the file, a line for each choice."""
    trained: tuple[str, ...] | None
    """Prefixes of the keys that were trained; None when all were."""
    kind: str
    """``nnssl_plugin``, ``nnunet``, ``nnssl``, ``plain`` or ``safetensors``."""
    path: Path
    input_channels: int | None = None
    key_to_encoder: str | None = None
    key_to_stem: str | None = None
    key_to_lpe: str | None = None
    plans: dict[str, Any] | None = None
    """nnU-Net's plan of the network, where there is one."""
    configuration: str | None = None
    """The configuration of ``plans``."""
    dataset_json: dict[str, Any] | None = None
    content: dict[str, Any] = field(default_factory=dict, repr=False)
    """The entries of the file that describe it (:data:`DESCRIBING`)."""
    arrays: dict[str, SpatialArray] = field(default_factory=dict, repr=False)
    """Volumes that were learned beside the network, by their names."""

    @property
    def patch_size(self) -> list[int] | None:
        """Voxels per axis of the patch for fine-tuning: what nnssl recommends, else the pretraining's."""
        block = self.content.get("nnssl_adaptation_plan") or {}
        patch = block.get("recommended_downstream_patchsize") or self.provenance.get("patch_size")
        return [int(size) for size in patch] if patch else None


def read_source(path: str | Path, *, mapping: str | Path | None = None) -> Source:
    """Read pretrained weights, whoever wrote them, without running any code that the file may hold.

    Recognised by content: checkpoints of this package and what ``adapt`` and ``export`` write, checkpoints of nnU-Net
    and of MIC-DKFZ/nnssl, plain state dicts under the usual wrappers, and safetensors.

    Args:
        path: a file, or a folder that ``export`` wrote.
        mapping: name of a table of this package or a JSON file that says how the keys are renamed and what the
            weights were trained on; see ``docs/reference/weight-sources.md``.

    Raises:
        UserError: for a missing, damaged or unsafe file, one that holds no weights or several, and for a table that
            does not fit.
    """
    path = Path(path)
    if path.is_dir():
        source = source_of(_shared_folder(path), path)
    elif is_safetensors(path):
        weights, metadata = read_safetensors(path)
        source = _from_plain({"state_dict": weights, "metadata": metadata}, path, SAFETENSORS)
    else:
        source = source_of(read_checkpoint(path), path)
    if mapping is not None:
        return with_table(source, mapping)
    refuse_version_1(source.weights, path)
    return source


def _shared_folder(folder: Path) -> dict[str, Any]:
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{folder} is a folder, and not one that export wrote (it has no model.safetensors).",
            f"Name the file with the weights, for example {folder / 'checkpoint_final.pth'}",
        )
    from nnssl_plugin.checkpoints.format.shared_folder import read_shared_folder

    return read_shared_folder(folder)


def source_of(content: dict[str, Any], path: Path) -> Source:
    """The weights in the content of a file, and what it says about them, by what only one writer puts into its files.

    Args:
        content: what ``read_checkpoint`` gave.
        path: the file; what lies beside it may describe it.

    Raises:
        UserError: where no weights are found in it, or a description that cannot be read.
    """
    content = with_nnssl_block(content, path)
    try:
        check_fields(content, ENTRIES, path, "")
        content = _plainly_described(content, path)
        source = replace(_reader_of(content, path)(content, path), arrays=spatial_arrays_of(content, path))
        check_provenance(source.provenance, path)
        if source.plans is not None:
            check_plan(source.plans, source.configuration, path)
    except (*UNUSABLE, RecursionError, OverflowError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from error
    return source


def _plainly_described(content: dict[str, Any], path: Path) -> dict[str, Any]:
    described = {name: plain(content[name], path, name) for name in DESCRIPTIONS if name in content}
    arguments = content.get("init_args")
    if arguments is not None:
        described["init_args"] = {
            name: plain(value, path, f"init_args.{name}") for name, value in arguments.items() if name in NAMING
        }
    return content | described


def _reader_of(content: Mapping[str, Any], path: Path) -> Callable[[dict[str, Any], Path], Source]:
    if not is_state_dict(content.get("network_weights")):
        return partial(_from_plain, kind=PLAIN)
    if "adaptation" in content:
        return _from_adapted
    if isinstance(content.get("provenance"), Mapping) and "network" in content["provenance"]:
        return _from_own
    if isinstance(content.get("nnssl_adaptation_plan"), Mapping):
        return _from_nnssl
    return partial(_from_plain, kind=PLAIN) if nnunet_plan_of(content, path) is None else _from_nnunet


def _from_own(content: dict[str, Any], path: Path) -> Source:
    provenance = dict(content["provenance"])
    check_provenance(provenance, path)
    weights, _ = without_wrapping(content["network_weights"], path)
    arguments = content.get("init_args") or {}
    source = Source(
        weights,
        provenance["network"],
        provenance,
        _prefixes(provenance.get("trained")),
        OWN,
        path,
        plans=arguments.get("plans"),
        dataset_json=arguments.get("dataset_json"),
        configuration=arguments.get("configuration") or provenance.get("configuration"),
        content=_describing(content),
    )
    block = content.get("nnssl_adaptation_plan") or {}
    check_fields(block, NNSSL_FIELDS, path, "nnssl_adaptation_plan")
    return _with_keys(source, block)


def _from_adapted(content: dict[str, Any], path: Path) -> Source:
    """What ``adapt`` wrote: the network of the plan beside it; only what was loaded counts as trained."""
    weights, _ = without_wrapping(content["network_weights"], path)
    plans = plan_of_adapted(path)
    configuration = plans["finetuning"]["configuration"] if plans else None
    network = network_of_plan(plans, configuration, path) if plans else None
    return _with_keys(
        Source(
            weights,
            network,
            dict(content.get("provenance") or {}),
            _prefixes(content["adaptation"].get("loaded")),
            OWN,
            path,
            plans=plans,
            configuration=configuration,
            content=_describing(content),
        )
    )


def _from_nnssl(content: dict[str, Any], path: Path) -> Source:
    block = content["nnssl_adaptation_plan"]
    check_fields(block, NNSSL_FIELDS, path, "nnssl_adaptation_plan")
    weights, unwrapped = without_wrapping(content["network_weights"], path)
    network = nnssl_network(block, weights)
    weights, renamed = in_names_of(network, block, weights)
    provenance = nnssl_provenance(content) | {"taken": unwrapped + renamed}
    if network is not None:
        provenance["network"] = network
        block = {"pretrain_num_input_channels": block.get("pretrain_num_input_channels")}
    return _with_keys(Source(weights, network, provenance, None, NNSSL, path, content=_describing(content)), block)


def _from_nnunet(content: dict[str, Any], path: Path) -> Source:
    """What nnU-Net or a classification trainer of this package wrote; a classifier trains the encoder alone."""
    plans, configuration, dataset_json = nnunet_plan_of(content, path)
    weights, unwrapped = without_wrapping(content["network_weights"], path)
    weights, chosen = the_network(weights)
    network = nnunet_network(plans, configuration, path, content.get("trainer_name"))
    keys = keys_of_network(network)
    encoder = tuple(key for key in (keys.encoder, keys.stem, keys.positions) if key) or None
    described = nnunet_provenance(plans, configuration, dataset_json, trainer=content.get("trainer_name"), path=path)
    return _with_keys(
        Source(
            weights,
            network,
            described | {"network": network, "taken": unwrapped + chosen},
            encoder if chosen else None,
            NNUNET,
            path,
            plans=plans,
            configuration=configuration,
            dataset_json=dataset_json,
            content=_describing(content),
        )
    )


def _from_plain(content: dict[str, Any], path: Path, kind: str) -> Source:
    weights, found = find_state_dict(content, path)
    weights, unwrapped = without_wrapping(weights, path)
    weights, chosen = the_network(weights)
    taken = [] if kind == SAFETENSORS else found
    return Source(weights, None, {"taken": taken + unwrapped + chosen}, None, kind, path, content=_describing(content))


def with_table(source: Source, mapping: str | Path) -> Source:
    """The source under the names, and with the facts, that a table gives."""
    table = read_mapping(mapping)
    network, facts = table.network or source.network, table.facts()
    weights = table.apply(source.weights, source.path, encoder=keys_of_network(table.network).encoder)
    provenance = source.provenance | facts | ({"network": network} if network else {})
    provenance["taken"] = [*source.provenance.get("taken", []), f"renamed by the table '{table.name}'"]
    mapped = replace(source, weights=weights, network=network, provenance=provenance, input_channels=None)
    return _with_keys(mapped, {"pretrain_num_input_channels": len(table.channels) or None})


def _with_keys(source: Source, block: Mapping[str, Any] | None = None) -> Source:
    """With the places of encoder, stem and positions, and the input channels, from nnssl's block or the network."""
    block, known = block or {}, keys_of_network(source.network)
    stem = block.get("key_to_stem") or known.stem
    channels = block.get("pretrain_num_input_channels") or first_layer_channels(source.weights, stem)
    return replace(
        source,
        input_channels=channels,
        key_to_encoder=block.get("key_to_encoder") or known.encoder,
        key_to_stem=stem,
        key_to_lpe=block.get("key_to_lpe") or known.positions,
    )


def _prefixes(value: Sequence[str] | None) -> tuple[str, ...] | None:
    if value is not None and not all(isinstance(prefix, str) for prefix in value):
        raise TypeError("'trained' holds something else than prefixes")
    return None if value is None else tuple(value)


def _describing(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: content[name] for name in DESCRIBING if name in content}
