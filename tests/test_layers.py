"""The shape of the house: layers point one way, and stages meet only on disk."""

import ast
from pathlib import Path

import pytest

import eaftflow

PACKAGE = Path(eaftflow.__file__).parent
LAYERS = [
    {"errors", "resources", "patching"},
    {"schemas", "architectures", "checkpoint", "attention", "packing"},
    {"store", "routing", "likelihood", "models"},
    {"rankings", "relations"},
    {"cells"},
    {"capture", "rescore", "prune", "query"},
    {"cli"},
]
STAGES = {"capture", "rescore", "prune", "query"}
DEPTH = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}


def imports(module: str) -> set[str]:
    """The modules of eaftflow that `module` imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "eaftflow":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eaftflow."):
            found.add(str(node.module).partition(".")[2])
    return found & DEPTH.keys()


def test_every_module_has_its_layer() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules == DEPTH.keys()


@pytest.mark.parametrize("module", sorted(DEPTH))
def test_imports_point_down(module: str) -> None:
    for other in imports(module):
        assert DEPTH[other] <= DEPTH[module], f"{module} imports {other}"
        assert not {module, other} <= STAGES, f"stage {module} imports stage {other}"
