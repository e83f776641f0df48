"""What a user of the package relies on: names, docstrings, stubs, import, errors, the README."""

import ast
import inspect
import os
import re
import statistics
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

import kvwire
from kvwire import _native, errors

ROOT = Path(__file__).parent.parent
PACKAGE = Path(kvwire.__file__).parent
IMPORT_SECONDS_MAX = 0.15


def run_python(code, *flags):
    """Return what `code` prints in a fresh interpreter, outside the checkout's tests."""
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


PUBLIC = [name for name in kvwire.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves_and_is_documented(name):
    thing = getattr(kvwire, name)
    assert name in dir(kvwire)
    if inspect.isroutine(thing):
        assert thing.__doc__
    if not inspect.isclass(thing):
        return
    own = vars(thing).get("__doc__")
    assert own and not own.startswith(f"{name}("), "a dataclass makes its own docstring"
    for member in vars(thing):
        if not member.startswith("_") and inspect.isroutine(getattr(thing, member)):
            assert inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        kvwire.no_such_name


def test_import_is_quick():
    clock = "import time; t = time.perf_counter(); import kvwire; print(time.perf_counter() - t)"
    assert statistics.median(float(run_python(clock)) for _ in range(5)) <= IMPORT_SECONDS_MAX


def test_import_pulls_in_nothing_heavy():
    loaded = run_python("import sys, kvwire; print(*sys.modules)").split()
    assert "kvwire" in loaded
    assert not {"torch", "numpy", "lz4", "transformers", "asyncio"} & set(loaded)


def test_numpy_arrays_are_used_without_torch():
    loaded = run_python("""
import sys, kvwire, numpy as np
spec = kvwire.CacheSpec("m", (kvwire.attention([0], kv_heads=1, head_dim=8, dtype="bf16"),))
arrays = {(0, "k"): np.zeros((3, 1, 8), np.uint16), (0, "v"): np.zeros((3, 1, 8), np.uint16)}
kvwire.CacheMemory(spec, arrays, tokens=3)
with kvwire.Receiver("127.0.0.1:0") as receiver, kvwire.Sender(receiver.address) as sender:
    target = {key: np.zeros_like(array) for key, array in arrays.items()}
    ticket = receiver.expect(kvwire.CacheMemory(spec, target, tokens=3, writable=True))
    sender.send(ticket.id, kvwire.CacheMemory(spec, arrays, tokens=3))
    ticket.result()
print(*sys.modules)""").split()
    assert "kvwire.memory" in loaded and "torch" not in loaded


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file() and (PACKAGE / "_native.pyi").is_file()


# ---- stubs

STUB = ast.parse((PACKAGE / "_native.pyi").read_text())


def stub_parameters(function):
    """Names of all parameters but self; None for a property."""
    if any(getattr(decorator, "id", "") == "property" for decorator in function.decorator_list):
        return None
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in every if argument.arg != "self"]


def stubbed_members(node, classes):
    members = {}
    for base in node.bases:
        members |= stubbed_members(classes[base.id], classes)
    return members | {item.name: stub_parameters(item) for item in node.body
                      if isinstance(item, ast.FunctionDef)}


def stubbed():
    """{name: {member: parameters}} of classes, {name: parameters} of functions."""
    classes = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
    names = {name: stubbed_members(node, classes) for name, node in classes.items()}
    names |= {node.name: stub_parameters(node) for node in STUB.body
              if isinstance(node, ast.FunctionDef)}
    return {name: value for name, value in names.items() if not name.startswith("_")}


def native_parameters(function):
    """As pybind11 writes them in the docstring's first line; unnamed ones are None."""
    signature = function.__doc__.splitlines()[0]
    inside = signature[signature.index("(") + 1:signature.rindex(")")]
    while (flat := re.sub(r"\[[^\[\]]*\]", "", inside)) != inside:
        inside = flat
    names = [part.split(":")[0].strip() for part in inside.split(",") if ":" in part]
    return [None if re.fullmatch(r"arg\d+", name) else name for name in names if name != "self"]


def native_members(kind):
    inherited = dir(kind)
    return {name for name in inherited if not name.startswith("_")} | {
        name for name in ("__init__", "__len__") if name in vars(kind)
        and "See help(type(self))" not in (getattr(kind, name).__doc__ or "")}


def agree(native, stub):
    return len(native) == len(stub) and all(a in (None, b) for a, b in zip(native, stub))


def test_stubs_name_what_the_extension_has():
    public = {name for name in dir(_native) if not name.startswith("_")}
    assert set(stubbed()) == public
    for name in public:
        thing = getattr(_native, name)
        assert callable(thing)
        if inspect.isclass(thing):
            assert set(stubbed()[name]) == native_members(thing), name


def test_stubs_give_the_parameters_that_the_extension_takes():
    compared = 0
    for name, expected in stubbed().items():
        thing = getattr(_native, name)
        functions = {"": (thing, expected)} if not inspect.isclass(thing) else {
            member: (getattr(thing, member), parameters)
            for member, parameters in expected.items() if parameters is not None}
        for member, (function, parameters) in functions.items():
            assert agree(native_parameters(function), parameters), f"{name}.{member}"
            compared += 1
    assert compared > 60


# ---- errors

def error_classes():
    return {name: kind for name, kind in vars(errors).items()
            if inspect.isclass(kind) and issubclass(kind, errors.KvwireError)}


def documented_tree():
    """{class: parent} as errors.py draws it, and {class: other bases}."""
    parents, others, stack = {}, {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"([ │├└─]*)(\w+)(?:\((\w+)\))?(?:  |$)", line)
        if not match or match[2] not in error_classes():
            continue
        depth = len(match[1])
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parents[match[2]] = stack[-1][1] if stack else None
        others[match[2]] = match[3]
        stack.append((depth, match[2]))
    return parents, others


def test_the_tree_in_the_docstring_is_the_tree():
    parents, others = documented_tree()
    assert parents.keys() == error_classes().keys()
    for name, kind in error_classes().items():
        first, *rest = (base.__name__ for base in kind.__bases__)
        assert first == (parents[name] or "Exception")
        assert rest == [others[name]] * bool(others[name])


@pytest.mark.parametrize("code", errors.ErrorCode, ids=lambda code: code.name)
def test_a_pickled_error_keeps_its_evidence(code):
    """As when a worker process hands it to its parent."""
    error = errors.error_from_code(code, "what happened", expected=1, actual=2, offset=3,
                                   remote=True)
    error.extra = np.uint64(7)
    again = ForkingPickler.loads(ForkingPickler.dumps(error))
    assert type(again) is type(error) and again.args == error.args
    assert vars(again) == vars(error) and str(again) == str(error)
    assert (again.code, again.expected, again.actual, again.offset) == (code, 1, 2, 3)


# ---- README

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_has_a_snippet():
    assert SNIPPETS and "kvwire" in SNIPPETS[0]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippet_runs(number):
    run_python(SNIPPETS[number], "-W", "error")
