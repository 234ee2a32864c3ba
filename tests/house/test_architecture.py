"""Tests the layout of the packages: which module may import which, and what a folder may hold.

Every module has a level in LEVELS. It imports only from lower levels and from its own package. The
test reads syntax trees, so imports inside functions count too.
"""

import ast
import graphlib
import re
import sys
from pathlib import Path

from tests.house.typecheck import ROOT, package_folders

# Longest matching prefix decides. A package's modules share its level and see each other.
LEVELS = {
    "lctrain_kernels.autocast": -8,
    "lctrain_kernels.checks": -9,
    "lctrain_kernels.lengths": -9,
    "lctrain_kernels.overlap": -9,
    "lctrain_kernels.strict_json": -9,
    "lctrain_kernels.launch": -8,
    "lctrain_kernels.layout": -8,
    "lctrain_kernels.schedule": -8,  # the layout of the tile lists, which the kernels read
    "lctrain_kernels.pack_checks": -7,
    "lctrain_kernels.pack": -6,
    "lctrain_kernels.options": -7,
    "lctrain_kernels.tile": -5,
    "lctrain_kernels.reference": -4,
    "lctrain_kernels.gluon": -4,
    "lctrain_kernels.backend": -3,
    "lctrain_kernels.padding": -2,
    "lctrain_kernels.registry": -4,
    "lctrain_kernels.by_head": -3,
    "lctrain_kernels.in_place": -3,
    "lctrain_kernels.operators": -2,
    "lctrain_kernels.fused_backend": -2,
    "lctrain_kernels.fused_operator": -3,
    "lctrain_kernels.multiprocessors": -2,
    "lctrain_kernels.decode": -1.5,
    "lctrain_kernels.linear": -1,
    "lctrain_kernels.norm": -1,
    "lctrain_kernels.varlen": -1,
    "lctrain_kernels.mlp": 0,
    "lctrain_kernels.rotary": 0,
    "lctrain_kernels.sampling": 0,
    "lctrain_kernels.dual_chunk": 0,
    "lctrain_kernels.differential": 0,
    "lctrain_kernels.cross_entropy": 0,
    "lctrain_kernels": 1,
    "lctrain_kernels.bench": 2,
    "lctrain.kernels": 2,
    "lctrain.batch": 3,
    "lctrain.batch_input": 2,
    "lctrain.batch_invariant": 3,
    "lctrain.groups": 2,
    "lctrain.log_steps": 3,
    "lctrain.config": 3,
    "lctrain.config_errors": 2,
    "lctrain.dropout_seed": 3,
    "lctrain.allocator": 1,
    "lctrain.limits": 1,
    "lctrain.instances": 0,
    "lctrain.peak_memory": 1,
    "lctrain.made_class": 1,
    "lctrain.module_hooks": 1,
    "lctrain.unchanged": 1,
    "lctrain.pluralize": 0,
    "lctrain.transfer": 0,
    "lctrain.warn": 1,
    "lctrain.compiled": 0,
    "lctrain.experts": 2,
    "lctrain.flops": 3,
    "lctrain.local_paths": 2,
    "lctrain.attention": 4,
    "lctrain.data": 4,
    "lctrain.distributed": 2,
    "lctrain.distributed.strategy": 6,
    "lctrain.loggers": 4,
    "lctrain.host_optimizer": 4,
    "lctrain.optim": 5,
    "lctrain.optimizers": 4,
    "lctrain.options": 4,
    "lctrain.process_group": 5,
    "lctrain.micro_batches": 4,
    "lctrain.model_names": 4,
    "lctrain.memory": 6,
    "lctrain.memory.quantized": 5,
    "lctrain.models": 5,
    "lctrain.run": 4,
    "lctrain.schemas": 5,
    "lctrain.failure": 5,
    "lctrain.preflight": 5,
    "lctrain.composition": 6,
    "lctrain.help": 7,
    "lctrain.command": 8,
    "lctrain.loss": 4,
    "lctrain.eval": 7,
    "lctrain.generation": 6,
    "lctrain.module": 7,
    "lctrain.module_state": 6,
    "lctrain.callbacks": 8,
    "lctrain.build": 9,
    "lctrain.export": 9,
    "lctrain.closing": 8,
    "lctrain.closing_checks": 8,
    "lctrain.model_card": 8,
    "lctrain.next_command": 8,
    "lctrain.report": 9,
    "lctrain.show": 9,
    "lctrain.train": 10,
    "lctrain.evaluate": 10,
    "lctrain.push": 10,
    "lctrain.bench": 11,
    "lctrain.recipes": 11,
}
OURS = {"lctrain", "lctrain_kernels"}
LAZY = {"lctrain", "lctrain.data", "lctrain.kernels"}  # packages whose names load on first use
EXPORTS_ONLY = {"lctrain", "lctrain.configs", "lctrain.recipes"}
FRAMEWORKS = {
    "datasets",
    "hydra",
    "lightning",
    "omegaconf",
    "pytorch_lightning",
    "transformers",
    "wandb",
}


