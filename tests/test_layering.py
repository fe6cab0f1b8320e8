"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import compresslab
from compresslab.methods import METHODS

ROOT = Path(compresslab.__file__).parent
MODULES = {
    ".".join(("compresslab", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.parent != ROOT / "peers" / "scripts"  # these run in the peers' environments, where we are not installed
}
METHOD_FOLDERS = {cls.__module__.rpartition(".")[0] for cls in METHODS.values()}

# From the bottom of the package to its top: a module may import its own row and the rows before it.
ROWS: list[tuple[str, ...]] = [
    ("errors", "numerics"),
    ("contract",),
    (*(folder.removeprefix("compresslab.") for folder in sorted(METHOD_FOLDERS)), "search"),
    ("methods",),
    ("weights", "wheels", "architectures", "edits"),
    ("recipe", "zoo", "random_model", "data", "models", "deploy", "report"),
    (
        "plan",
        "flow",
        "positive",
        "groups",
        "training",
        "trainer",
        "masked",
        "masks",
        "lottery",
        "batch_norms",
        "supernet",
        "ranks",
        "sharding",
        "spilling",
        "prefetching",
        "heads",
        "losses",
    ),
    ("solving",),
    ("refining",),
    ("layerwise", "streamed", "tracing", "channel_rules", "coupling", "replaying", "smoothing", "rewriting", "aware"),
    ("cutting", "channels"),
    ("pruning", "removing", "recovering", "students", "features", "endpoint", "answers", "growing"),
    ("artifact", "measure", "preflight", "budget", "damage", "scoring", "zero_cost"),
    ("rotating", "mixed", "narrowing", "specialising", "thinning", "tuning", "exporters"),
    ("foretelling", "once_for_all"),
    ("stages",),
    ("questions", "learning"),
    ("teaching", "pairing", "teachers", "doubting"),
    ("pipeline", "evaluation", "warm", "doctor", "mobile", "serving"),
    ("caching", "distilling", "mutual"),
    ("staging",),
    ("peers", "sweep"),
    ("course",),
    ("cli",),
]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def nodes(module: str, lazy: bool) -> Iterator[ast.AST]:
    """All nodes of a module, or those that run when it is imported."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child)

    return walk(tree(module))


def imported(module: str, *, lazy: bool = True) -> set[str]:
    """Full names of the modules that a module imports; `from package import name` counts as package.name if that is one."""
    found: set[str] = set()
    for node in nodes(module, lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return found


def outsiders(module: str) -> set[str]:
    """The other packages that a module imports, without those of Python itself."""
    tops = {name.partition(".")[0] for name in imported(module)}
    return tops - set(sys.stdlib_module_names) - {"compresslab"}


def insiders(module: str) -> set[str]:
    return {name for name in imported(module) if name.partition(".")[0] == "compresslab"}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def row(module: str) -> int:
    part = module.removeprefix("compresslab.")
    return next(i for i, parts in enumerate(ROWS) if within(part, *parts))


NUMERICS = [module for module in MODULES if within(module, "compresslab.numerics")]
METHOD_FILES = [module for module in MODULES if within(module, *METHOD_FOLDERS)]
ALL_BUT_ROOT = [module for module in MODULES if module != "compresslab"]


def test_the_reader_of_imports_sees_them() -> None:
    """Or all tests below would pass whatever the source said."""
    assert imported("compresslab.numerics.gram") >= {"torch", "numpy", "compresslab.numerics.kernels"}
    assert "compresslab.pipeline" in imported("compresslab.cli.compressing")
    assert "compresslab.pipeline" not in imported("compresslab.cli.compressing", lazy=False)
    assert outsiders("compresslab.numerics.kernels") == {"numba", "numpy"}


@pytest.mark.parametrize("module", NUMERICS)
def test_numerics_knows_nothing_but_mathematics(module: str) -> None:
    assert outsiders(module) <= {"torch", "numpy", "numba"}
    assert all(within(name, "compresslab.numerics") for name in insiders(module))


@pytest.mark.parametrize("module", METHOD_FILES)
def test_a_method_knows_nothing_but_the_contract_numerics_and_a_method_it_builds_on(module: str) -> None:
    assert outsiders(module) <= {"torch", "numpy"}
    allowed = ("compresslab.numerics", "compresslab.contract", "compresslab.errors", *METHOD_FOLDERS)
    assert all(within(name, *allowed) for name in insiders(module))


@pytest.mark.parametrize("module", [module for module in MODULES if within(module, "compresslab.search")])
def test_search_knows_nothing_but_the_contract_and_numerics(module: str) -> None:
    assert outsiders(module) <= {"torch", "numpy", "scipy", "optuna"}
    allowed = ("compresslab.numerics", "compresslab.contract", "compresslab.errors", "compresslab.search")
    assert all(within(name, *allowed) for name in insiders(module))


@pytest.mark.parametrize("module", ALL_BUT_ROOT)
def test_models_and_data_come_from_six_files(module: str) -> None:
    names = ("models", "trainer", "data.hub", "zoo", "random_model", "course.character_model")
    files = [f"compresslab.{name}" for name in names]
    if module in files or within(module, "compresslab.deploy", "compresslab.architectures"):
        return
    assert not outsiders(module) & {"transformers", "datasets", "tokenizers", "huggingface_hub"}


@pytest.mark.parametrize("module", ALL_BUT_ROOT)
def test_imports_point_downwards(module: str) -> None:
    """Also the lazy ones, inside functions."""
    for name in insiders(module):
        assert name == "compresslab" or row(name) <= row(module), f"{module} imports {name}, of a higher layer"


READERS = (
    "compresslab.deploy",
    "compresslab.exporters",
    "compresslab.serving",
    "compresslab.measure.fresh",
    "compresslab.models",
)


def test_what_reads_artifacts_loads_no_compiler() -> None:
    """numba is 118 MB of an export's memory, and of every process that measures."""
    reached = {module for module in MODULES if within(module, *READERS)}
    while (
        more := {n for m in reached for n in imported(m, lazy=False) if n in MODULES and n != "compresslab"} - reached
    ):
        reached |= more
    assert "compresslab.numerics.grid" in reached
    assert [module for module in sorted(reached) if "numba" in imported(module, lazy=False)] == []


@pytest.mark.parametrize("module", list(MODULES))
def test_nothing_imports_the_command_line(module: str) -> None:
    if within(module, "compresslab.cli"):
        return
    assert not any(within(name, "compresslab.cli") for name in insiders(module))


def test_there_are_no_cycles_at_import() -> None:
    graph = {m: {n for n in imported(m, lazy=False) if n in MODULES and n not in {m, "compresslab"}} for m in MODULES}
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}
    assert not graph, f"modules that need each other: {sorted(graph)}"


def test_names_say_what_is_inside() -> None:
    empty = {"base", "utils", "helpers", "common", "core", "manager"}
    assert not [module for module in MODULES if empty & set(module.split("."))]


def test_every_module_says_what_it_is_for() -> None:
    assert not [module for module in MODULES if not ast.get_docstring(tree(module))]


def test_few_public_names() -> None:
    declared = getattr(compresslab, "__all__", None)
    submodules = {name.split(".")[1] for name in MODULES if "." in name}
    public = declared if declared is not None else [n for n in vars(compresslab) if n[0] != "_" and n not in submodules]
    assert len(public) <= 15
    assert all(hasattr(compresslab, name) for name in public)
