"""Do the same weights arrive by every route? Export, import, adapt, one epoch of fine-tuning each, and compare.

    python benchmarks/weight_routes.py -d 502 -c 3d_fullres -p nnUNetPlans-cpu -w CHECKPOINT -o routes

CHECKPOINT is a pretraining of a U-Net; the dataset is planned and preprocessed, and the plan describes the
checkpoint's network (``nnssl_plugin plan --like`` writes one). Every training has the same seed, no warm-up and no
worker processes, so its losses are a function of the weights alone. The routes:

    adapt      adapt -w CHECKPOINT                    → PretrainedSegmentationTrainer
    folder     export, adapt -w FOLDER                → PretrainedSegmentationTrainer
    import     export, import, adapt -w FILE          → PretrainedSegmentationTrainer
    nnssl      export --format nnssl, adapt -w FILE   → PretrainedSegmentationTrainer
    nnunet     export --format nnunet, adapt -w FILE  → PretrainedSegmentationTrainer
    stock      what adapt wrote                       → nnU-Net's trainer, -pretrained_weights
    direct     CHECKPOINT itself                      → nnU-Net's trainer, -pretrained_weights
    scratch    adapt --from-scratch                   → PretrainedSegmentationTrainer (must differ from all others)

``direct`` works where the target has as many channels as the pretraining; it is left out elsewhere.
"""

import argparse
import math
import os
import subprocess
from pathlib import Path

from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.format.provenance import weights_hash
from nnssl_plugin.checkpoints.sources.source import read_source
from nnssl_plugin.cli.env import VARIABLE, search_path
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import dataset_folder, input_channels, read_dataset_json, read_plan

TRAINER, STOCK = "PretrainedSegmentationTrainer", "SeededStockTrainer"
ADAPTED = ("adapt", "folder", "import", "nnssl", "nnunet")
ROUTES = (*ADAPTED, "stock", "direct", "scratch")
STOCK_TRAINER = Path(__file__).resolve().parent / "seeded_stock"


