"""Print the export of nnUNet_extTrainer, through which nnU-Net finds the trainers of this package.

eval "$(nnssl_plugin env)"
nnssl_plugin env --shell fish | source
"""

import os
from pathlib import Path

VARIABLE = "nnUNet_extTrainer"
FORMATS = {
    "bash": 'export {name}="{value}"',
    "fish": 'set -gx {name} "{value}"',
    "powershell": '$env:{name} = "{value}"',
    "cmd": "set {name}={value}",
}


def add_arguments(parser):
    parser.add_argument("--shell", choices=FORMATS, default="bash", help="bash also serves zsh and sh (default: bash)")


def run(args):
    print(FORMATS[args.shell].format(name=VARIABLE, value=search_path()))


def search_path() -> str:
    """The present value of nnUNet_extTrainer with the folder of this package's trainers appended once."""
    import nnssl_plugin.pretrain_trainers as folder_of_trainers

    folder = str(Path(folder_of_trainers.__file__).resolve().parent)
    present = [p for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]
    return os.pathsep.join(present if folder in present else [*present, folder])
