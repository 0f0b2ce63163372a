"""A plan for a dataset with the network of a checkpoint, so that the whole encoder can be loaded."""

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nnssl_plugin.checkpoints.format.provenance import as_architecture
from nnssl_plugin.checkpoints.sources.mappings import shipped_mappings
from nnssl_plugin.checkpoints.sources.source import Source
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.network_classes import check_architecture
from nnssl_plugin.nnunet.plan_edits import (
    Assignment,
    BlockCheck,
    EditedPlan,
    asked_for,
    check_new_name,
    fitting_patch,
    more_than_one_voxel,
    network_assignments,
    patch_divisors,
    write_changed_plan,
)
from nnssl_plugin.nnunet.plans import (
    UNBUILDABLE,
    build_network,
    dataset_folder,
    input_channels,
    read_dataset_json,
    read_plan,
    resolve_configuration,
)

NOT_TAKEN_OVER = ("inherits_from", "next_stage", "previous_stage")
"""Fields of a configuration that point to others; the new plan holds one configuration."""
OF_OTHER_WEIGHTS = ("weights", "source", "twin_of", "configuration")
"""Entries of a ``finetuning`` block that belong to the weights it was written for."""
INTENSITIES = "foreground_intensity_properties_per_channel"
COMFORTABLE = 1.2
"""Memory over that of the planned network from which the batch size is called into question."""


def plan_like(
    dataset: str,
    source: Source,
    *,
    name: str,
    plans_name: str = "nnUNetPlans",
    configuration: str = "3d_fullres",
    spacing: bool = False,
    normalisation: bool = False,
    orientation: bool = False,
    presets: Sequence[str] = (),
    assignments: Sequence[str] = (),
    overwrite: bool = False,
    trust: bool = False,
    check_blocks: BlockCheck | None = None,
) -> EditedPlan:
    """Write a plan for a preprocessed dataset with the network of a checkpoint.

    Network and patch size come from the checkpoint; the patch is cut where the dataset's median case is smaller, and
    divisible by the network's strides. Batch size, spacing and normalisation stay those of the dataset's plan. The new
    plan holds this one configuration.

    Args:
        dataset: ID or full name of the target.
        source: what ``read_source`` gave for the checkpoint.
        name: ``plans_name`` and file name of the new plan.
        plans_name: the plan of the target to start from.
        configuration: the configuration that gets the network.
        spacing: take over the voxel spacing too; the cases must then be preprocessed again.
        normalisation: take over the normalisation too, and the intensity statistics that CT is normalised by.
        orientation: take over the reader of the images, which decides how they are oriented.
        presets: fragments of a plan, applied after what the checkpoint gives.
        assignments: ``key=value`` texts that are applied last.
        overwrite: replace an existing plan of this name that says something else.
        trust: build the network whatever class the checkpoint names.
        check_blocks: as for ``plan_edits.write_edited_plan``.

    Returns:
        what was written; its notes say what was chosen where the checkpoint's values do not fit the dataset.

    Raises:
        UserError: when the checkpoint does not say what is asked of it, or its network does not suit the dataset.
    """
    check_new_name(name, plans_name)
    folder = dataset_folder(dataset)
    plans, dataset_json = _alone(read_plan(folder, plans_name), configuration), read_dataset_json(folder)
    resolved = plans["configurations"][configuration]
    taken: list[Assignment] = []
    if spacing:
        taken += _spacing(source, plans, configuration)
    if normalisation:
        taken += _normalisation(source, len(resolved["normalization_schemes"]), configuration)
    notes = []
    if orientation:
        reader, notes = _reader(source, plans, dataset_json)
        taken += reader
    if taken:
        taken.append((("configurations", configuration, "data_identifier"), f"{name}_{configuration}"))
    shape = dict(taken).get(
        ("configurations", configuration, "median_image_size_in_voxels"), resolved["median_image_size_in_voxels"]
    )
    architecture = _architecture(source)
    check_architecture(architecture, str(source.path), trust=trust)
    patch, changed = _patch(source, architecture, resolved["patch_size"], shape)
    taken += network_assignments(configuration, architecture, patch)
    asked = [*taken, *asked_for(plans, presets, assignments)]
    written = write_changed_plan(
        folder, plans, name, asked, overwrite=overwrite, trust=trust, check_blocks=check_blocks
    )
    memory = _memory(plans, read_plan(folder, name), configuration, dataset_json, trust=trust)
    return replace(written, notes=[*changed, *notes, *memory])


