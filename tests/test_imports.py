"""Imports point one way, from later rows of ORDER to earlier ones, and light commands import nothing heavy."""

from __future__ import annotations

import ast
import importlib.resources
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cifarlab
from cifarlab.recipe import load_recipe, recipe_names

SOURCE = Path(cifarlab.__file__).parent
# Each row may import from the rows above it; `x.*` is every module of the package x, which may import one another.
ORDER = (
    "cifarlab",
    "errors",
    "files",
    "plain",
    "background",
    "seeds",
    "recipe_base",
    "recipe_schedule",
    "recipe_optimizer",
    "recipe_sections",
    "recipes",
    "recipe",
    "machine",
    "distributed",
    "download",
    "remembered",
    "data",
    "data.dataset",
    "data.unpickle",
    "data.cifar",
    "data.cifar_download data.cifar_kept",
    "data.digits data.leaks data.split",
    "data.facts",
    "data.packed",
    "data.folder",
    "data.sources",
    "data.prepare",
    "data.color",
    "data.augment data.mixing",
    "data.batches",
    "models models.*",
    "schedule",
    "optim",
    "batchnorm convolutions graphs",
    "numerics",
    "rundir",
    "board",
    "metrics",
    "features",
    "evaluate",
    "flops",
    "pruning",
    "pace",
    "budget",
    "task",
    "feed",
    "training_step",
    "train",
    "build",
    "choices",
    "fit",
    "examples",
    "lr_find",
    "predict",
    "export",
    "plots",
    "compare",
    "stats",
    "study",
    "report report.*",
    "experiment",
    "verify doctor",
    "bench bench.*",
    "factors",
    "ablate",
    "search",
    "workers",
    "ray_workers",
    "cli cli.*",
    "__main__",
)
# What looks at results: none of it reaches the training code, not even by way of another module.
READERS = ("rundir", "compare", "report", "plots", "metrics")
TRAINING = ("train", "experiment", "models", "data.batches")


def modules() -> dict[str, Path]:
    """Every module of the package by its name without `cifarlab.`; a package goes by the name of its folder."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "cifarlab"] = path
    return found


def imports(source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """The lines and names of this package's modules that a source imports, wherever in it: in functions as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it from cifarlab on"
            # `from cifarlab import files` imports a module, `from cifarlab import __version__` a name.
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in full:
            package, _, rest = name.partition(".")
            if package != "cifarlab":
                continue
            while rest and rest not in known:
                rest = rest.rpartition(".")[0]
            yield node.lineno, rest or "cifarlab"


def row_of(module: str) -> int | None:
    """The number of a module's row: the one that names it, or else its package's `x.*`."""
    for entry in (module, module.partition(".")[0] + ".*"):
        for number, row in enumerate(ORDER):
            if entry in row.split() and (entry == module or "." in module):
                return number
    return None


