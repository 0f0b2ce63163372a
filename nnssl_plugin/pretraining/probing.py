"""Every few epochs: what a linear readout of the encoder finds in labelled cases, so that people see what it learns.

The same measure as ``nnssl_plugin evaluate probe``, of fewer cases. It chooses nothing: neither weights nor their end.
"""

import time
from collections.abc import Sequence

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.features.voxels import Draw, LabelledVoxels
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.pretraining.datasets import PlannedDataset, own_dataset

FITTED = 5
"""Most cases whose labels the readout sees."""
SCORED = 20
"""Most cases on which its Dice is measured."""
DICE = "probe/dice"
SHUFFLED = "probe/shuffled_labels"
"""The control: the same where the readout saw labels exchanged at random within each case."""


class LabelProbe:
    """A readout of the same labelled cases again and again.

    Args:
        dataset: labelled, preprocessed.
        training: cases that may give labels; some of the fold ``all``'s, whose two lists are the same.
        validation: cases to measure on, but for those that give labels.
        channels: that the network reads.

    Raises:
        UserError: the dataset names no structures, has too few cases, or other channels than the network reads.
    """

    def __init__(self, dataset: PlannedDataset, training: Sequence[str], validation: Sequence[str], *, channels: int):
        if channels != dataset.channels:
            raise UserError(
                f"The network reads {channels} channels and {dataset.name} has {dataset.channels}: "
                "there is no probe of it while it is trained.",
                "Set probe_every=0 in the pretraining block, and probe what adapt writes: nnssl_plugin evaluate probe",
            )
        fitted = _evenly(sorted(training), min(FITTED, len(training) // 2))
        scored = _evenly([case for case in sorted(validation) if case not in fitted], SCORED)
        if not fitted or not scored:
            raise UserError(
                f"{dataset.name} has too few cases to fit a readout on some and to measure it on others.",
                "Set probe_every=0 in the pretraining block.",
            )
        self.draw, self.scored = Draw(tuple(fitted)), scored
        given = dataset.folder, dataset.plans, dataset.configuration, dataset.dataset_json
        self._voxels = LabelledVoxels(*given, [*fitted, *scored])
        if not self._voxels.structures:
            raise UserError(
                f"The labels of {dataset.name} name no structures, so that there is nothing to probe the encoder for.",
                "Set probe_every=0 in the pretraining block, or pretrain on a dataset with labels.",
            )

    def measure(self, backbone: Backbone, device: str) -> tuple[dict[str, float], float]:
        """Mean Dice of the readout and of its control, by the names of the log, and the seconds that it took.

        Args:
            backbone: in test mode; it is left as it is.
            device: where it is.
        """
        started = time.perf_counter()
        readouts = self._voxels.fit(backbone, [self.draw, Draw(self.draw.cases, shuffled=True)], device=device)
        true, shuffled = self._voxels.dice(backbone, readouts, self.scored, device=device)
        found = {DICE: _mean(true), SHUFFLED: _mean(shuffled)}
        return found, time.perf_counter() - started


def probe_of(trainer) -> LabelProbe | None:
    """The probe of a ``Pretrainer``'s own dataset, whatever its sources; None where the plan asks for none."""
    if not trainer.training_settings.probe_every:
        return None
    return LabelProbe(own_dataset(trainer), *trainer.do_split(), channels=trainer.task.backbone.input_channels)


def _evenly(names: Sequence[str], number: int) -> list[str]:
    """At most so many of the names, spread over them."""
    places = np.linspace(0, len(names) - 1, min(number, len(names))).round().astype(int)
    return [names[place] for place in places]


def _mean(scores: np.ndarray) -> float:
    return float("nan") if np.isnan(scores).all() else float(np.nanmean(scores))