def _alone(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """The plan with one configuration that stands by itself, and without what belongs to other weights."""
    resolved = resolve_configuration(plans, configuration)
    if resolved.get("previous_stage"):
        raise UserError(
            f"{configuration} is the second stage of a cascade, whose network also reads labels.",
            "Name another configuration with -c, such as 3d_fullres.",
        )
    kept = {key: deepcopy(value) for key, value in resolved.items() if key not in NOT_TAKEN_OVER}
    alone = {**deepcopy(dict(plans)), "configurations": {configuration: kept}}
    settings = {key: value for key, value in alone.pop("finetuning", {}).items() if key not in OF_OTHER_WEIGHTS}
    return alone | ({"finetuning": settings} if settings else {})


def _architecture(source: Source) -> dict[str, Any]:
    if source.network is None:
        raise UserError(
            f"{source.path} does not say which network its weights belong to; its first keys: "
            f"{some(list(source.weights))}.",
            f"Name a table that says it with --mapping ({', '.join(shipped_mappings())}), or set the architecture by "
            "hand: "
            "nnssl_plugin plan --set 'configurations.3d_fullres.architecture.…'",
        )
    return as_architecture(source.network)


def _patch(
    source: Source, architecture: Mapping[str, Any], planned: Sequence[int], shape: Sequence[float]
) -> tuple[list[int], list[str]]:
    """The patch in voxels, and what was changed of the checkpoint's.

    Args:
        source: the checkpoint.
        architecture: its network.
        planned: the target's planned patch, which counts where the checkpoint names none.
        shape: size of the target's median case, at the new spacing.
    """
    stated = source.patch_size
    wanted = list(stated or planned)
    if len(wanted) != len(planned):
        raise UserError(
            f"The network of {source.path.name} reads {len(wanted)}D patches, the configuration is {len(planned)}D.",
            "Name another configuration with -c.",
        )
    divisors = patch_divisors(architecture, len(wanted))
    covering = [max(1, math.ceil(size / divisor)) * divisor for size, divisor in zip(shape, divisors, strict=True)]
    patch = [min(sizes) for sizes in zip(fitting_patch(wanted, divisors), covering, strict=True)]
    patch = more_than_one_voxel(patch, divisors, shape)
    if patch == list(wanted):
        return patch, []
    return patch, [
        f"patch size: {_by(wanted)} {'in the checkpoint' if stated else 'planned'} → {_by(patch)} here "
        f"(median case {_by(round(size) for size in shape)} voxels, divisible by {_by(divisors)})"
    ]


def _spacing(source: Source, plans: Mapping[str, Any], configuration: str) -> list[Assignment]:
    """The checkpoint's spacing in mm, and the median size of the target's cases in its voxels."""
    if source.provenance.get("native_spacing"):
        raise UserError(
            f"{source.path.name} was trained on cases at their own spacing, so there is none to take over.",
            "Leave --spacing out: the dataset's planned spacing is the nearest to that.",
        )
    wanted = _stated(source, "spacing_mm", "--spacing")
    before, size = plans["original_median_spacing_after_transp"], plans["original_median_shape_after_transp"]
    present = plans["configurations"][configuration]["spacing"]
    if len(wanted) != len(present):
        raise UserError(
            f"{source.path.name} was trained at a spacing of {wanted} mm, {configuration} has {len(present)} axes.",
            "Leave --spacing out, or name another configuration with -c.",
        )
    if list(wanted) == list(present):
        return []
    axes = range(len(size) - len(wanted), len(size))  # 2D configurations leave the first axis as it is
    median = [float(size[axis] * before[axis] / new) for axis, new in zip(axes, wanted, strict=True)]
    under = ("configurations", configuration)
    return [((*under, "spacing"), list(wanted)), ((*under, "median_image_size_in_voxels"), median)]


def _normalisation(source: Source, channels: int, configuration: str) -> list[Assignment]:
    """The checkpoint's normalisation for each channel of the target, where CT is concerned with its intensities."""
    schemes = _for_channels(_stated(source, "normalisation", "--normalisation"), channels, source)
    under = ("configurations", configuration)
    taken: list[Assignment] = [((*under, "normalization_schemes"), schemes)]
    if source.plans is None or source.configuration is None:
        return taken
    masks = resolve_configuration(source.plans, source.configuration)["use_mask_for_norm"]
    taken.append(((*under, "use_mask_for_norm"), _for_channels(masks, channels, source)))
    intensities = source.plans.get(INTENSITIES, {})
    if "CTNormalization" in schemes and intensities:
        per_channel = _for_channels([intensities[key] for key in sorted(intensities, key=int)], channels, source)
        taken.append(((INTENSITIES,), {str(number): value for number, value in enumerate(per_channel)}))
    return taken


def _reader(
    source: Source, plans: Mapping[str, Any], dataset_json: Mapping[str, Any]
) -> tuple[list[Assignment], list[str]]:
    """The checkpoint's reader of images, which must know the format of the target's, and what to look at then."""
    reader, ending = _stated(source, "reader", "--orientation"), dataset_json.get("file_ending")
    known = {io.__name__: io.supported_file_endings for io in LIST_OF_IO_CLASSES}
    if reader not in known or ending not in known[reader]:
        raise UserError(
            f"{source.path.name} was trained on images read by {reader}, which nnU-Net does not use for {ending}.",
            "Leave --orientation out, or convert the images: nnssl_plugin prepare",
        )
    if reader == plans["image_reader_writer"]:
        return [], []
    return [(("image_reader_writer",), reader)], [
        f"orientation: images are read by {reader}, not by {plans['image_reader_writer']}. Spacing and patch stay in "
        "the plan's order of axes: check them where the images are stored in another order than RAS"
    ]


def _for_channels(values: Sequence[Any], channels: int, source: Source) -> list[Any]:
    if len(values) == channels:
        return deepcopy(list(values))
    if any(value != values[0] for value in values):
        raise UserError(
            f"{source.path.name} normalised {len(values)} channels in different ways, the dataset has {channels}.",
            "Leave --normalisation out, and set normalization_schemes with --set.",
        )
    return [deepcopy(values[0]) for _ in range(channels)]


def _stated(source: Source, field: str, flag: str) -> Any:
    if not source.provenance.get(field):
        raise UserError(
            f"{source.path} does not say its {field}.", f"Leave {flag} out, or set the value by hand with --set."
        )
    return source.provenance[field]


def _memory(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    *,
    trust: bool,
) -> list[str]:
    """A word on the batch size where training needs clearly more memory than what nnU-Net planned."""
    needed, planned = (training_bytes(plans, configuration, dataset_json, trust=trust) for plans in (after, before))
    ratio = needed / planned
    if ratio <= COMFORTABLE:
        return []
    batch = resolve_configuration(after, configuration)["batch_size"]
    return [
        f"memory: a training step needs about {ratio:.1f} times that of {before['plans_name']} at the same batch "
        f"size of {batch}; if it does not fit: --set configurations.{configuration}.batch_size="
        f"{max(1, int(batch / ratio))}"
    ]


def training_bytes(
    plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], *, trust: bool = False
) -> int:
    """About what a training step holds in float32: what the backward pass needs of each sample, and three copies of
    the parameters (weights, gradients, momentum). Computed without memory of its own, on the meta device; attention
    counts as its fused kernels keep it, without the matrix of all pairs of tokens."""
    resolved = resolve_configuration(plans, configuration)
    network = build_network(plans, configuration, dataset_json, device="meta", trust=trust)
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    image = torch.empty(1, input_channels(plans, configuration, dataset_json), *resolved["patch_size"], device="meta")
    with (
        _FusedAttention(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        outputs = _run(network, image, plans["plans_name"])  # held until all is counted: no number of a storage twice
    parameters = sum(p.numel() * p.element_size() for p in network.parameters())
    del outputs
    return resolved["batch_size"] * sum(kept.values()) + 3 * parameters


def _run(network: nn.Module, image: Tensor, plans_name: str) -> Any:
    try:
        return network(image)
    except UNBUILDABLE as error:
        raise UserError(
            f"The network of {plans_name} cannot take a patch of {_by(image.shape[2:])}: {error}",
            "Mend the arch_kwargs of its architecture.",
        ) from error


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps query, key, value and one more of their size, as the fused kernels do (Dao et al. 2022,
    FlashAttention), and no matrix; its values are meaningless."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        return given["query"] * given["key"] * given["value"]


def _by(sizes: Any) -> str:
    return json.dumps(list(sizes), separators=("×", ":"))[1:-1]
