"""Finds out which trainers of this package nnU-Net finds, from where, and what hides the others."""

import ast
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from nnssl_plugin.doctor.asking import Answer
from nnssl_plugin.doctor.finding import OK, PROBLEM, WARNING, Finding
from nnssl_plugin.registry import METHODS

VARIABLE = "nnUNet_extTrainer"
ACTIVATE = 'eval "$(nnssl_plugin env)"'


def own_folder() -> Path:
    """The folder of this package that nnUNet_extTrainer should name."""
    import nnssl_plugin.pretrain_trainers as package

    return Path(package.__file__).resolve().parent


def expected_trainers(own: Path) -> dict[str, str]:
    """Trainer → module that defines it: what the own folder re-exports and the registry names. Nothing is imported."""
    expected = {}
    for path in sorted(own.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                expected.update({alias.asname or alias.name: node.module for alias in node.names})
    for method in METHODS.values():
        module, _, name = method.trainer.rpartition(".")
        expected[name] = module
    return dict(sorted(expected.items()))


def path_findings(environment: Mapping[str, str], expected: Iterable[str], own: Path) -> list[Finding]:
    """Is nnUNet_extTrainer set, are its folders there, and is this package's among them?"""
    folders = _folders(environment)
    if not folders:
        return [Finding(VARIABLE, PROBLEM, f"not set: nnU-Net will not find {', '.join(expected)}", ACTIVATE)]
    findings = []
    missing = [folder for folder in folders if not os.path.isdir(folder)]
    present = [folder for folder in folders if folder not in missing]
    if missing:
        rest = os.pathsep.join(present)
        findings.append(
            Finding(
                VARIABLE,
                WARNING,
                f"{', '.join(missing)}: no such folder, nnU-Net passes over it",
                f'export {VARIABLE}="{rest}"' if rest else f"unset {VARIABLE}; {ACTIVATE}",
            )
        )
    if present and not any(_same(folder, own) for folder in present):
        findings.append(Finding(VARIABLE, WARNING, f"{os.pathsep.join(folders)} lacks {own}", ACTIVATE))
    return findings or [Finding(VARIABLE, OK, os.pathsep.join(folders))]


def trainer_findings(
    answer: Answer, expected: Mapping[str, str], own: Path, environment: Mapping[str, str]
) -> list[Finding]:
    """What nnU-Net's own finder made of the expected trainers.

    Args:
        answer: of :func:`~nnssl_plugin.doctor.asking.ask_nnunet`.
        expected: of :func:`expected_trainers`.
        own: this package's folder of trainers.
        environment: for nnUNet_extTrainer, from which the remedies are made.
    """
    facts = answer.facts
    if facts.get("nnunet_error"):
        return [_nnunet_broken(facts["nnunet_error"])]
    if "trainers" not in facts:
        return [
            Finding(
                "search",
                PROBLEM,
                f"nnU-Net's search did not come to an end: {answer.error}",
                'python -c "import nnunetv2.utilities.find_objects"   (shows where it stops)',
            )
        ]
    if not _folders(environment):  # path_findings has said so, once for all trainers
        return []
    found = {name: facts["trainers"][name] for name in expected if not facts["trainers"][name]["error"]}
    missing = [name for name in expected if name not in found]
    findings = [_broken(broken, missing, own) for broken in facts.get("broken", [])]
    findings += [_found(name, said, expected[name], own, environment) for name, said in found.items()]
    if missing and not any(finding.status == PROBLEM for finding in findings):
        findings.append(Finding("not found", PROBLEM, ", ".join(missing), ACTIVATE))
    return findings


def _folders(environment: Mapping[str, str]) -> list[str]:
    return [folder for folder in environment.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def _same(folder: str, own: Path) -> bool:
    return Path(folder).resolve() == own.resolve()


def _nnunet_broken(error: str) -> Finding:
    remedy = "Mend torch and torchvision first, as said under their heading."
    if "torchvision" not in error:
        remedy = "pip install --force-reinstall nnunetv2   (unless another heading names the cause)"
    return Finding(
        "none found", PROBLEM, f"nnU-Net's own trainers cannot be imported, which hides all others: {error}", remedy
    )


def _broken(broken: Mapping[str, str], missing: list[str], own: Path) -> Finding:
    """A module that fails to import: nnU-Net's search ends there with its error."""
    hides = f"which hides {', '.join(missing)}" if missing else "which hides what sorts after it"
    folder = Path(broken["file"]).parent
    remedy = f'Mend it, or: mv "{broken["file"]}" "{broken["file"]}.off"'
    if _same(str(folder), own):
        remedy = "pip install --force-reinstall ."
    if broken["error"].startswith("ModuleNotFoundError: No module named "):
        remedy = f"pip install {broken['error'].split(chr(39))[1].split('.')[0]}   (or its package of another name)"
    return Finding(
        broken["module"],
        PROBLEM if missing else WARNING,
        f"{broken['file']} cannot be imported, {hides}: {broken['error']}",
        remedy,
    )


def _found(name: str, said: Mapping[str, str], module: str, own: Path, environment: Mapping[str, str]) -> Finding:
    if said["module"] == module:
        return Finding(name, OK, said["file"])
    others = [folder for folder in _folders(environment) if not _same(folder, own)]
    remedy = f'export {VARIABLE}="{os.pathsep.join([str(own), *others])}"'
    if said["module"].startswith("nnunetv2."):
        remedy = f'Take the class out of "{said["file"]}": nnU-Net\'s own folder comes first.'
    return Finding(name, PROBLEM, f"nnU-Net finds another one first, in {said['file']}", remedy)
