"""The plan of the house, read from the code: which room may lean on which, and what keeps a room readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import understudy

ROOT = Path(understudy.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Imports go down, or stay on their floor.
FLOORS = [
    # ground: plain data and errors
    "_version comparison entries errors facts headers metrics plans recipe registry rehearsal standins stats summary "
    "sums held",
    # the model: find, observe, stream, read and write
    "moe absent experts channels collection collectors backward removal loading skeleton "
    "stacking layout walk activations tap weights checkpoint shards cut data sources tokens "
    "processes runtime quality examples harness sizes speed card grouped adapters bases modulated training layerwise "
    "full_size unrouted folding dense fitting refit affine affine_fit seam",
    # what is known from the field, a file each
    "methods scores channel_scores kinds overlay budgets grouping merging regrouping ranking protection selection "
    "rungs sequential verify slowly recovery resuming condensed virtual evolution contest trial calibrations",
    # what the commands do; they meet in files
    "stages",
    # roof: parse, call a stage, show
    "cli reports __init__ __main__",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
LONGEST = 320


def name_of(file: Path) -> str:
    """Return the module that a file is, without the package: `stages.apply`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(node: ast.AST) -> set[str]:
    """Return what a module imports of the package, also inside functions, but not for type checkers only."""
    names: set[str] = set()
    inside = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        inside = list(node.orelse)
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide which room they lean on"
        names = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "understudy"}.union(*map(imports, inside))


def room_of(imported: str) -> str:
    """Return the room that an imported name lives in."""
    parts = imported.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"


@pytest.fixture(params=FILES, ids=name_of)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_room_has_a_floor(file: Path) -> None:
    assert name_of(file).split(".")[0] in FLOOR, "say in FLOORS where this module belongs"


def test_imports_go_down(file: Path) -> None:
    mine = name_of(file).split(".")[0]
    for imported in imports(ast.parse(file.read_text(encoding="utf-8"))):
        other = room_of(imported)
        assert FLOOR[other] <= FLOOR[mine], f"{name_of(file)} (floor {FLOOR[mine]}) leans on {imported}, above it"


def test_stages_meet_in_files(file: Path) -> None:
    mine = name_of(file)
    # these are the other three, one after the other
    if not mine.startswith("stages.") or mine in ("stages.compress", "stages.compare"):
        return
    found = imports(ast.parse(file.read_text(encoding="utf-8")))
    assert not {name for name in found if name.startswith("understudy.stages")}


def test_type_checking_imports_do_not_count() -> None:
    code = "if TYPE_CHECKING:\n    import understudy.cli\nelse:\n    import understudy.moe"
    assert imports(ast.parse(code)) == {"understudy.moe"}
    assert imports(ast.parse("def f():\n    from understudy.stages import apply")) == {"understudy.stages.apply"}


def test_a_file_is_short_enough_to_be_read(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_the_library_does_not_print_and_does_not_unpickle(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print", f"{file}:{node.lineno} prints; log, or return it"
            assert called not in ("torch.load", "eval", "exec"), f"{file}:{node.lineno} runs what a file holds"
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & {"pickle", "dill", "joblib"}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in ("pickle", "dill", "joblib")


def test_what_is_public_says_what_it_is(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or file.name == "_version.py"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file}:{node.lineno} {node.name} has no docstring"


def test_exported_names_exist() -> None:
    for name in understudy.__all__:
        assert getattr(understudy, name) is not None
        assert name in dir(understudy)
    assert callable(understudy.eval)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        understudy.nothing  # noqa: B018


def test_commands_and_functions_have_the_same_names() -> None:
    from understudy.cli import app

    commands = {command.name for command in app.registered_commands}
    assert commands == set(understudy.__all__) - {"__version__"}
