"""What both of M3Ret's trainings can be told of their inputs."""

from dataclasses import dataclass
from typing import Literal

from nnssl_plugin.settings import Count


@dataclass(frozen=True)
class InputSettings:
    """How images, videos and volumes become inputs of one network; [paper] section 4.1, [choice] ours."""

    channels: Count | None = None
    """Input channels of the network: 3 in the paper, to which grey images are repeated. `null`: 3 where the plan names
    several sources, else those of the dataset, each with its own meaning."""
    frames: Count = 16
    """Frames of a video that a step sees, drawn at random and kept in their order [paper]."""
    colour: tuple[str, ...] = ("video",)
    """Kinds of sources whose three channels are red, green and blue. Of images of other kinds with several channels one
    that the case has is drawn, where the network reads another number."""
    intensity: Literal["plan", "unit"] = "plan"
    """`unit` brings each image to [0, 1] [paper]; `plan` leaves it as the plan normalised it, which is what fine-tuning
    sees [choice]."""
