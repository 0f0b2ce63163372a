"""Pretrain on unlabelled scans, fine-tune on fractions of the labels, and compare with twins from scratch.

    python benchmarks/label_efficiency.py benchmarks/studies/hippocampus-2d.json -o hippocampus --jobs 2

Everything runs through the package's and nnU-Net's own commands inside the folder given by -o. An interrupted study
goes on with the same command. At the end the folder holds result.json, table.md, study.md and two figures; what they
mean: docs/how-to/measure-label-efficiency.md.
"""

import argparse
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from study_figures import draw_label_efficiency, draw_learning
from study_file import Study, choose_cases, read_study
from study_page import page, table
from study_prediction import predictions
from study_results import (
    calibration,
    choose_recipes,
    collect,
    first_steps,
    read_probe,
    read_separation,
    steps_to_twin,
    summarise,
    summary,
    tuned,
    versions,
)
from study_runner import Runner, StoppedEarly, cost, on_one_thread
from study_steps import (
    RUNS,
    adaptation_steps,
    finetuning_runs,
    lay_out,
    planning_steps,
    pretraining_steps,
    probe_steps,
    separation_steps,
    training_step,
    tuning_runs,
)

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, read_json, write_json

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STUDY_COPY = "study.json"


def carry_out(study_file: Path, folder: Path, *, data: Path, jobs: int, device: str) -> dict:
    """Run a study, or what is left of it, and write its results.

    Args:
        study_file: what the study is.
        folder: receives everything.
        data: what the study's images and labels are relative to.
        jobs: trainings side by side.
        device: nnU-Net's ``-device``.

    Returns:
        the content of ``result.json``.

    Raises:
        UserError: for a study that cannot be run, another study in the folder, or a command that fails.
    """
    study = read_study(study_file)
    selection = choose_cases(study, data)
    _claim(folder, study_file)
    lay_out(study, selection, data=data, folder=folder)
    one_thread = on_one_thread(jobs, device)
    planning = planning_steps(study, folder, device=device)
    pretraining = pretraining_steps(study, folder, device=device)
    adaptation = adaptation_steps(study, folder)
    features = [*separation_steps(study, folder, device=device), *probe_steps(study, folder, device=device)]
    trials = tuning_runs(study, selection)
    total = len([*planning, *pretraining, *features, *adaptation, *trials, *study.seeds])
    runner = Runner(folder, device=device, total=total)
    runner.run(planning)
    runner.run(pretraining, jobs=jobs)
    runner.run([*adaptation, *features], jobs=jobs)

    def train(stage: str, runs: dict) -> None:
        steps = [
            training_step(study, folder, f"{stage}-{name}", stage, of, device=device, one_thread=one_thread)
            for name, of in runs.items()
            if not all((folder / RUNS / f"{run['name']}.json").exists() for run in of)
        ]
        runner.run(steps, jobs=jobs)

    train("tuning", trials)
    train("fine-tuning", finetuning_runs(study, selection, choose_recipes(study, collect(folder))))
    runner.bar.close()
    return write_results(study, folder, state=runner.state, jobs=jobs, device=device, study_file=study_file)


def report(study_file: Path, folder: Path, *, jobs: int, device: str) -> dict:
    """Write the results of the runs that have finished, of a study that was cut off."""
    state = read_json(folder / "state.json") if (folder / "state.json").exists() else {}
    return write_results(read_study(study_file), folder, state=state, jobs=jobs, device=device, study_file=study_file)


def write_results(study: Study, folder: Path, *, state: dict, jobs: int, device: str, study_file: Path) -> dict:
    """Read the results of the runs and write numbers, table, page and figures."""
    runs = collect(folder)
    result = {
        "setting": {"study": asdict(study), "jobs": jobs, "device": device},
        "versions": versions(),
        "cost": cost(state),
        "calibration": calibration(study, runs),
        "tuning": tuned(study, runs),
        "chosen": choose_recipes(study, runs),
        "statistics": summarise(study, runs),
        "steps_to_twin": steps_to_twin(study, runs),
        "first_steps": first_steps(study, runs),
        "separation": read_separation(study, folder),
        "probe": read_probe(folder),
        "prediction": predictions(study, folder, runs),
        "runs": [run.as_json() for run in runs],
    }
    write_json(folder / "result.json", result)
    write_json(folder / "summary.json", summary(study, result))
    lines = table(study, result["statistics"])
    _write(folder / "table.md", lines)
    _write(folder / "study.md", page(study, result, lines, study_file=study_file))
    draw_label_efficiency(study, runs, result["statistics"], folder / "label_efficiency.png")
    draw_learning(study, runs, folder / "learning.png")
    return result


def _claim(folder: Path, study_file: Path) -> None:
    """Keep a copy of the study in its folder, and refuse the folder of another one."""
    copy, content = folder / STUDY_COPY, read_json(study_file)
    if copy.exists() and read_json(copy) != content:
        raise UserError(
            f"{folder} holds another study than {study_file}, or this one before it was changed.",
            "Choose another folder with -o.",
        )
    write_json(copy, content)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _stop(number, frame) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a file as in benchmarks/studies")
    parser.add_argument("-o", required=True, type=Path, metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("NNSSL_PLUGIN_TEST_DATA", DATA)),
        help="folder of the data (default: $NNSSL_PLUGIN_TEST_DATA, else ../shared/data)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="trainings side by side, on a CPU with one thread each; 1 uses every core (default: 2)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    parser.add_argument(
        "--report", action="store_true", help="run nothing: write the results of what has finished so far"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        if args.report:
            report(args.study, args.o.resolve(), jobs=args.jobs, device=args.device)
        else:
            carry_out(
                args.study, args.o.resolve(), data=args.data.resolve(), jobs=max(1, args.jobs), device=args.device
            )
    except UserError as error:
        print(f"label_efficiency: {error}", file=sys.stderr)
        return 75 if isinstance(error, StoppedEarly) else 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 75
    print((args.o / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
