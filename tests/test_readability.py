"""What keeps the code easy to enter: one name for one thing, and the field's words."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "trainer").rglob("*.py"))
TREES = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in FILES}
RIDDLES = {"found", "held", "said", "kept", "told", "whole", "beyond", "beside"}
"""Names that say nothing about what they hold; no codebase of the field uses them."""


def test_no_class_name_stands_for_two_things():
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name: count for name, count in names.items() if count > 1} == {}


def names_in(tree: ast.AST) -> set[str]:
    """Variables, arguments, attributes that are assigned, functions and fields."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return {name.strip("_") for name in names}


def test_names_are_words_of_the_field():
    assert {file: riddles for file, tree in TREES.items() if (riddles := names_in(tree) & RIDDLES)} == {}
