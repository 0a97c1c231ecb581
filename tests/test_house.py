"""The house keeps its order: imports run one way, files and functions are short, utils/ holds a training's needs."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = {"models": 0, "utils": 1, "sources": 2, "evaluation": 2, "player": 2, "agents": 2, "benchmarks": 4, "tests": 5}
"""Rooms by floor: each may import from itself and from lower floors, but from no other room on its own floor."""
SCRIPTS = 3
"""The floor of the scripts at the root, each of which is a room of its own."""
TRAININGS = ("train_tokenizer", "train_lam", "train_dynamics", "train_policy", "train_actor_critic")
BLOCKS_MAY_USE = {"models", "models.errors", "models.init", "models.kernels"}
NO_CODE = ("data", "runs", "wandb")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    files = [*root.glob("*.py"), *root.glob("[!.]*/**/*.py")]
    names = {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    return {name: file for name, file in names.items() if room_of(name) not in NO_CODE}


def room_of(name: str) -> str:
    return name.split(".")[0]


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
    """Imports that run back up or sideways, and modules that stand in no room."""
    known = modules(root)
    wrong = [
        f"{name} stands in no room"
        for name, file in known.items()
        if file.parent != root and room_of(name) not in FLOORS
    ]
    for name in known:
        here = room_of(name)
        for other in imports(name, known):
            there = room_of(other)
            back = there != here and FLOORS.get(there, SCRIPTS) >= FLOORS.get(here, SCRIPTS)
            if back or (name == "models.nn" and other not in BLOCKS_MAY_USE):
                wrong.append(f"{name} imports {other}")
    return wrong


def too_long(root: Path) -> list[str]:
    """Files of more than 350 lines (scripts of 200, trainings of 250) and functions of more than 80, but for tests."""
    wrong = []
    for name, file in modules(root).items():
        if room_of(name) == "tests":
            continue
        text = file.read_text()
        most = 250 if name in TRAININGS else 200 if file.parent == root else 350
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


def test_the_house_is_found():
    assert {*TRAININGS, "models.nn", "utils.train", "player.game", "tests.test_house"} <= modules(ROOT).keys()


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
        "player/__init__.py": "",
        "evaluation/clips.py": "",
        "benchmarks/train_step.py": "import train_lam\n",
        "tests/test_train.py": "import sample, benchmarks.train_step\n" + "\n" * 400,
        "runs/code.py": "import nothing, models.vq\n" + "\n" * 400,
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
        ("sample.py", "async def f():\n    import benchmarks.train_step\n", "sample imports benchmarks.train_step"),
        ("benchmarks/train_step.py", "import tests.test_train\n", "benchmarks.train_step imports tests.test_train"),
        ("models/nn.py", "from models import vq\n", "models.nn imports models.vq"),
        ("tools/extra.py", "", "tools.extra stands in no room"),
        ("tools/__init__.py", "", "tools stands in no room"),
    ],
)
def test_an_import_that_runs_back_up_is_seen(small_house, file, text, expected):
    assert wrong_imports(small_house) == []
    (small_house / file).parent.mkdir(exist_ok=True)
    (small_house / file).write_text(text)
    assert expected in wrong_imports(small_house)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("models/vq.py", "\n" * 351, "models.vq has 351 lines, of at most 350"),
        ("sample.py", "\n" * 201, "sample has 201 lines, of at most 200"),
        ("train_lam.py", "\n" * 251, "train_lam has 251 lines, of at most 250"),
        ("benchmarks/train_step.py", "\n" * 351, "benchmarks.train_step has 351 lines, of at most 350"),
        ("player/game.py", "def f():\n" + "    g()\n" * 80, "player.game.f has 81 lines, of at most 80"),
        (
            "utils/train.py",
            "class A:\n    async def f():\n" + "        g()\n" * 80,
            "utils.train.f has 81 lines, of at most 80",
        ),
    ],
)
def test_what_is_too_long_is_seen(small_house, file, text, expected):
    assert too_long(small_house) == []
    (small_house / file).write_text(text)
    assert too_long(small_house) == [expected]
    shorter = text.splitlines(keepends=True)[:-1]
    (small_house / file).write_text("".join(shorter))
    assert too_long(small_house) == []


def test_a_module_that_no_training_needs_is_seen(small_house):
    assert not_for_training(small_house) == []
    (small_house / "utils" / "video.py").write_text("")
    (small_house / "sample.py").write_text("import utils.video\n")
    assert not_for_training(small_house) == ["utils.video"]
    (small_house / "utils" / "train.py").write_text("def f():\n    from utils import video\n")
    assert not_for_training(small_house) == []
