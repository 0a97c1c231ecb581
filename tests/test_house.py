"""The house keeps its order: imports run one way, files and functions are short, utils/ holds a training's needs."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = {"models": 0, "utils": 1, "sources": 2, "evaluation": 2, "player": 2, "agents": 2}
"""Floors: a room may import from its own and from lower floors, but from no other room on its own floor."""
SCRIPTS = 3
TRAININGS = ("train_tokenizer", "train_lam", "train_dynamics")
BLOCKS_MAY_USE = {"models", "models.errors", "models.init", "models.kernels"}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the project by its dotted name, but for tests and benchmarks."""
    files = [*root.glob("*.py"), *(file for room in ROOMS for file in (root / room).rglob("*.py"))]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """Modules of the project that a module imports anywhere, inside of functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


def wrong_imports(root: Path) -> list[str]:
    known = modules(root)
    wrong = []
    for name in known:
        room = name.split(".")[0]
        floor = ROOMS.get(room, SCRIPTS)
        for other in imports(name, known):
            there = other.split(".")[0]
            if there != room and ROOMS.get(there, SCRIPTS) >= floor and not (name == "demo" and floor == SCRIPTS):
                wrong.append(f"{name} imports {other}")
            if name == "models.nn" and other not in BLOCKS_MAY_USE:
                wrong.append(f"{name} imports {other}")
    return wrong


def too_long(root: Path) -> list[str]:
    wrong = []
    for name, file in modules(root).items():
        text = file.read_text()
        script = "." not in name and name not in ROOMS
        most = 250 if name in TRAININGS else 200 if script else 350
        if len(text.splitlines()) > most:
            wrong.append(f"{name} has {len(text.splitlines())} lines, of at most {most}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 80:
                    wrong.append(f"{name}.{node.name} has {lines} lines, of at most 80")
    return wrong


def not_for_training(root: Path) -> list[str]:
    """Modules of utils/ that no training reaches."""
    known = modules(root)
    reached: set[str] = set()
    queue = [name for name in TRAININGS if name in known]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += imports(name, known)
    return sorted(name for name in known if name.startswith("utils.") and name not in reached)


def test_imports_run_one_way():
    assert wrong_imports(ROOT) == []


def test_files_and_functions_stay_short():
    assert too_long(ROOT) == []


def test_utils_holds_what_a_training_needs():
    assert not_for_training(ROOT) == []


@pytest.fixture
def small_house(tmp_path) -> Path:
    for name, text in {
        "train_lam.py": "from utils import train\n",
        "sample.py": "import models.nn\n",
        "models/nn.py": "from models.errors import InputError\n",
        "models/errors.py": "",
        "models/vq.py": "",
        "utils/train.py": "import models.nn\n",
        "player/game.py": "from utils.train import fit\n",
        "evaluation/clips.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("models/vq.py", "def f():\n    from utils.train import fit\n", "models.vq imports utils.train"),
        ("models/vq.py", "import typing\nif typing.TYPE_CHECKING:\n    import sample\n", "models.vq imports sample"),
        ("utils/train.py", "from player import game\n", "utils.train imports player.game"),
        ("player/game.py", "import evaluation.clips\n", "player.game imports evaluation.clips"),
        ("sample.py", "from train_lam import Config\n", "sample imports train_lam"),
        ("models/nn.py", "from models import vq\n", "models.nn imports models.vq"),
    ],
)
def test_an_import_that_runs_back_up_is_seen(small_house, file, text, expected):
    assert wrong_imports(small_house) == []
    (small_house / file).write_text(text)
    assert wrong_imports(small_house) == [expected]


def test_a_long_file_a_long_function_and_a_stray_module_are_seen(small_house):
    assert too_long(small_house) == not_for_training(small_house) == []
    (small_house / "models" / "vq.py").write_text("\n" * 351)
    (small_house / "sample.py").write_text("\n" * 201)
    (small_house / "train_lam.py").write_text("import utils.train\n" + "\n" * 201)
    (small_house / "player" / "game.py").write_text("def f():\n" + "    print()\n" * 80)
    (small_house / "utils" / "extra.py").write_text("")
    assert [line.split()[0] for line in too_long(small_house)] == ["sample", "models.vq", "player.game.f"]
    assert not_for_training(small_house) == ["utils.extra"]
