"""The metrics of a segmentation, in the order of tables and figures."""

from importlib.util import find_spec

from nnssl_plugin.statistics.metric import Metric

DICE = Metric("dice", "Dice", key="Dice", per_class=True)
HD95 = Metric("hd95_mm", "HD95 (mm)", key="HD95_mm", lower_is_better=True, per_class=True, digits=2)
NSD = Metric("nsd", "NSD", per_class=True, key="NSD")

METRICS = (DICE, HD95, NSD)
"""Names are fields of ``surfaces.Scores``; the key of Dice in JSON is nnU-Net's."""
SURFACE_METRICS = (HD95, NSD)
"""Those that need MONAI, the extra ``evaluation``."""
WITHOUT_MONAI = 'HD95 and NSD need MONAI and are left out: pip install "nnssl_plugin[evaluation]"'


def available_metrics() -> tuple[Metric, ...]:
    """The metrics that can be computed with what is installed."""
    return METRICS if find_spec("monai") is not None else (DICE,)
