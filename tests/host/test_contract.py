"""Every name of Megatron that the package leans on is in the contract; read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import megatron_ext
from megatron_ext.host.contract import CONTRACT, CORE, TRAINING

PACKAGE = Path(megatron_ext.__file__).parent
#: Where Megatron's names may be used; the demo is a training script, cpu.py stands in for a GPU.
PLACES = ("host", "hooks", "resume")
OTHERS = ("api.py",)
#: Files of Megatron whose classes' attributes are looked for in our source.
CLASSES = (
    "core/optimizer/optimizer.py",
    "core/optimizer/distrib_optimizer.py",
    "core/optimizer/cpu_offloading/hybrid_optimizer.py",
    "core/distributed/param_and_grad_buffer.py",
    "core/dist_checkpointing/mapping.py",
    "core/optimizer_param_scheduler.py",
)
#: Names of Megatron's classes that the package uses of other objects only: of dicts, tensors, torch
#: optimizers, `inspect`, dataclasses of its own.
OF_OTHERS = {
    *("__init__", "items", "numel", "size", "dtype", "obj", "state", "param_groups", "min_lr"),
    *("lr_decay_style", "lr_wsd_decay_style", "unwrap"),
}

LISTED = {(name.module, name.attribute) for name in CONTRACT}
LAST = {name.attribute.rpartition(".")[2] for name in CONTRACT}


def sources() -> Iterator[tuple[str, ast.Module]]:
    files = [f for place in PLACES for f in sorted((PACKAGE / place).glob("*.py"))]
    for file in [*files, *(PACKAGE / other for other in OTHERS)]:
        yield str(file.relative_to(PACKAGE)), ast.parse(file.read_text())


def text_of(node: ast.AST) -> str | None:
    """A module's name as it is written: a string, or an f-string with CORE or TRAINING."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name) and node.id in ("CORE", "TRAINING"):
        return {"CORE": CORE, "TRAINING": TRAINING}[node.id]
    if isinstance(node, ast.JoinedStr):
        parts = [text_of(v.value if isinstance(v, ast.FormattedValue) else v) for v in node.values]
        return None if None in parts else "".join(p for p in parts if p is not None)
    return None


def imported(node: ast.AST) -> str | None:
    """The module that a call imports, or takes from those that are imported."""
    ways = ("importlib.import_module", "sys.modules.get")
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ways:
        return text_of(node.args[0])
    return None


def foreign(module: str | None) -> bool:
    """Whether a module is Megatron's or torch's; Bridge has a list of its own (`tests/bridge`)."""
    if module is None or module.startswith("megatron.bridge"):
        return False
    return module.split(".")[0] in ("megatron", "torch")


def chain_of(node: ast.AST) -> tuple[ast.AST, list[str]]:
    """What an attribute chain begins with, and its names."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return node, names


def names_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Module and dotted name of everything that is taken from an imported module of Megatron."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and foreign(module := imported(node.value)):
            (target,) = node.targets
            if isinstance(target, ast.Name):
                modules[target.id] = str(module)
        if isinstance(node, ast.ImportFrom) and foreign(node.module) and not node.level:
            assert node.module
            if node.module.startswith("megatron"):
                yield from ((node.module, alias.name) for alias in node.names)
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            begin, names = chain_of(node)
            found = imported(begin) or (
                modules.get(begin.id) if isinstance(begin, ast.Name) else ""
            )
            if foreign(found):
                yield str(found), ".".join(names)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "_rebind"):
            begin, name = node.args[0], node.args[1]
            found = imported(begin) or (
                modules.get(begin.id) if isinstance(begin, ast.Name) else ""
            )
            if foreign(found) and isinstance(name, ast.Constant):
                yield str(found), str(name.value)


def is_listed(module: str, name: str) -> bool:
    """Whether a name, or one inside of it (a class whose method is listed), is in the contract."""
    alike = {
        (m, a)
        for m, a in LISTED
        if (m == module or m.startswith(f"{module}."))
        and (a == name or a.startswith(f"{name}.") or name.startswith(f"{a}."))
    }
    return bool(alike)


def test_every_name_of_a_module_is_in_the_contract() -> None:
    found = {(place, *name) for place, tree in sources() for name in names_in(tree)}
    assert len(found) > 30
    missing = sorted(
        f"{place}: {module}.{name}" for place, module, name in found if not is_listed(module, name)
    )
    assert missing == []


def attributes_of_megatron() -> set[str]:
    """What methods of Megatron's classes assign to self, their methods and their fields."""
    import megatron.core

    root = Path(megatron.core.__path__[0]).parent
    found: set[str] = set()
    for file in CLASSES:
        for cls in ast.parse((root / file).read_text()).body:
            if not isinstance(cls, ast.ClassDef):
                continue
            for node in ast.walk(cls):
                stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                if stored and ast.unparse(node.value) == "self":
                    found.add(node.attr)
            found |= {n.name for n in cls.body if isinstance(n, ast.FunctionDef)}
            fields = (n.target for n in cls.body if isinstance(n, ast.AnnAssign))
            found |= {ast.unparse(target) for target in fields}
    return found


def test_every_attribute_of_an_object_is_in_the_contract() -> None:
    used = {
        node.attr
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    used |= {
        str(node.args[1].value)
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("getattr", "hasattr")
        and isinstance(node.args[1], ast.Constant)
    }
    leaned_on = (used & attributes_of_megatron()) - OF_OTHERS
    assert len(leaned_on) > 25
    # Overridden or called methods are listed by their own entries.
    assert leaned_on - LAST - {"load_state_dict", "state_dict"} == set()


def test_the_contract_has_no_name_that_is_not_used() -> None:
    texts = " ".join(
        path.read_text() for path in sorted(PACKAGE.rglob("*.py")) if path.name != "contract.py"
    )
    unused = [n.attribute for n in CONTRACT if n.attribute.rpartition(".")[2] not in texts]
    assert unused == []
