"""The house rules, as a test: each rule yields its violations in one file's text."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
COLUMNS_MAX = 100

HEAVY_MODULES = {"torch", "triton", "transformers", "matplotlib"}
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"}
STRUCT_CALLS = {"Struct", "pack", "pack_into", "unpack", "unpack_from", "iter_unpack", "calcsize"}

# A folder may include its own files and those of the folders named here.
CPP_ARROWS = {
    "base": set(),
    "checksum": {"base"},
    "codec": {"base"},
    "plan": {"checksum", "base"},
    "wire": {"plan", "codec", "checksum", "base"},
    "transport": {"wire", "plan", "codec", "checksum", "base"},
    "bind": {"transport", "wire", "plan", "codec", "checksum", "base"},
    "fuzz": {"tests", "wire", "plan", "codec", "checksum", "base"},
}

# A module or folder of kvwire.prfaas may import the others that stand before it here.
PRFAAS_ORDER = ["toml_table", "lengths", "profiles", "codecs", "throughput", "pool", "view",
                "router", "rebalance", "health", "controller", "conversion", "deployment",
                "plan_report", "plots", "simulator"]


def too_big(path, text):
    lines = text.splitlines()
    if len(lines) > FILE_LINES_MAX:
        yield f"{path}: {len(lines)} lines, at most {FILE_LINES_MAX}"
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS_MAX:
            yield f"{path}:{number}: {len(line)} columns, at most {COLUMNS_MAX}"


def long_function(path, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines, at most 70"


def imported_modules(node):
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {node.module.split(".")[0]}
    return set()


def nodes_run_at_import(tree):
    """Every node outside function bodies and ``if TYPE_CHECKING`` blocks."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))


def eager_heavy_import(path, text):
    if not path.startswith("kvwire/") or path.startswith("kvwire/connectors/"):
        return
    for node in nodes_run_at_import(ast.parse(text)):
        for module in sorted(imported_modules(node) & HEAVY_MODULES):
            yield f"{path}:{node.lineno}: imports {module} outside a function"


def unsafe_import(path, text):
    for node in ast.walk(ast.parse(text)):
        for module in sorted(imported_modules(node) & UNSAFE_MODULES):
            yield f"{path}:{node.lineno}: imports {module}"


def stray_print(path, text):
    if not path.startswith("kvwire/") or path == "kvwire/cli.py":
        return
    if path.startswith("kvwire/demo/"):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print":
            yield f"{path}:{node.lineno}: the library prints"


def native_order_struct(path, text):
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Call) and node.args and is_struct_call(node.func)):
            continue
        layout = node.args[0]
        start = layout.values[0] if isinstance(layout, ast.JoinedStr) else layout
        known = isinstance(start, ast.Constant)
        if known and str(start.value)[:1] in ("<", ">", "!"):
            continue
        if known or isinstance(layout, ast.JoinedStr):
            yield f"{path}:{node.lineno}: struct format {ast.unparse(layout)} names no byte order"


def is_struct_call(function):
    if isinstance(function, ast.Name):
        return function.id == "Struct"
    is_attribute = isinstance(function, ast.Attribute) and function.attr in STRUCT_CALLS
    return is_attribute and getattr(function.value, "id", None) == "struct"


def prfaas_import_against_the_order(path, text):
    _, _, *rest = path.split("/")
    here = rest[0].removesuffix(".py")
    if not path.startswith("kvwire/prfaas/") or here == "__init__":
        return
    allowed = set(PRFAAS_ORDER[:PRFAAS_ORDER.index(here) + 1])
    for node in ast.walk(ast.parse(text)):
        for name in sorted(imported_names(node)):
            family, _, inner = name.removeprefix("kvwire.").partition(".")
            if family in ("_native", "connectors"):
                yield f"{path}:{node.lineno}: imports {name}"
            if family == "prfaas" and inner and inner.split(".")[0] not in allowed:
                yield f"{path}:{node.lineno}: {here} may not import {name}"


def imported_names(node):
    """Dotted names of kvwire's modules, and of what is taken from a package."""
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        packages = ("kvwire", "kvwire.prfaas", "kvwire.connectors")
        names = ({f"{node.module}.{alias.name}" for alias in node.names}
                 if node.module in packages else {node.module})
    else:
        names = set()
    return {name for name in names if name.startswith("kvwire.")}


def include_against_the_arrows(path, text):
    _, folder, *_ = path.split("/")
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r'\s*#\s*include\s+"([^"]+)"', line):
            target = match[1].split("/")[0]
            if folder != "tests" and target != folder and target not in CPP_ARROWS[folder]:
                yield f"{path}:{number}: {folder} may not include {match[1]}"
        if folder != "bind" and re.match(r"\s*#\s*include\s+<(pybind11/|Python\.h)", line):
            yield f"{path}:{number}: only bind may include Python"


