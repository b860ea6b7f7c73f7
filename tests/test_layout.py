"""The plan of the house: one direction of imports, no circles, rooms that stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "grip_env.common",
    "grip_env.tasks",
    "grip_env.vlms",
    "grip_env.pretraining",
    "grip_env.rewards",
    "grip_env.exact",
    "grip_env.envs",
    "grip_env.run_folder",
    "agents",
    "grip_env.reports",
    "grip_env.cli",
    "grip_env.bench",
)
"""In the order in which data pass through them; commands come after all of these."""
MOST_MODULES = 15
MOST_LINES = 400
DOORS = ("grip_env", "agents")
"""Packages that only name what is elsewhere, and import it when it is asked for."""

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("grip_env", "agents")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(module: str) -> set[str]:
    """Return the project's modules that a module imports anywhere, for type checkers as well."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import, which the project does without"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else str(node.module) for name in whole]
        found |= {name for name in names if name in FILES}
    return found - {module}


GRAPH = {module: imports(module) - set(DOORS) for module in FILES if module not in DOORS}


def rank(module: str) -> int:
    for place, room in enumerate(ROOMS):
        if module == room or module.startswith(f"{room}."):
            return place
    assert module.count(".") == 1, f"{module} is in no room of ROOMS, and no command"
    return len(ROOMS)


def test_graph_sees_imports_of_every_kind() -> None:
    assert "agents.pool" in GRAPH["agents.grpo"]
    assert "grip_env.tasks.scene_layout" in GRAPH["grip_env.tasks.scenes"]  # from a package
    assert "grip_env.vlms.base" in GRAPH["grip_env.evaluate"]  # for type checkers
    assert "agents.methods" in GRAPH["grip_env.evaluate"]  # inside a function
    assert sum(map(len, GRAPH.values())) > 300


@pytest.mark.parametrize("module", GRAPH)
def test_no_module_imports_against_the_arrow(module: str) -> None:
    against = [other for other in GRAPH[module] if rank(other) > rank(module)]
    assert not against, f"{module} imports {against}, which come after it"


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for other in GRAPH[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_no_module_reaches_for_private_names_of_another() -> None:
    for module in GRAPH:
        for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in FILES:
                private = [alias.name for alias in node.names if alias.name[0] == "_" and alias.name[:2] != "__"]
                assert not private, f"{module} imports {private} from {node.module}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES.values()}), ids=lambda one: one.name)
def test_rooms_are_small_and_say_what_they_are(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize("module", FILES)
def test_long_modules_say_why(module: str) -> None:
    text = FILES[module].read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) <= MOST_LINES or "one file" in said, f"{module} is long, and does not say why"
