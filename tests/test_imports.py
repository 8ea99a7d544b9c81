"""The order of the rooms, and what a module may be called, hold and import.

The rules are functions from a path and its source to a list of complaints, so that
each can be shown to fail on a few lines.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# From the ground up: a room imports the rooms before it, never those behind it.
ROOMS = (
    "pallas_kernels",
    "jaxllm.version",
    "jaxllm.core",
    "jaxllm.attention",
    "jaxllm.layers",
    "jaxllm.models",
    "jaxllm.quantization",
    "jaxllm.compression",
    "jaxllm.checkpoints",
    "jaxllm.decoding",
    "jaxllm.drafting",
    "jaxllm.longcontext",
    "jaxllm.training",
    "jaxllm.evaluation",
    "jaxllm.analysis",
    "jaxllm.applications",
    "jaxllm.api",
    "jaxllm",  # its __init__, which offers what api has
    "jaxllm.cli",
)
FLAX_ROOMS = ("jaxllm.layers", "jaxllm.models")
FORBIDDEN = ("torch", "tensorflow")
NOT_INSTALLED = ("experiments", "benchmarks", "configs", "tests")
EMPTY_WORDS = {"utils", "common", "helpers", "misc", "base", "manager"}
MAX_LINES = 520

PRODUCT = ("jaxllm", "pallas_kernels")
EVERYTHING = (*PRODUCT, "experiments", "benchmarks", "configs", "tests")


def sources(folders):
    """Path relative to the root and text of every Python file of the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def module_name(path):
    parts = pathlib.PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    """The room that a dotted name lies in, or None outside the product."""
    parts = module.split(".")
    if parts[0] == "jaxllm" and len(parts) > 1:
        return ".".join(parts[:2])
    return parts[0] if parts[0] in PRODUCT else None


def imported_modules(path, source):
    """Line and absolute dotted name of everything that a file imports."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                # `from jaxllm import decoding` names a room, not the package.
                whole = f"{module}.{alias.name}"
                yield node.lineno, whole if room_of(whole) in ROOMS else module
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            name = node.args[0]
            if called in ("import_module", "__import__") and (
                isinstance(name, ast.Constant) and isinstance(name.value, str)
            ):
                yield node.lineno, name.value


def import_complaints(path, source):
    """What a file of the product imports against the rules."""
    own = room_of(module_name(path))
    if own not in ROOMS:
        yield f"{path}: {own} is not a room of the design"
        return
    for line, module in imported_modules(path, source):
        place, top, room = f"{path}:{line}", module.split(".")[0], room_of(module)
        if top in FORBIDDEN or top in NOT_INSTALLED:
            yield f"{place}: imports {top}"
        if top == "flax" and own not in FLAX_ROOMS:
            yield f"{place}: imports flax outside layers and models"
        if room is None or room == own:
            continue
        if own == "pallas_kernels":
            yield f"{place}: kernels import {room}"
        elif room not in ROOMS:
            yield f"{place}: imports {room}, which is not a room of the design"
        elif ROOMS.index(room) > ROOMS.index(own):
            yield f"{place}: {own} imports {room}, a room below its own"


def shape_complaints(path, source):
    """What a file is called and how long it is, against the rules."""
    parts = pathlib.PurePosixPath(path).with_suffix("").parts
    for part in parts:
        empty = EMPTY_WORDS & set(part.split("_"))
        if empty:
            yield f"{path}: the name '{part}' says nothing ({', '.join(empty)})"
    lines = source.count("\n")
    if lines > MAX_LINES:
        yield f"{path}: {lines} lines, more than {MAX_LINES}"


def docstring_complaints(path, source):
    """Functions and classes of a module's `__all__` that say nothing of themselves."""
    tree = ast.parse(source)
    public = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            public = set(ast.literal_eval(node.value))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name in public and not ast.get_docstring(node):
                yield f"{path}:{node.lineno}: {node.name} has no docstring"


def test_rooms_import_downwards():
    found = [c for file in sources(PRODUCT) for c in import_complaints(*file)]
    assert not found, "\n".join(found)


def test_names_say_something_and_files_are_short():
    found = [c for file in sources(EVERYTHING) for c in shape_complaints(*file)]
    assert not found, "\n".join(found)


