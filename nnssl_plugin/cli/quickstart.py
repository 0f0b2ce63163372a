"""Run the whole pipeline in about ten minutes: pretrain, fine-tune beside training from scratch, predict, report.

    nnssl_plugin quickstart                                                # generated phantoms: no data, no network
    nnssl_plugin quickstart --images my_scans -o first_run                 # ends with pretraining
    nnssl_plugin quickstart --images my_scans --labels my_labels -o both   # labels/CASE.nii.gz for images/CASE.nii.gz

Every command is printed before it runs, so that you can repeat it. Interrupted, the same command goes on where it was
(exit code 75). Large scans are made coarser and few are used, so that minutes suffice; the output says what was cut.
report.html in the folder shows what came out.
"""

import shlex
import sys
from pathlib import Path

from nnssl_plugin.cli.env import search_path


def add_arguments(parser):
    parser.add_argument("--images", metavar="DIR", type=Path, help="your scans (default: generated phantoms)")
    parser.add_argument(
        "--labels",
        metavar="DIR",
        type=Path,
        help="segmentations of some of them, of the same name; the others stay unlabelled",
    )
    parser.add_argument("--modality", choices=("MR", "CT"), help="of your scans (default: guessed; MR for PET, US, …)")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("nnssl_quickstart"),
        dest="o",
        help="an empty or new folder that receives everything (default: ./nnssl_quickstart)",
    )
    parser.add_argument("-device", "--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")


def run(args):
    from nnssl_plugin.quickstart.commands import Stopped
    from nnssl_plugin.quickstart.run import run_quickstart
    from nnssl_plugin.quickstart.scans import Setting
    from nnssl_plugin.training.interruption import TO_BE_CONTINUED

    images, labels = (str(path.resolve()) if path else None for path in (args.images, args.labels))
    try:
        report = run_quickstart(
            args.o, Setting(images, labels, args.modality), device=args.device, trainers=search_path(), say=_say
        )
    except Stopped:
        _say(f"Stopped. To go on from here: {shlex.join(['nnssl_plugin', *sys.argv[1:]])}")
        return TO_BE_CONTINUED
    _say(f"\nReport: {report}\nOpen it in a browser.")
    return 0


def _say(line):
    print(line, flush=True)
