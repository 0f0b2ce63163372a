"""What torch and nnU-Net say of themselves: a script that runs in a process of its own, as they may be broken.

    python probe.py torch
    python probe.py trainers '["NAME", …]'

Facts are told as marked lines of JSON on stdout; what was told before the process died still counts.
"""

import inspect
import json
import os
import pkgutil
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata, util
from pathlib import Path

MARK = "nnssl_plugin-doctor-fact "


def tell(**facts):
    print(f"\n{MARK}{json.dumps(facts)}", flush=True)


def attempt(function, *arguments):
    """Result (or None) and error (or empty text), whatever foreign code raises: a future hands it over as a value."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(function, *arguments)
        error = future.exception()
    if error is None:
        return future.result(), ""
    return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def torch_facts():
    """Versions and builds of torch and torchvision, whether they import, and what torch can compute on."""
    tell(torch=metadata_of("torch"), torchvision=metadata_of("torchvision"))
    torch, error = attempt(import_module, "torch")
    tell(torch_error=error)
    if torch is None:
        return
    tell(torch_build=torch.__version__, torchvision_build=text_version("torchvision"), cuda_build=torch.version.cuda)
    tell(torchvision_error=attempt(import_module, "torchvision")[1])
    mps = getattr(torch.backends, "mps", None)
    tell(mps=bool(mps and mps.is_available()))
    gpus, error = attempt(gpu_facts, torch)
    tell(gpus=gpus or [], gpu_error=error)


def metadata_of(name):
    """Version and requirements from the package's metadata, without importing it; None when it is not installed."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return {"version": found.version, "requires": found.requires or []}


def text_version(name):
    """The version that ``NAME/version.py`` states, with its build (``+cpu``, ``+cu130``), without importing it."""
    spec = util.find_spec(name)
    path = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if path is None or not path.is_file():
        return None
    stated = re.search(r"^__version__ = ['\"]([^'\"]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return stated[1] if stated else None


def gpu_facts(torch):
    """One entry per CUDA device, after a first computation on it; sizes in bytes."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        (torch.ones(2, device=f"cuda:{index}") * 2).sum().item()
        free, total = torch.cuda.mem_get_info(index)
        found.append({"name": properties.name, "free": free, "total": total, "bf16": properties.major >= 8})
    return found


def trainer_facts(names):
    """What nnU-Net's own finder makes of these names, and which modules of the external folders fail to import."""
    finder, error = attempt(import_module, "nnunetv2.utilities.find_objects")
    tell(nnunet_error=error or attempt(walk_own_trainers, finder)[1])
    folders = [p for p in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if p.strip() and os.path.exists(p)]
    tell(broken=[broken for folder in folders for broken in broken_modules(folder)])
    if finder is not None:
        tell(trainers={name: look_up(finder, name) for name in names})


def walk_own_trainers(finder):
    """Import every trainer module of nnU-Net, as it does before it looks into external folders."""
    import nnunetv2

    root = nnunetv2.__path__[0]
    folder = os.path.join(root, "training", "nnUNetTrainer")
    finder.recursive_find_python_class(folder, "no class has this name", "nnunetv2.training.nnUNetTrainer", root)


def look_up(finder, name):
    """The class that nnU-Net finds under a name: the module and file that define it, or the error."""
    found, error = attempt(finder.recursive_find_trainer_class_by_name, name)
    if found is None:
        return {"error": error}
    defined_in = sys.modules.get(found.__module__)
    file = getattr(defined_in, "__file__", None)
    if file is None:  # defined in an external folder, whose modules nnU-Net forgets again
        functions = [member for member in vars(found).values() if inspect.isfunction(member)]
        file = functions[0].__code__.co_filename if functions else "an external folder"
    return {"module": found.__module__, "file": file, "error": ""}


def broken_modules(folder):
    """The modules of an external folder that fail to import, in the order in which nnU-Net imports them."""
    sys.path.insert(0, os.path.abspath(folder))
    found = []
    for name, file in modules_below(folder):
        before = set(sys.modules)
        _, error = attempt(import_module, name)
        if error:
            found.append({"module": name, "file": file, "error": error})
        for new in set(sys.modules) - before:
            if (getattr(sys.modules[new], "__file__", None) or "").startswith(os.path.abspath(folder) + os.sep):
                del sys.modules[new]
    del sys.path[0]
    return found


def modules_below(folder, prefix=""):
    entries = list(pkgutil.iter_modules([folder]))
    for entry in entries:
        if not entry.ispkg:
            yield f"{prefix}{entry.name}", os.path.join(folder, f"{entry.name}.py")
    for entry in entries:
        if entry.ispkg:
            yield from modules_below(os.path.join(folder, entry.name), f"{prefix}{entry.name}.")


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # this script's folder: nothing beside it may shadow a package
    if sys.argv[1] == "torch":
        torch_facts()
    else:
        trainer_facts(json.loads(sys.argv[2]))
