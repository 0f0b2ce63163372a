"""Who may import whom: an import against the arrows of the house fails here."""

import ast
from importlib.util import resolve_name

import pytest

FLOORS = (
    ("io", "errors", "settings"),
    ("objectives", "transforms", "diagnostics", "statistics", "networks"),
    ("nnunet",),
    ("data", "checkpoints"),
    ("training", "features"),
    ("captions", "pretraining", "finetuning", "intake"),
    ("tasks",),
    ("methods",),
    ("pretrain_trainers", "plans", "registry"),
    ("doctor", "quickstart"),
    ("cli",),
    ("api",),
    ("__init__",),
)
"""Packages from the ground up: each may import what stands on lower floors; those of the ground one another too.

The functions that the package itself offers are its top: nothing imports them."""
FLOOR = {package: number for number, floor in enumerate(FLOORS) for package in floor}
FORBIDDEN = {"intake": {"training", "checkpoints"}, "registry": set(FLOOR) - set(FLOORS[0])}
"""Package → packages of lower floors that it may not import all the same."""
FOLDERS_APART = ("methods", "tasks")
"""Packages whose folders may not import one another: a method no other method, a task no other task."""
WITHOUT_NNUNET = {*FLOORS[0], *FLOORS[1], "registry"}
"""Packages that are read and tested without nnU-Net; in a method's folder only ``trainer.py`` knows it."""
WITHOUT_A_TRAINER = {
    "nnssl_plugin.training.pictures",
    "nnssl_plugin.pretraining.pretext",
    "nnssl_plugin.pretraining.settings",
}
"""Modules of the trainers' packages that know no nnU-Net: all that the other files of a method may import of them."""


def imported_modules(module: str, source: str) -> list[str]:
    """Dotted names of everything that a module imports, wherever in its text the import stands."""
    package = module.rpartition(".")[0]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            names += [f"{base}.{alias.name}" for alias in node.names] if base == "nnssl_plugin" else [base]
    return names


def wrong_imports(module: str, source: str) -> list[str]:
    """The imports of ``module`` (a dotted name) that run against the arrows."""
    return [f"{module} imports {name}" for name in imported_modules(module, source) if _against(module, name)]


def _against(module: str, name: str) -> bool:
    parts, imported = module.split("."), name.split(".")
    package = parts[1] if len(parts) > 1 else ""
    in_method = package == "methods" and parts[-1] != "trainer"
    if imported[0] == "nnunetv2":
        return package in WITHOUT_NNUNET or in_method
    if imported[0] != "nnssl_plugin" or len(imported) == 1 or imported[1] == "__version__":
        return False
    if imported[1] == package:
        return package in FOLDERS_APART and imported[2:3] != parts[2:3]
    if imported[1] in FORBIDDEN.get(package, ()):
        return True
    if in_method and imported[1] in ("training", "pretraining"):
        return name not in WITHOUT_A_TRAINER
    if imported[1] not in FLOOR:  # a function of the package itself
        return True
    return FLOOR[imported[1]] >= FLOOR[package] and imported[1] not in FLOORS[0]


def modules(repository):
    for top, prefix in (("nnssl_plugin", ()), ("pretrain_trainers", ("nnssl_plugin",)), ("plans", ("nnssl_plugin",))):
        for path in sorted((repository / top).rglob("*.py")):
            parts = path.relative_to(repository).with_suffix("").parts
            yield ".".join(prefix + parts), path.read_text()


def test_every_package_stands_on_a_floor(repository):
    packages = {name.split(".")[1] for name, _ in modules(repository)}
    assert packages <= set(FLOOR)


def test_imports_run_along_the_arrows(repository):
    assert [wrong for name, source in modules(repository) for wrong in wrong_imports(name, source)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nnssl_plugin.transforms.masks", "from nnssl_plugin.networks.backbone import Backbone"),
        ("nnssl_plugin.transforms.masks", "def f():\n    from ..networks import backbone"),
        ("nnssl_plugin.transforms.masks", "import nnunetv2.paths"),
        ("nnssl_plugin.pretraining.pretrainer", "from nnssl_plugin import methods"),
        ("nnssl_plugin.pretraining.pretrainer", "import nnssl_plugin.registry"),
        ("nnssl_plugin.checkpoints.adapt", "from nnssl_plugin.methods.med3dinsight.settings import Settings"),
        ("nnssl_plugin.data.cases", "from nnssl_plugin.methods import med3dinsight"),
        ("nnssl_plugin.methods.med3dinsight.objective", "from nnssl_plugin.pretraining.pretrainer import Pretrainer"),
        ("nnssl_plugin.methods.med3dinsight.views", "from nnunetv2.paths import nnUNet_raw"),
        ("nnssl_plugin.methods.s2dc.views", "from nnssl_plugin.training.figures import draw_progress"),
        ("nnssl_plugin.methods.s2dc.objective", "from nnssl_plugin.methods.med3dinsight.psat import QueryEmbedding"),
        ("nnssl_plugin.tasks.probing.tokens", "from nnssl_plugin.tasks.segmentation.runs import find_run"),
        ("nnssl_plugin.tasks.segmentation.trainer", "from nnssl_plugin.methods.s2dc.settings import Settings"),
        ("nnssl_plugin.checkpoints.format.files", "from nnssl_plugin.data.cases import Cases"),
        ("nnssl_plugin.intake.scans", "from nnssl_plugin.captions.triplets import Volume"),
        ("nnssl_plugin.intake.unlabelled", "from nnssl_plugin.training import launch"),
        ("nnssl_plugin.registry", "from nnssl_plugin.methods.s2dc.settings import Settings"),
        ("nnssl_plugin.errors", "from nnssl_plugin.cli.main import main"),
        ("nnssl_plugin.cli.adapt", "from nnssl_plugin import load_backbone"),
        ("nnssl_plugin.cli.prepare", "from nnssl_plugin.api import prepare"),
    ],
)
def test_an_import_against_the_arrows_is_found(module, source):
    assert len(wrong_imports(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nnssl_plugin.methods.med3dinsight.trainer", "import nnunetv2\nfrom nnssl_plugin.training import pretrainer"),
        ("nnssl_plugin.networks.backbone", "import torch\nfrom nnssl_plugin.errors import UserError"),
        ("nnssl_plugin.cli.adapt", "from nnssl_plugin.checkpoints.adapt import adapt"),
        ("nnssl_plugin.cli.main", "from nnssl_plugin import __version__"),
        ("nnssl_plugin.methods.s2dc.pictures", "from nnssl_plugin.training.pictures import Overlay"),
        ("nnssl_plugin.methods.brainmvp.finetuning", "from nnssl_plugin.tasks.segmentation import trainer"),
        ("nnssl_plugin.intake.unlabelled", "from nnssl_plugin.io.scans import load_scan"),
        ("nnssl_plugin.api", "from nnssl_plugin.captions.triplets import caption_dataset"),
        ("nnssl_plugin.__init__", "from nnssl_plugin.api import prepare"),
        ("nnssl_plugin.tasks.segmentation.trainer", "from . import schedules\nfrom ...checkpoints import format"),
    ],
)
def test_an_import_along_the_arrows_passes(module, source):
    assert wrong_imports(module, source) == []