PYTHON = ("kvwire/*.py", "kernels/*.py", "bench/*.py", "tests/*.py", "setup.py")
CPP = ("csrc/*.cpp", "csrc/*.hpp")
RULES = [
    (too_big, PYTHON + CPP + ("kernels/*.cu", "kernels/*.cuh", "kernels/*.cpp")),
    (long_function, PYTHON),
    (eager_heavy_import, PYTHON),
    (unsafe_import, PYTHON),
    (stray_print, PYTHON),
    (native_order_struct, PYTHON),
    (prfaas_import_against_the_order, ("kvwire/prfaas/*.py",)),
    (include_against_the_arrows, CPP),
]


def files(patterns):
    for pattern in patterns:
        folder, _, name = pattern.rpartition("/")
        yield from sorted((ROOT / folder).rglob(name) if folder else ROOT.glob(name))


@pytest.mark.parametrize("rule, patterns", RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_tree_keeps_the_rule(rule, patterns):
    violations = []
    for file in files(patterns):
        violations += rule(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))
    assert not violations, "\n" + "\n".join(violations)


def test_rules_look_at_the_tree():
    seen = {file.relative_to(ROOT).as_posix() for file in files(PYTHON + CPP)}
    assert {"setup.py", "kvwire/__init__.py", "tests/test_tidy.py", "kernels/__init__.py"} <= seen
    assert {"csrc/base/bytes.hpp", "csrc/checksum/crc32c.cpp"} <= seen


LONG_FUNCTION = "def f():\n" + "    pass\n" * FUNCTION_LINES_MAX

BREACHES = [
    (too_big, "kvwire/a.py", "\n" * (FILE_LINES_MAX + 1)),
    (too_big, "kvwire/a.py", "#" * (COLUMNS_MAX + 1)),
    (long_function, "kvwire/a.py", LONG_FUNCTION),
    (eager_heavy_import, "kvwire/a.py", "import torch.nn"),
    (eager_heavy_import, "kvwire/a.py", "class A:\n    from transformers import B"),
    (unsafe_import, "tests/a.py", "def f():\n    import pickle"),
    (stray_print, "kvwire/a.py", "print(1)"),
    (native_order_struct, "kvwire/a.py", "struct.pack('IH', 1, 2)"),
    (native_order_struct, "kvwire/a.py", "Struct(f'{n}I')"),
    (native_order_struct, "kvwire/a.py", "struct.Struct('=I')"),
    (prfaas_import_against_the_order, "kvwire/prfaas/profiles.py",
     "from kvwire.prfaas import router"),
    (prfaas_import_against_the_order, "kvwire/prfaas/pool/pool.py",
     "def f():\n    import kvwire.prfaas.router"),
    (prfaas_import_against_the_order, "kvwire/prfaas/simulator/a.py", "from kvwire import _native"),
    (include_against_the_arrows, "csrc/base/a.hpp", '#include "wire/b.hpp"'),
    (include_against_the_arrows, "csrc/checksum/a.cpp", '#include "plan/b.hpp"'),
    (include_against_the_arrows, "csrc/wire/a.cpp", "#include <pybind11/pybind11.h>"),
]

LAWFUL = [
    (prfaas_import_against_the_order, "kvwire/prfaas/simulator/a.py",
     "from kvwire.prfaas.pool.pool import PrefixPool\nfrom kvwire.prfaas import router"),
    (prfaas_import_against_the_order, "kvwire/prfaas/pool/a.py",
     "from kvwire.prfaas.pool.blocks import Chain\nfrom kvwire.memory import CacheMemory"),
    (too_big, "kvwire/a.py", "#" * COLUMNS_MAX + "\n" * FILE_LINES_MAX),
    (long_function, "kvwire/a.py", LONG_FUNCTION.replace("    pass\n", "", 1)),
    (eager_heavy_import, "kvwire/a.py", "def f():\n    import torch"),
    (eager_heavy_import, "kvwire/a.py", "if TYPE_CHECKING:\n    import torch"),
    (eager_heavy_import, "kvwire/connectors/a.py", "import torch"),
    (stray_print, "kvwire/demo/a.py", "print(1)"),
    (native_order_struct, "kvwire/a.py", "struct.pack(f'<{n}I', 1); struct.unpack(layout, b)"),
    (include_against_the_arrows, "csrc/bind/a.cpp", '#include "base/b.hpp"\n#include <vector>'),
    (include_against_the_arrows, "csrc/tests/a.cpp", '#include "transport/b.hpp"'),
]


@pytest.mark.parametrize("rule, path, text", BREACHES, ids=lambda v: getattr(v, "__name__", ""))
def test_breach_is_found(rule, path, text):
    assert len(list(rule(path, text))) == 1


@pytest.mark.parametrize("rule, path, text", LAWFUL, ids=lambda v: getattr(v, "__name__", ""))
def test_lawful_text_passes(rule, path, text):
    assert not list(rule(path, text))
