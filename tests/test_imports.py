"""Who may import whom: an import against the arrows of the house fails here."""

import ast
from importlib.util import resolve_name

import pytest

LEAVES = {"errors", "files", "planes", "triplets", "class_labels", "phantoms", "plan_edits", "plan_files"}
"""Helper modules at the top, and what a room may always import."""

MAY_IMPORT = {
    **{leaf: LEAVES for leaf in LEAVES},
    "objectives": LEAVES,
    "networks": LEAVES | {"objectives"},
    "pretext": LEAVES | {"objectives", "networks"},
    "data": LEAVES | {"objectives", "networks", "pretext"},
    "checkpoints": LEAVES | {"objectives", "networks", "pretext"},
    "training": LEAVES | {"objectives", "networks", "pretext", "data", "checkpoints", "evaluation"},
    "methods": LEAVES | {"objectives", "networks", "pretext", "data", "checkpoints", "training"},
    "registry": LEAVES | {"methods"},
    "intake": LEAVES,
    "evaluation": LEAVES | {"objectives", "networks", "data", "checkpoints"},
    "inference": LEAVES | {"data", "checkpoints", "training", "evaluation"},
    "quickstart": LEAVES | {"checkpoints", "evaluation", "intake", "training"},
    "doctor": LEAVES | {"registry", "pretrain_trainers"},
    "pretrain_trainers": {"training", "methods"},
    "plans": set(),
}
"""Room → rooms that it may import; ``cli`` stands on top of all of them."""

WITHOUT_NNUNET = {"objectives", "networks", "pretext", "registry", *LEAVES - {"plan_edits", "plan_files"}}
"""Rooms that are read and tested without nnU-Net."""


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
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else ""
    in_method = room == "methods" and parts[-1] != "trainer"
    wrong = []
    for name in imported_modules(module, source):
        target = name.split(".")[1] if name.startswith("nnssl_plugin.") else ""
        if name.split(".")[0] == "nnunetv2":
            against = room in WITHOUT_NNUNET or in_method
        elif not target or target == "__version__" or target == room or room == "cli":
            against = False
        else:
            against = target not in MAY_IMPORT[room] or (in_method and target == "training")
        if against:
            wrong.append(f"{module} imports {name}")
    return wrong


def modules(repository):
    for top, prefix in (("nnssl_plugin", ()), ("pretrain_trainers", ("nnssl_plugin",)), ("plans", ("nnssl_plugin",))):
        for path in sorted((repository / top).rglob("*.py")):
            parts = path.relative_to(repository).with_suffix("").parts
            yield ".".join(prefix + parts), path.read_text()


def test_every_room_has_a_rule(repository):
    rooms = {name.split(".")[1] for name, _ in modules(repository)} - {"__init__", "cli"}
    assert rooms <= set(MAY_IMPORT)


def test_imports_run_along_the_arrows(repository):
    assert [wrong for name, source in modules(repository) for wrong in wrong_imports(name, source)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nnssl_plugin.objectives.masking", "from nnssl_plugin.networks.backbone import Backbone"),
        ("nnssl_plugin.objectives.masking", "def f():\n    from ..networks import backbone"),
        ("nnssl_plugin.objectives.masking", "import nnunetv2.paths"),
        ("nnssl_plugin.training.pretrainer", "from nnssl_plugin import methods"),
        ("nnssl_plugin.training.pretrainer", "import nnssl_plugin.registry"),
        ("nnssl_plugin.checkpoints.adapt", "from nnssl_plugin.methods.med3dinsight.settings import Settings"),
        ("nnssl_plugin.data.cases", "from nnssl_plugin.methods import med3dinsight"),
        ("nnssl_plugin.methods.med3dinsight.objective", "from nnssl_plugin.training.pretrainer import Pretrainer"),
        ("nnssl_plugin.methods.med3dinsight.views", "from nnunetv2.paths import nnUNet_raw"),
        ("nnssl_plugin.intake.prepare", "from nnssl_plugin.training import pretrainer"),
        ("nnssl_plugin.errors", "from nnssl_plugin.cli.main import main"),
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
        ("nnssl_plugin.training.segmentation", "from . import schedules\nfrom ..checkpoints import safe_reading"),
    ],
)
def test_an_import_along_the_arrows_passes(module, source):
    assert wrong_imports(module, source) == []
