"""The house has floors: a file imports from the floors below it, or from its own folder; never from its neighbours.

So a defense cannot see an attack's trigger or the audit, whatever anyone writes.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import patcher

ROOT = Path(patcher.__file__).parent
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"records", "world"}),
    frozenset({"reading"}),
    frozenset({"checkpoints", "sharding", "quantized", "endpoint"}),
    frozenset({"rewrites"}),
    frozenset({"network"}),
    frozenset({"models", "layers", "losses", "memory", "symptoms", "triggers", "visible", "intervals", "wordings"}),
    frozenset({"progress", "inputs", "outputs", "options"}),
    frozenset({"chat", "prompts", "tasks", "exits", "journal"}),
    frozenset({"patch", "generation", "forward"}),
    frozenset({"probe", "lora", "insertions"}),
    frozenset({"training", "judges"}),
    frozenset({"localize", "defenses", "attacks", "audit", "report", "embedded"}),
    frozenset({"loading", "result"}),
    frozenset({"proof"}),
    frozenset({"pipeline"}),
    frozenset({"bench", "plan"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
"""Parts of the house (a file, or a folder with all in it), lowest floor first."""
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}
FILES = sorted(path for path in ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    """The file's part: its own name, or that of the folder it is in."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports_of(path: Path) -> set[str]:
    """Every module imported anywhere in the file, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively: write the whole name"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "patcher"}
    return found


def ours(path: Path) -> set[str]:
    """The parts of the house that a file imports from."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("patcher.")}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_file_has_a_floor() -> None:
    unplaced = sorted({part_of(path) for path in FILES} - FLOOR_OF.keys() - {"__init__"})
    assert not unplaced, f"new in the house: {unplaced}. Place each in FLOORS, above all that it imports"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return  # the roof: it names what users need; see the next test
    for other in ours(path) - {part}:
        assert other in FLOOR_OF, f"{name_of(path)} imports {other}, which has no floor: place it in FLOORS"
        assert FLOOR_OF[other] < FLOOR_OF.get(part, 0), f"{name_of(path)} imports {other}, which is not below {part}"


def test_importing_the_package_imports_no_part_of_it() -> None:
    """Any part can then be imported alone: the records without torch, a defense without an attack."""
    for node in ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not any(name.split(".")[0] == "patcher" for name in names), f"line {node.lineno}"


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("defenses", {"attacks", "audit", "localize", "judges", "proof", "pipeline", "bench"}),
        ("localize", {"attacks", "audit", "defenses", "proof", "pipeline", "bench"}),
        ("attacks", {"defenses", "localize", "audit"}),
        ("audit", {"defenses", "localize", "attacks"}),
    ],
)
def test_nobody_judges_himself(part: str, forbidden: set[str]) -> None:
    """Held on its own, so that no rearrangement of the floors can allow it."""
    files = [path for path in FILES if part_of(path) == part]
    assert files
    for path in files:
        assert not ours(path) & forbidden, f"{name_of(path)} imports {ours(path) & forbidden}"


@pytest.mark.parametrize("part", ["report", "records", "triggers", "prompts", "visible"])
def test_what_needs_no_model_imports_no_torch(part: str) -> None:
    for path in (path for path in FILES if part_of(path) == part):
        heavy = {name.split(".")[0] for name in imports_of(path)} & {"torch", "transformers", "peft", "safetensors"}
        assert not heavy, f"{name_of(path)} imports {heavy}"


@pytest.mark.parametrize("package", ["datasets", "lm_eval", "matplotlib", "bitsandbytes"])
def test_no_optional_package_is_needed_at_import(package: str) -> None:
    """Only inside the function that needs it."""
    imported = set[str]()
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(module.split(".")[0] == package for module in modules):
                imported.add(name_of(path))
    assert not imported


def test_the_public_names_are_listed() -> None:
    """For completion, before any of them has been used; and their types go with the package."""
    listed = subprocess.run(
        [sys.executable, "-c", "import patcher; print(*dir(patcher))"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {*patcher.__all__} <= {*listed}
    assert (Path(patcher.__file__).parent / "py.typed").exists()