def complaints(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports of modules, given as texts by their names; a sentence each."""
    wrong = []
    for module in sources:
        if row_of(module) is None:
            wrong.append(f"{module} has no row in ORDER; give it one, after all that it imports")
    for module, source in sources.items():
        row = row_of(module)
        for line, imported in imports(source, set(sources)):
            below = row_of(imported)
            if row is None or below is None or imported == module:
                continue
            within = row == below and ".*" in ORDER[row]
            if below >= row and not within:
                wrong.append(f"{module}, line {line}, imports {imported}, which comes later; only earlier ones may be")
    return wrong


def sources() -> dict[str, str]:
    return {module: path.read_text(encoding="utf-8") for module, path in modules().items()}


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    return {module: {name for _, name in imports(text, set(sources))} - {module} for module, text in sources.items()}


def test_imports_point_one_way() -> None:
    wrong = complaints(sources())
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_import_goes_in_a_circle() -> None:
    try:
        TopologicalSorter(graph(sources())).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' < '.join(error.args[1])}")


def reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    found, waiting = {start}, [start]
    while waiting:
        new = edges.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def belongs(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_what_reads_run_folders_does_not_reach_the_training_code() -> None:
    edges = graph(sources())
    readers = [module for module in edges if belongs(module, READERS)]
    assert {"rundir", "compare"} <= set(readers)
    for module in readers:
        training = sorted(name for name in reached(module, edges) if belongs(name, TRAINING))
        assert not training, f"{module} reaches {', '.join(training)}; it may read run folders only"


def test_the_rows_name_modules_of_this_package_each_once() -> None:
    entries = [entry for row in ORDER for entry in row.split()]
    assert len(entries) == len(set(entries))
    assert len(modules()) > 20
    # Rows for modules that are still to be written are fine; most are there.
    assert sum(entry in modules() for entry in entries) > 20


@pytest.mark.parametrize(
    ("module", "source", "sentence"),
    [
        ("recipe", "from cifarlab.train import train", "recipe, line 1, imports train, which comes later"),
        ("recipe", "import cifarlab.train", "recipe, line 1, imports train, which comes later"),
        ("rundir", "from cifarlab import files, train", "rundir, line 1, imports train, which comes later"),
        ("schedule", "\ndef f():\n    from cifarlab.optim import x", "schedule, line 3, imports optim"),
        ("data.cifar", "if TYPE_CHECKING:\n    from cifarlab.data import digits", "imports data.digits"),
        ("data.split", "from cifarlab.data.leaks import twins", "data.split, line 1, imports data.leaks"),
        ("compare", "from cifarlab.report.page import x", "compare, line 1, imports report.page"),
        ("report.page", "from cifarlab.experiment import x", "report.page, line 1, imports experiment"),
        ("surprise", "", "surprise has no row in ORDER; give it one"),
        ("data.surprise", "", "data.surprise has no row in ORDER; give it one"),
    ],
)
def test_an_import_that_points_the_other_way_is_found(module: str, source: str, sentence: str) -> None:
    extra = {"report.page": "", "data.digits": "", "data.leaks": "", "train": "", "optim": "", "experiment": ""}
    (wrong,) = complaints(extra | {"files": "", "report": "", module: source})
    assert sentence in wrong


def test_an_import_from_an_earlier_row_or_within_a_package_is_fine() -> None:
    assert not complaints(
        {
            "cifarlab": "",
            "errors": "",
            "files": "from cifarlab import __version__\nfrom cifarlab.errors import nearest",
            "cli": "from cifarlab.cli.tables import x\nimport os, numpy.errors",
            "cli.tables": "from cifarlab.files import x",
        }
    )
    with pytest.raises(AssertionError, match="line 1: a relative import"):
        complaints({"cli": "from . import tables"})


# --- weight -----------------------------------------------------------------------------------------


HEAVY = (
    *("torch", "torchvision", "timm", "numpy", "matplotlib", "sklearn", "yaml", "PIL", "httpx", "pyarrow", "psutil"),
    *("safetensors", "huggingface_hub"),
)


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], (*HEAVY, "pydantic")),
        (["--version"], (*HEAVY, "pydantic")),
        # typer takes pydantic to read a command's arguments.
        (["run", "--help"], HEAVY),
        (["compare", "--help"], HEAVY),
        (["models", "--help"], HEAVY),
        (["report", "--help"], HEAVY),
        (["board", "--help"], (*HEAVY, "tensorboard")),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str], heavy: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        "from cifarlab.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        f"found = set({heavy!r}) & set(sys.modules)\n"
        "sys.exit(f'imports {sorted(found)}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout or cifarlab.__version__ in done.stdout


# --- recipes ----------------------------------------------------------------------------------------


def test_packaged_recipes_are_found_among_the_resources() -> None:
    found = [file.name for file in importlib.resources.files("cifarlab.recipes").iterdir()]
    on_disk = sorted(path.stem for path in (SOURCE / "recipes").glob("*.yaml"))
    assert sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml")) == on_disk
    assert recipe_names() == on_disk
    assert "ex1" in on_disk
    for name in on_disk:
        assert load_recipe(name).name == name
