"""Do torch and torchvision fit each other?

nnU-Net imports all of its own trainers before it looks into external folders, one of them imports timm, and timm
torchvision: a pair that does not fit makes every external trainer "not found".
"""

from nnssl_plugin.doctor.asking import Answer
from nnssl_plugin.doctor.finding import OK, PROBLEM, WARNING, Finding
from nnssl_plugin.doctor.packages import parse_requirement

TOPIC = "torch + torchvision"


def pair_findings(answer: Answer) -> list[Finding]:
    """What :func:`~nnssl_plugin.doctor.asking.ask_torch` was told about the pair.

    A pair that does not import is a problem. One that imports although the metadata disagree (builds of one's own, of
    clusters and of NVIDIA's containers) is a warning.
    """
    facts = answer.facts
    torch, vision = facts.get("torch"), facts.get("torchvision")
    if not torch or not vision:
        missing = " and ".join(name for name in ("torch", "torchvision") if not facts.get(name))
        why = f"{missing} not installed" if "torch" in facts else f"could not be looked at: {answer.error}"
        return [Finding(TOPIC, PROBLEM, why, "pip install torch torchvision")]
    wanted = _torch_that(vision, torch["version"])
    pair = (
        f"torch {facts.get('torch_build') or torch['version']}, "
        f"torchvision {facts.get('torchvision_build') or vision['version']}"
    )
    mend = f"pip install --force-reinstall {wanted} torchvision=={_public(vision['version'])}"
    if facts.get("torch_error"):
        return [Finding(TOPIC, PROBLEM, f"{pair}: torch cannot be imported: {facts['torch_error']}", mend)]
    error = facts.get("torchvision_error", answer.error or "no answer")
    if error:
        return [Finding(TOPIC, PROBLEM, f"{pair} do not fit: {error}", mend)]
    if not _fits(vision, torch["version"]):
        return [Finding(TOPIC, WARNING, f"{pair} import, but this torchvision was built for {_asked(vision)}", mend)]
    return [Finding(TOPIC, OK, f"{pair} fit and import")]


def _asked(vision: dict) -> str:
    """What torchvision's metadata ask for, for example ``torch==2.13.0``; empty when they do not say."""
    found = [parse_requirement(text) for text in vision["requires"]]
    return next((f"torch{r.specifier}" for r in found if r and r.name == "torch" and r.specifier), "")


def _fits(vision: dict, torch_version: str) -> bool:
    asked = parse_requirement(_asked(vision))
    return asked is None or asked.specifier.contains(torch_version, prereleases=True)


def _torch_that(vision: dict, torch_version: str) -> str:
    """The torch to install beside this torchvision, as an argument of pip."""
    asked = _asked(vision)
    if asked.startswith("torch==") and "," not in asked:
        return asked
    return f"torch=={_public(torch_version)}" if _fits(vision, torch_version) else f'"{asked}"'


def _public(version: str) -> str:
    """A version without its build, so that pip takes both from one place: ``2.13.0+cpu`` → ``2.13.0``."""
    return version.partition("+")[0]
