"""The layering of ARCHITECTURE.md: an import never points up, and only trainer/parallel/ talks to other ranks."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "trainer"

# From the top: a module imports only what stands below its own name, or beside it in the same package.
LAYERS = [
    "__main__",
    "cli",
    "gpu_check",
    "jobs",
    "compose",
    "run",
    "shipped",
    "step_log",
    "loop",
    "evaluate",
    "pipelines",
    "rl",
    "diagnostics",
    "tracking",
    "report",
    "checkpoint",
    "export",
    "generation",
    "tinyworld",
    "models",
    "data",
    "settings",
    "parallel",
    "stopping",
    "optim",
    "functional",
    "batch",
    "metrics",
    "disk",
    "config",
    "secrets",
]
COMMUNICATION = ("deepspeed", "torch.distributed")
OBJECT_COLLECTIVES = (
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
)
"""They pickle what they send."""


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively; write the full name"
            names += [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_its_layer():
    rooms = {room(module_name(file)) for file in FILES} - {"", "configs"}
    assert sorted(rooms - set(LAYERS)) == []


def test_the_architecture_page_has_the_layers_in_their_order():
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == LAYERS, "correct the table of rooms in ARCHITECTURE.md"


def test_no_import_points_up():
    upward = [
        f"{module_name(file)} imports {name}"
        for file in FILES
        for name in imported(file)
        if room(module_name(file)) in LAYERS
        and name.startswith("trainer.")
        and room(name) in LAYERS
        and LAYERS.index(room(name)) < LAYERS.index(room(module_name(file)))
    ]
    assert upward == []


def test_no_modules_import_each_other_not_even_lazily():
    modules = {module_name(file): file for file in FILES}
    below = {name: {n for n in imported(file) if n in modules and n != name} for name, file in modules.items()}
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(below[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in modules:
        walk(name, [])


def test_pretraining_imports_no_reward_and_no_http_client():
    files = {module_name(file): file for file in FILES}
    reached, waiting = set(), ["trainer.pipelines.pretrain"]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        waiting += imported(files[name]) if name in files else []
    assert "torch" in reached
    assert sorted(name for name in reached if name == "httpx" or name.startswith("trainer.rl")) == []


def test_only_the_parallel_package_communicates():
    guilty = [
        f"{module_name(file)} imports {name}"
        for file in FILES
        if not module_name(file).startswith("trainer.parallel")
        for name in imported(file)
        if any(name == c or name.startswith(f"{c}.") for c in COMMUNICATION)
    ]
    assert guilty == []


def test_nothing_is_unpickled():
    guilty = []
    for file in [*FILES, *(PACKAGE.parent / "scripts").rglob("*.py"), *(PACKAGE.parent / "launch").rglob("*.py")]:
        guilty += [f"{file.name} imports {name}" for name in imported(file) if name.partition(".")[0] == "pickle"]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "torch.load" or called.rpartition(".")[2] in OBJECT_COLLECTIVES:
                    guilty.append(f"{file.name}:{node.lineno} calls {called}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                guilty.append(f"{file.name}:{node.value.lineno} trusts remote code")
    assert guilty == []


def test_files_can_be_read_at_one_sitting():
    assert {module_name(f): n for f in FILES if (n := len(f.read_text().splitlines())) > 350} == {}


def test_ranks_are_asked_for_by_purpose():
    """Outside `trainer.parallel` nobody reads the world's rank or size: `world.data`, `world.is_main`, a collective."""
    guilty = [
        f"{module_name(file)}:{node.lineno} reads {ast.unparse(node)}"
        for file in FILES
        if not module_name(file).startswith("trainer.parallel")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("rank", "size", "local_rank")
        if ast.unparse(node.value).removesuffix("()").endswith("world")
    ]
    assert guilty == []


def test_the_parallel_package_knows_no_metric_class():
    parallel = [file for file in FILES if module_name(file).startswith("trainer.parallel")]
    assert [str(file) for file in parallel if any(n.startswith("trainer.metrics") for n in imported(file))] == []


def test_functions_can_be_read_at_one_sight():
    long = {
        f"{module_name(file)}.{node.name}": lines
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert long == {}
