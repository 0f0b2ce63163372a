"""Which packages are installed, held against what this package's own metadata ask for."""

import os
import platform
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from nnssl_plugin.doctor.finding import OK, PROBLEM, WARNING, Finding

OWN = "nnssl_plugin"
SHOWN = ("nnunetv2", "torch", "torchvision", "open_clip_torch", "dynamic-network-architectures", "batchgenerators")
"""Requirements with a line each; the others share one as long as nothing is wrong with them."""
COMMAND = "nnUNetv2_train"
OPTIONAL = ("monai",)


def installed_versions() -> dict[str, str]:
    """Canonical name → version of every package that this interpreter finds; the first on the path counts."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(canonicalize_name(name), distribution.version)
    return versions


def own_requirements() -> tuple[str, list[str]]:
    """``Requires-Python`` and ``Requires-Dist`` of this package; both empty when it is not installed."""
    try:
        own = metadata.metadata(OWN)
    except metadata.PackageNotFoundError:
        return "", []
    return (own.get_all("Requires-Python") or [""])[0], own.get_all("Requires-Dist") or []


def package_findings(
    installed: Mapping[str, str], requires_python: str, requires: Sequence[str], *, python: str | None = None
) -> list[Finding]:
    """One finding per package that matters; requirements that are met and rarely matter share one.

    Args:
        installed: canonical name → version.
        requires_python: range of Python versions, as in package metadata.
        requires: requirements as in ``Requires-Dist``, those of extras among them.
        python: the running version; default: this interpreter's.
    """
    needed, optional = _split([Requirement(text) for text in requires])
    first = [_python(requires_python, python or platform.python_version()), _own(installed)]
    findings = {name: _required(requirement, installed) for name, requirement in needed.items()}
    shown = [findings.pop(canonicalize_name(name)) for name in SHOWN if canonicalize_name(name) in findings]
    wrong = [finding for finding in findings.values() if finding.status != OK]
    quiet = [name for name, finding in findings.items() if finding.status == OK]
    others = [Finding("others", OK, f"{len(quiet)} more packages, as {OWN} asks for them")] if quiet else []
    return [*first, *shown, *wrong, *others, *(_optional(name, optional.get(name), installed) for name in OPTIONAL)]


def scripts_folder() -> str:
    """Where this interpreter's commands lie."""
    return sysconfig.get_path("scripts")


def command_findings(environment: Mapping[str, str], scripts: str) -> list[Finding]:
    """Does PATH lead to nnU-Net's commands of this installation, and not to those of another environment?"""
    own = shutil.which(COMMAND, path=scripts)
    if own is None:
        return []
    first = shutil.which(COMMAND, path=environment.get("PATH", ""))
    if first is not None and os.path.realpath(os.path.dirname(first)) == os.path.realpath(scripts):
        return [Finding(COMMAND, OK, own)]
    why = "not on PATH" if first is None else f"PATH leads to that of another environment, {first}"
    return [Finding(COMMAND, WARNING, why, f'export PATH="{scripts}{os.pathsep}$PATH"')]


def parse_requirement(text: str) -> Requirement | None:
    """A line of ``Requires-Dist``, or None where it is not well formed (foreign metadata)."""
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _split(requirements: Sequence[Requirement]) -> tuple[dict[str, Requirement], dict[str, Requirement]]:
    """Those that hold in every installation here, and those of extras; by canonical name."""
    needed: dict[str, Requirement] = {}
    optional: dict[str, Requirement] = {}
    for requirement in requirements:
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        (needed if holds else optional)[canonicalize_name(requirement.name)] = requirement
    return needed, optional


def _python(requires_python: str, version: str) -> Finding:
    if not requires_python or Requirement(f"python{requires_python}").specifier.contains(version, prereleases=True):
        return Finding("Python", OK, version)
    return Finding(
        "Python",
        PROBLEM,
        f"{version}; {OWN} asks for {requires_python}",
        "conda create -n nnssl python=3.11   (or another way to a newer Python, then install again)",
    )


def _own(installed: Mapping[str, str]) -> Finding:
    version = installed.get(canonicalize_name(OWN))
    if version:
        return Finding(OWN, OK, version)
    return Finding(
        OWN,
        PROBLEM,
        "runs, but is not installed: nnU-Net's commands cannot import it",
        "pip install .   (in the folder that holds setup.cfg)",
    )


def _required(requirement: Requirement, installed: Mapping[str, str]) -> Finding:
    version = installed.get(canonicalize_name(requirement.name))
    install = f'pip install "{requirement.name}{requirement.specifier}"'
    if version is None:
        return Finding(requirement.name, PROBLEM, "not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, PROBLEM, f"{version}; {OWN} asks for {requirement.specifier}", install)
    return Finding(requirement.name, OK, version)


def _optional(name: str, requirement: Requirement | None, installed: Mapping[str, str]) -> Finding:
    version = installed.get(name)
    if version is None:
        return Finding(name, OK, "not installed (optional)")
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        return Finding(
            name,
            WARNING,
            f"{version}; where it is used, {requirement.specifier} is asked for",
            f'pip install "{name}{requirement.specifier}"',
        )
    return Finding(name, OK, f"{version} (optional)")
