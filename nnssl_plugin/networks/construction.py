"""What a network of this package refuses before it is built, in words."""

from nnssl_plugin.errors import UserError


def need_monai(network: type | None, name: str, extra: str) -> None:
    """Refuse a network of MONAI where MONAI is missing.

    Args:
        network: MONAI's class, ``None`` where it cannot be imported.
        name: what plans call it.
        extra: of this package that brings it.

    Raises:
        UserError: without MONAI.
    """
    if network is None:
        raise UserError(
            f"The plan's network, {name}, needs MONAI, which cannot be imported.",
            f'pip install "nnssl_plugin[{extra}]"',
        )


def refuse_deep_supervision(name: str, wanted: bool) -> None:
    """Refuse outputs at several scales.

    Raises:
        UserError: where they are wanted.
    """
    if wanted:
        raise UserError(
            f"{name} is trained without deep supervision here, which this trainer asks for.",
            "Train with -tr PretrainedSegmentationTrainer; from random weights with the plan of "
            "nnssl_plugin adapt --from-scratch.",
        )
