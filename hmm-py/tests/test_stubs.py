"""_native.pyi says what the binary has: the same names, and the same parameters."""

import ast
import inspect
from pathlib import Path

import hmm
from hmm import _native

STUB = ast.parse((Path(hmm.__file__).parent / "_native.pyi").read_text())
# Python adds these to every class and module.
IMPLICIT = set(dir(object)) | {"__module__", "__doc__"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def stub_names(body: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for node in body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) if not is_private(name):
                names.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)) if not is_private(name):
                names.add(name)
    return names


def stub_classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef) and not is_private(node.name)}


def stub_parameters(function: ast.FunctionDef) -> list[tuple[str, str]]:
    """(name, kind) of each parameter, without self or cls."""
    arguments = function.args
    positional = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    kinds = [(name, "positional") for name in positional if name not in ("self", "cls")]
    return kinds + [(argument.arg, "keyword") for argument in arguments.kwonlyargs]


def binary_parameters(function: object) -> list[tuple[str, str]]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(function).parameters.values()
    kinds = [(p.name, "keyword" if p.kind is keyword else "positional") for p in parameters]
    return [(name, kind) for name, kind in kinds if name != "self"]


def defaults(function: ast.FunctionDef) -> dict[str, object]:
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {argument.arg: ast.literal_eval(value) for argument, value in pairs if value is not None}


def test_module_names_are_equal():
    binary = {name for name in dir(_native) if not name.startswith("__")}
    assert stub_names(STUB.body) == binary


def test_class_members_are_equal():
    for name, node in stub_classes().items():
        binary = set(dir(getattr(_native, name)))
        if name == "Error":
            binary -= set(dir(OSError)) | {"__weakref__", "__dict__"}
        assert stub_names(node.body) - {"__new__"} == binary - IMPLICIT, name


def test_parameters_and_defaults_are_equal():
    for name, node in stub_classes().items():
        for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
            if method.decorator_list or method.name in ("__enter__", "__exit__"):
                continue
            owner = getattr(_native, name)
            function = owner if method.name == "__new__" else getattr(owner, method.name)
            where = f"{name}.{method.name}"
            assert stub_parameters(method) == binary_parameters(function), where
            binary = inspect.signature(function).parameters
            expected = {key: p.default for key, p in binary.items() if p.default is not p.empty}
            assert defaults(method) == expected, where


def test_everything_native_is_documented():
    for name in stub_names(STUB.body):
        item = getattr(_native, name)
        if isinstance(item, type) or callable(item):
            assert item.__doc__, name
    for name, node in stub_classes().items():
        for member in stub_names(node.body):
            if not member.startswith("__"):
                assert getattr(_native, name).__dict__[member].__doc__, f"{name}.{member}"
