"""The layering of ARCHITECTURE.md: an import never points up, and only trainer/parallel/ talks to other ranks."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "trainer"

# From the top; modules of one line may import each other.
LAYERS = [
    ["trainer.__main__", "trainer.help", "trainer.recipe", "trainer.lifecycle", "trainer.launching"],
    ["trainer.run"],
    [
        "trainer.pipelines", "trainer.loop", "trainer.evaluate", "trainer.checkpoint", "trainer.tracking", "trainer.console",
        "trainer.profiling", "trainer.provenance", "trainer.export", "trainer.guard",
        "trainer.run_folder", "trainer.estimate", "trainer.scaling", "trainer.inference", "trainer.preflight",
        "trainer.report", "trainer.checks", "trainer.sweep", "trainer.wandb_sink", "trainer.progress",
    ],
    [
        "trainer.rollout", "trainer.vllm_sampler", "trainer.actor", "trainer.experience", "trainer.rewards",
        "trainer.scoring", "trainer.judge", "trainer.throughput", "trainer.straggler",
    ],
    ["trainer.models", "trainer.data"],
    ["trainer.parallel"],
    [
        "trainer.functional", "trainer.advantages", "trainer.batch", "trainer.metrics", "trainer.optim", "trainer.config",
        "trainer.stopping", "trainer.memory",
    ],
]  # fmt: skip
COMMUNICATION = ("deepspeed", "torch.distributed")


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


def layer(module: str) -> int | None:
    for depth, members in enumerate(LAYERS):
        if any(module == m or module.startswith(f"{m}.") for m in members):
            return depth
    return None


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_its_layer():
    assert [m for m in map(module_name, FILES) if layer(m) is None and m not in ("trainer", "trainer.configs")] == []


def test_no_import_points_up():
    upward = [
        f"{module_name(file)} imports {name}"
        for file in FILES
        for name in imported(file)
        if (below := layer(module_name(file))) is not None
        and name.startswith("trainer.")
        and (above := layer(name)) is not None
        and above < below
    ]
    assert upward == []


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
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                guilty.append(f"{file.name}:{node.lineno} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                guilty.append(f"{file.name}:{node.value.lineno} trusts remote code")
    assert guilty == []


def test_files_can_be_read_at_one_sitting():
    assert {module_name(f): n for f in FILES if (n := len(f.read_text().splitlines())) > 350} == {}