def source_files() -> dict[str, Path]:
    """Returns the file of every module in the packages, by the module's dotted name."""
    files = {}
    for package, folder in package_folders().items():
        for path in sorted(folder.glob("*.py")):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return files


SOURCES = source_files()


def home(module: str) -> str | None:
    """Returns the key of LEVELS that covers `module`, or None."""
    while module and module not in LEVELS:
        module = module.rpartition(".")[0]
    return module or None


def imported_modules(module: str, path: Path) -> set[str]:
    """Returns the dotted names of all modules that the file imports."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) + 1 - node.level], *filter(None, [base])])
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name if name in SOURCES else base for name in submodules}
    return names


def top(name: str) -> str:
    return name.partition(".")[0]


IMPORTS = {module: imported_modules(module, path) for module, path in SOURCES.items()}


def modules(prefix: str) -> list[str]:
    """Returns all modules of a package, including the package itself."""
    return [module for module in SOURCES if f"{module}.".startswith(f"{prefix}.")]


def is_reference(module: str) -> bool:
    """Returns whether a module is a definition in plain PyTorch."""
    return re.match(r"lctrain_kernels\.(\w+\.)?reference\b", module) is not None


def upward(module: str) -> list[str]:
    """Returns a sentence for each import of a module that breaks the order of the levels."""
    mine = home(module)
    if mine is None:
        return [f"{module} has no level in LEVELS: decide where it belongs"]
    found = []
    for name in sorted(name for name in IMPORTS[module] if top(name) in OURS):
        theirs = home(name)
        if name == "lctrain":
            found.append(f"{module} imports lctrain itself: import the module you need")
        elif theirs is None:
            found.append(f"{module} imports {name}, which has no level")
        elif theirs != mine and LEVELS[theirs] >= LEVELS[mine]:
            found.append(
                f"{module} imports {name}: level {LEVELS[theirs]} from level {LEVELS[mine]}"
            )
    return found


def test_imports_run_downwards():
    assert len(SOURCES) > 100, "the walk finds no sources"
    assert not [fault for module in sorted(set(SOURCES) - EXPORTS_ONLY) for fault in upward(module)]


def test_no_module_imports_itself_through_others():
    """Imports for type checking and inside functions count too: no import cycle is allowed."""
    graph = {
        module: {name for name in names if name in SOURCES and name != module}
        for module, names in IMPORTS.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_one_module_reads_the_code_of_models():
    readers = {
        module for module in modules("lctrain.models") if IMPORTS[module] & {"dis", "inspect"}
    }
    assert readers == {"lctrain.models.code"}


def test_kernels_stand_alone():
    for module in modules("lctrain_kernels"):
        tops = {top(name) for name in IMPORTS[module]}
        assert not tops & (FRAMEWORKS | {"lctrain"}), module


def test_only_kernels_import_triton():
    others = set(SOURCES) - set(modules("lctrain_kernels"))
    assert not [m for m in sorted(others) if "triton" in {top(name) for name in IMPORTS[m]}]


def test_reference_imports_torch_only():
    allowed = {"torch", "lctrain_kernels", *sys.stdlib_module_names}
    for module in filter(is_reference, SOURCES):
        names = IMPORTS[module]
        assert {top(name) for name in names} <= allowed, module
        assert all(is_reference(name) for name in names if top(name) in OURS), module


def test_no_kernel_imports_the_reference():
    kernels = [
        m for m in SOURCES if re.search(r"lctrain_kernels\.(tile|gluon|\w+\.(triton|hopper))", m)
    ]
    assert len(kernels) > 30, "the pattern finds no kernels"
    for module in kernels:
        assert not list(filter(is_reference, IMPORTS[module])), module


def test_init_files_only_export():
    for module, path in SOURCES.items():
        if path.stem != "__init__":
            continue
        functions = {"__getattr__", "__dir__"} if module in LAZY else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.name in functions, f"{module} defines {node.name}"
            assert not isinstance(node, ast.ClassDef), f"{module} defines a class"


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "kernels/__init__.py would shadow the package `kernels` that transformers imports"
    )


def test_files_name_the_thing():
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert not [str(path) for path in SOURCES.values() if path.stem in vague]


def test_every_package_on_disk_is_listed():
    listed = {folder.resolve() for folder in package_folders().values()}
    found = {
        path.parent
        for top_folder in ("lctrain", "kernels", "configs", "recipes")
        for path in (ROOT / top_folder).rglob("*.py")
    }
    assert found == listed


def test_one_module_decides_where_documents_are():
    """Only lctrain.attention.documents imports the functions that read boundaries."""
    found = {f"lctrain.attention.boundaries.from_{way}" for way in WAYS}
    importers = {module for module in SOURCES if imported_names(module) & found}
    assert importers == {"lctrain.attention.documents"}


WAYS = ("cu_seqlens", "padding", "rows", "segments")


def imported_names(module: str) -> set[str]:
    """Returns the dotted names of everything that a module imports by `from x import y`."""
    nodes = ast.walk(ast.parse(SOURCES[module].read_text()))
    return {
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
