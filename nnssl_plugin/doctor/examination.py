"""The whole examination, in the order in which it is shown: what is quick first."""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from nnssl_plugin.doctor import asking, datasets, folders, gpu, packages, torch_pair, trainers, workers
from nnssl_plugin.doctor.finding import Finding

_log = logging.getLogger(__name__)


def examine(environment: Mapping[str, str], *, device: str | None = None, dataset: str | None = None) -> list[Finding]:
    """All findings at once; see :func:`examination`."""
    return [finding for section in examination(environment, device=device, dataset=dataset) for finding in section]


def examination(
    environment: Mapping[str, str], *, device: str | None = None, dataset: str | None = None
) -> Iterator[list[Finding]]:
    """Look at packages, folders, workers, a dataset, disk, torch, GPU and trainers; yield the findings per section.

    torch and nnU-Net are asked in processes of their own, which start first and are waited for last.

    Args:
        environment: the variables under which nnU-Net will run.
        device: ``cuda`` makes a missing GPU a problem, ``cpu`` says that none is meant.
        dataset: ID or full name of a dataset to look at as well.
    """
    own = trainers.own_folder()
    expected = trainers.expected_trainers(own)
    with ThreadPoolExecutor(3) as executor:
        torch = executor.submit(asking.ask_torch, environment)
        nnunet = executor.submit(asking.ask_nnunet, environment, list(expected))
        driver = executor.submit(gpu.driver_says, environment)
        installed = packages.package_findings(packages.installed_versions(), *packages.own_requirements())
        yield _under("Packages", [*installed, *packages.command_findings(environment, packages.scripts_folder())])
        yield _under("nnU-Net's folders", folders.folder_findings(environment))
        yield _under("Workers", workers.worker_findings(environment, workers.this_machine()))
        yield from _storage(environment, dataset)
        _log.info("(asking torch and nnU-Net: about 15 seconds)")
        answer = torch.result()
        yield _under("torch", torch_pair.pair_findings(answer))
        yield _under("GPU", gpu.gpu_findings(answer, driver.result(), environment, device=device))
        yield _under(
            "Trainers, as nnU-Net finds them",
            [
                *trainers.path_findings(environment, expected, own),
                *trainers.trainer_findings(nnunet.result(), expected, own, environment),
            ],
        )


def _storage(environment: Mapping[str, str], dataset: str | None) -> Iterator[list[Finding]]:
    if dataset is None:
        yield _under("Free disk", folders.disk_findings(environment))
        return
    found, findings = datasets.find_dataset(environment, dataset)
    need = None
    if found is not None:
        need, unreadable = datasets.room_needed(found)
        findings = [*findings, *datasets.dataset_findings(found), *unreadable]
    yield _under(f"Dataset {dataset}", findings)
    yield _under("Free disk", folders.disk_findings(environment, need))


def _under(section: str, findings: list[Finding]) -> list[Finding]:
    return [replace(finding, section=section) for finding in findings]
