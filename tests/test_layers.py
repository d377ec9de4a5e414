"""Imports run one way: shells -> decisions -> values -> core -> errors. Nothing imports what stands above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "hindsight_fast"
CORE = Path(__file__).resolve().parents[1] / "src" / "_core"

# From the bottom up; a module may import what stands in a line above its own, never its own line or below.
LAYERS = [
    {"errors"},
    {"_core"},
    # Values, and rooms without a neighbour.
    {"writes", "payloads", "streams", "schema", "connecting", "import_source", "export_target", "progress"},
    {"idle_check", "worker_call"},
    {"installations"},
    {"statements", "results", "import_lines", "demo_events", "accounts"},
    {"events", "reading", "read_ahead", "import_chunks", "server_guard"},
    {"begin_copy"},
    {"event_registry", "append_request"},
    {"append_call", "group_commit"},
    {"kept_connections"},
    {"appending", "async_appending"},
    {"golden"},
    {"testing"},
    {"import_rejects"},
    {"import_writer", "embedded"},
    {"import_jobs", "import_dry_run", "import_build"},
    {"import_initial"},
    {"importer", "exporter"},
    {"store_base"},
    {"store"},
    {"async_store"},
    {"status", "schema_check"},
    {"__init__"},
    {"demo"},
    {"cli_common"},
    {"cli_import", "cli_read", "cli_schema"},
    {"cli"},
]
# The only modules that may talk to a server or start one.
SHELLS = {"store", "async_store", "worker_call", "idle_check", "begin_copy", "append_call", "appending"}
SHELLS |= {"kept_connections"}
SHELLS |= {"async_appending", "read_ahead", "import_writer", "import_dry_run", "import_jobs", "import_build"}
SHELLS |= {"import_initial", "importer", "installations", "accounts", "server_guard", "embedded"}
SHELLS |= {"status", "demo", "cli_common", "cli_import", "cli_read", "cli_schema", "cli"}
IO_MODULES = {"psycopg_pool", "subprocess", "socket", "select"}


class RunTimeOnly(ast.NodeTransformer):
    """Takes ``if TYPE_CHECKING:`` out: an error may name the type of a fact that it carries."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def imports_of(source: str) -> set[str]:
    """The package's modules that *source* imports, at any depth; not what only a type checker sees."""
    found: set[str] = set()
    for node in ast.walk(RunTimeOnly().visit(ast.parse(source))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hindsight_fast":
            found |= {node.module.split(".")[1]} if "." in node.module else {"__init__"}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hindsight_fast":
                    found.add(alias.name.split(".")[1] if "." in alias.name else "__init__")
    return found


def violations(module: str, source: str) -> list[str]:
    level = next(i for i, layer in enumerate(LAYERS) if module in layer)
    below = set().union(*LAYERS[:level])
    return [f"{module} imports {name}" for name in sorted(imports_of(source) - below)]


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_every_module_has_its_layer() -> None:
    assert set(MODULES) | {"_core"} == set().union(*LAYERS)
    assert sum(len(layer) for layer in LAYERS) == len(set().union(*LAYERS))


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    assert violations(module, (PACKAGE / f"{module}.py").read_text(encoding="utf-8")) == []


def test_the_core_imports_only_errors_and_knows_no_driver() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in CORE.iterdir())
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(("import ", "from "))]
    package_imports = [line for line in lines if "hindsight_fast" in line]
    assert package_imports == ["from hindsight_fast.errors import EventParseError, MalformedRow"]
    assert not [line for line in lines if "psycopg" in line or "socket" in line]


@pytest.mark.parametrize("module", sorted(set(MODULES) - SHELLS))
def test_only_shells_do_io(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not imported & IO_MODULES


def test_the_check_bites() -> None:
    assert violations("statements", "from .store import EventStore") == ["statements imports store"]
    assert violations("reading", "def f():\n    import hindsight_fast.cli") == ["reading imports cli"]
    assert violations("store", "from . import cli") == ["store imports cli"]
    assert violations("reading", "if TYPE_CHECKING:\n    from .store import EventStore") == []
    assert violations("results", "from .statements import Statements") == ["results imports statements"]