class Routes:
    """The commands of each route on one dataset, and what came of them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = Path(args.o)
        self.out.mkdir(parents=True, exist_ok=True)
        self.folder = dataset_folder(args.d)
        self.plan = f"{args.p}-{args.n}"

    def run(self, routes: tuple[str, ...]) -> list[dict]:
        """A row per route."""
        settings = {
            "epochs": 1,
            "iterations_per_epoch": self.args.iterations,
            "validation_iterations": 2,
            "warmup_epochs": 0,
            "seed": self.args.seed,
            "weights": "null",
        }
        self._command(
            "nnssl_plugin",
            "plan",
            "-d",
            self.args.d,
            "-p",
            self.args.p,
            "-n",
            self.plan,
            "--overwrite",
            "--set",
            *(f"finetuning.{name}={value}" for name, value in settings.items()),
        )
        return [self._row(route) for route in routes]

    def _row(self, route: str) -> dict:
        if route in ADAPTED:
            return self._read(route, self._train(self._adapt(route, "-w", str(self._source(route))), TRAINER))
        if route == "scratch":
            return self._read(route, self._train(self._adapt(route, "--from-scratch"), TRAINER))
        weights = self.args.w if route == "direct" else str(self.folder / self._file("adapt"))
        return self._read(route, self._train(self.plan, STOCK, "-pretrained_weights", weights))

    def _source(self, route: str) -> Path:
        """What ``adapt`` reads, exported first where the route says so."""
        if route == "adapt":
            return Path(self.args.w)
        layout = route if route in ("nnssl", "nnunet") else "safetensors"
        folder = self.out / layout
        if not folder.exists():
            self._command("nnssl_plugin", "export", "-w", self.args.w, "-o", str(folder), "--format", layout)
        if route == "import":
            self._command("nnssl_plugin", "import", str(folder), "-o", str(self.out / "imported.pth"))
        return {
            "folder": folder,
            "import": self.out / "imported.pth",
            "nnssl": folder / "checkpoint_final.pth",
            "nnunet": folder / "pretrained_weights.pth",
        }[route]

    def _adapt(self, route: str, *weights: str) -> str:
        self._command(
            "nnssl_plugin", "adapt", "-d", self.args.d, "-c", self.args.c, "-p", self.plan, "-n", route, *weights
        )
        return f"{self.plan}-{route}"

    def _file(self, route: str) -> str:
        return read_json(self.folder / f"{self.plan}-{route}.json")["finetuning"]["weights"]

    def _train(self, plan: str, trainer: str, *more: str) -> Path:
        """Train one epoch; the checkpoint."""
        self._command(
            "nnUNetv2_train",
            self.args.d,
            self.args.c,
            str(self.args.f),
            "-p",
            plan,
            "-tr",
            trainer,
            "-device",
            self.args.device,
            *more,
        )
        fold = Path(
            os.environ["nnUNet_results"], self.folder.name, f"{trainer}__{plan}__{self.args.c}", f"fold_{self.args.f}"
        )
        return fold / "checkpoint_final.pth"

    def _read(self, route: str, checkpoint: Path) -> dict:
        content = read_checkpoint(checkpoint)
        log = content["logging"]
        adapted = self.folder / self._file(route) if route in ADAPTED else None
        return {
            "route": route,
            "adapted_sha256": None if adapted is None else weights_hash(read_source(adapted).weights),
            "trained_sha256": weights_hash(content["network_weights"]),
            "train_loss": float(log["train_losses"][0]),
            "validation_loss": float(log["val_losses"][0]),
        }

    def _command(self, *words: str) -> None:
        trainers = os.pathsep.join([search_path(), str(STOCK_TRAINER)])
        environment = os.environ | {VARIABLE: trainers, "nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            print("$", *words, file=log, flush=True)
            finished = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if finished.returncode:
            raise SystemExit(f"{' '.join(words)} failed: see {log.name}")


def routes_for(args: argparse.Namespace) -> tuple[str, ...]:
    """All routes; ``direct`` only where the first layer fits as it is."""
    folder = dataset_folder(args.d)
    channels = input_channels(read_plan(folder, args.p), args.c, read_dataset_json(folder))
    same = read_source(args.w).input_channels == channels
    return tuple(route for route in args.routes if same or route != "direct")


def show(rows: list[dict]) -> None:
    """Print a Markdown table, and whether the routes agree."""
    print("| route | weights after adapt | weights after one epoch | training loss | validation loss |")
    print("|---|---|---|---|---|")
    for row in rows:
        adapted = row["adapted_sha256"][:12] if row["adapted_sha256"] else ""
        print(
            f"| {row['route']} | {adapted} | {row['trained_sha256'][:12]} | {row['train_loss']!r} | "
            f"{row['validation_loss']!r} |"
        )
    loaded = [row for row in rows if row["route"] != "scratch"]
    print(f"\n{len(loaded)} routes " + ("agree: equal weights, bit for bit" if agree(loaded) else "DO NOT AGREE"))


def agree(rows: list[dict]) -> bool:
    """Whether routes end with equal weights, bit for bit. A loss may differ by a part in a million: on one machine the
    last bit of a step's loss differed between nnU-Net's trainer and ours while all weights were equal, for a cause that
    was not traced."""
    losses = [(row["train_loss"], row["validation_loss"]) for row in rows]
    near = all(math.isclose(*pair, rel_tol=1e-6) for one in losses for pair in zip(one, losses[0], strict=True))
    return near and len({row["trained_sha256"] for row in rows}) == 1


def main(words: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="target dataset, ID or name")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plan with the checkpoint's network")
    parser.add_argument("-w", required=True, help="checkpoint of a pretraining")
    parser.add_argument("-n", default="routes", help="the plans are called PLANS-NAME…; a new one for each run")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument("-o", required=True, help="folder for exports, log and result.json")
    parser.add_argument("-device", default="cpu", help="as for nnUNetv2_train; only the CPU gives equal bits")
    parser.add_argument("--iterations", type=int, default=25, help="training steps of the epoch (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    args = parser.parse_args(words)
    rows = Routes(args).run(routes_for(args))
    write_json(Path(args.o) / "result.json", rows)
    show(rows)
    return rows


if __name__ == "__main__":
    main()