def test_the_public_names_have_docstrings():
    found = [c for file in sources(PRODUCT) for c in docstring_complaints(*file)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("jaxllm/core/x.py", "import jaxllm.models.freeze", "a room below its own"),
        ("jaxllm/core/x.py", "from jaxllm import models", "a room below its own"),
        ("jaxllm/core/x.py", "from jaxllm.models import freeze", "a room below"),
        ("jaxllm/core/x.py", "from ..models import freeze", "a room below its own"),
        ("jaxllm/core/x.py", "from .. import models", "a room below its own"),
        ("jaxllm/core/__init__.py", "from .. import models", "a room below its own"),
        ("jaxllm/core/x.py", "def f():\n  import jaxllm.cli", "a room below its own"),
        ("jaxllm/core/x.py", "import jaxllm", "core imports jaxllm, a room below"),
        ("jaxllm/core/x.py", "from jaxllm import load", "core imports jaxllm, a room"),
        ("jaxllm/applications/x.py", "import jaxllm.api", "a room below its own"),
        ("jaxllm/api.py", "from jaxllm.cli import main", "a room below its own"),
        (
            "jaxllm/core/x.py",
            "import importlib as i\ni.import_module('jaxllm.cli.main')",
            "a room below its own",
        ),
        ("jaxllm/decoding/x.py", "import jaxllm.drafting.ar", "a room below its own"),
        ("pallas_kernels/x.py", "import jaxllm.version", "kernels import"),
        ("pallas_kernels/x.py", "import flax", "imports flax outside"),
        ("jaxllm/decoding/x.py", "from flax import nnx", "imports flax outside"),
        ("jaxllm/models/x.py", "import torch.nn", "imports torch"),
        ("jaxllm/models/x.py", "def f():\n  import tensorflow", "imports tensorflow"),
        ("jaxllm/cli/x.py", "from experiments import train_demo", "imports experim"),
        ("jaxllm/cli/x.py", "import jaxllm.tools.x", "not a room of the design"),
        ("jaxllm/tools/x.py", "", "jaxllm.tools is not a room of the design"),
        ("jaxllm/tools.py", "", "jaxllm.tools is not a room of the design"),
    ],
)
def test_a_wrong_import_is_noticed(path, source, complaint):
    found = list(import_complaints(path, source))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pallas_kernels/x.py", "import jax\nfrom . import shapes"),
        ("jaxllm/core/x.py", "import pallas_kernels\nfrom jaxllm import version"),
        ("jaxllm/core/x.py", "from . import errors\nfrom .errors import UserError"),
        ("jaxllm/models/x.py", "from flax import nnx\nfrom ..layers import norms"),
        ("jaxllm/drafting/x.py", "from jaxllm.decoding import engine"),
        ("jaxllm/__init__.py", "from jaxllm import api, version"),
        ("jaxllm/cli/x.py", "import jaxllm\nfrom jaxllm import api"),
        ("jaxllm/api.py", "from jaxllm.applications import embedding"),
    ],
)
def test_a_right_import_passes(path, source):
    assert list(import_complaints(path, source)) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("jaxllm/core/utils.py", "", "says nothing"),
        ("jaxllm/core/cache_helpers.py", "", "says nothing"),
        ("jaxllm/common/cache.py", "", "says nothing"),
        ("tests/core/x.py", "x = 1\n" * 521, "521 lines"),
    ],
)
def test_a_wrong_shape_is_noticed(path, source, complaint):
    found = list(shape_complaints(path, source))
    assert len(found) == 1
    assert complaint in found[0]


def test_a_right_shape_passes():
    assert list(shape_complaints("jaxllm/core/database.py", "x = 1\n" * 520)) == []


def test_a_missing_docstring_is_noticed():
    source = (
        "__all__ = ['f', 'C', 'g']\n"
        "def f(): pass\n"
        "class C: pass\n"
        "def g():\n  'Says what it does.'\n"
        "def _private(): pass\n"
    )
    found = list(docstring_complaints("x.py", source))
    assert found == ["x.py:2: f has no docstring", "x.py:3: C has no docstring"]


def run_python(code):
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return child.stdout


def public_modules():
    names = [module_name(path) for path, _ in sources(PRODUCT)]
    # An entry point's module may be the program itself.
    return [n for n in names if "._" not in n and not n.endswith("__main__")]


def test_importing_everything_brings_no_torch_and_no_tensorflow():
    code = (
        "import importlib, sys\n"
        f"for name in {public_modules()!r}: importlib.import_module(name)\n"
        f"print(sorted(set({FORBIDDEN!r}) & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


def test_importing_the_package_alone_is_light():
    # `jaxllm --help` answers at once; importing jax alone takes a second or more.
    code = (
        "import sys, jaxllm\n"
        "print(sorted({'jax', 'flax', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"
