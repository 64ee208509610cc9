"""`onecurve estimate --plan`, as a user types it."""

import dataclasses
import json
import re

import pytest

from scripts.mesh_table import MODELS, NODES, cluster_of, overrides_of
from tests.command import ROOT, onecurve
from tests.unit.diagnostics.test_memory import SEVEN
from trainer.cli.estimate import compose_without_data
from trainer.cli.plan import Wish, layouts_of, plan
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.diagnostics.links import Links
from trainer.diagnostics.memory import memory
from trainer.diagnostics.mesh_plan import AXES, Choice, Cluster, utilisation
from trainer.diagnostics.step_time import step_time
from trainer.models.recompute import Recompute
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.zero import Zero1, Zero2

EIGHT = Cluster(1, "H100", 1e15, 0.5, 80e9, Links())
RUN = ["precision=bf16", "batch.size=64", "batch.micro=1", "batch.length=4096", "model.activation_checkpointing=null"]


def wish(*words: str) -> Wish:
    return Wish.of(["nodes=1", "gpus_per_node=8", *words])


def test_a_plan_says_what_to_paste_and_what_else_was_tried(tmp_path):
    code, out, _ = onecurve(tmp_path, "estimate", "--plan", "nodes=1", "gpus_per_node=8", "experiment=7b")
    assert code == 0
    assert "| best |" in out
    # 7.24 billion weights of 16 bytes are 116 GB, their casts 14 more, and the loss and a block's backward 3.
    assert "| ddp | 1 | 1 | 1 | 1 | 8 | 1 | full | 133 GB | - | - | needs 133 GB of 64 |" in out
    [line] = [line for line in out.splitlines() if line.startswith("use ")]
    assert line.startswith("use strategy=fsdp batch.micro=")
    assert "links of a device 450 GB/s within and 50 GB/s between nodes, 80% of them reached" in out


def test_what_a_plan_proposes_composes(tmp_path):
    cfg = compose(RUN)
    [line] = [line for line in plan(cfg, SEVEN, EIGHT, wish()) if line.startswith("use ")]
    words = line.removeprefix("use ").split()
    assert compose([*RUN, *words]).strategy.name == "fsdp"


def test_settings_that_are_named_stay(tmp_path):
    cfg = compose(RUN)
    kept = list(layouts_of(cfg, SEVEN, EIGHT, wish("strategy=zero2", "batch.micro=1"), {}))
    assert {(name, layout.micro) for name, layout in kept} == {("strategy=zero2", 1)}
    both = {name for name, _ in layouts_of(cfg, SEVEN, EIGHT, wish("strategy.reshard=false"), {})}
    assert both == {"strategy=fsdp strategy.reshard=false"}
    full = compose([*RUN, "model.activation_checkpointing=full"])
    table = [line for line in plan(full, SEVEN, EIGHT, wish("model.activation_checkpointing=full")) if " GB | " in line]
    assert table
    assert all("| full |" in line for line in table)


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["nodes=2"], ["gpus_per_node is required: --plan proposes a mesh for so many; write gpus_per_node=8"]),
        (["nodes=no", "gpus_per_node=8"], ["nodes=no is no number of 1 or more; write nodes=8"]),
        (
            ["nodes=2", "gpus_per_node=8", "strategy.autocast=true"],
            ["strategy.autocast is nothing that --plan chooses; leave it out, or use one of reshard, tensor, sequence, "
             "expert, pipeline"],
        ),
    ],
)  # fmt: skip
def test_what_a_plan_lacks_is_refused_before_anything_is_composed(words, problems):
    with pytest.raises(ConfigError) as error:
        Wish.of(words)
    assert error.value.problems == problems


def test_what_fits_nowhere_says_what_would(tmp_path):
    code, out, errors = onecurve(
        tmp_path, "estimate", "--plan", "nodes=1", "gpus_per_node=8", "experiment=7b", "model=70b"
    )
    assert code == 2
    assert "\nuse " not in out
    # 69 billion weights of 16 bytes over 8 devices.
    assert "nothing fits: strategy=fsdp" in errors
    assert "nodes=" in errors
    assert "would fit it: strategy=" in errors


def test_a_pipeline_is_tried_beside_other_axes_and_nothing_that_is_refused():
    spread = [layout for _, layout in layouts_of(compose(RUN), SEVEN, EIGHT, wish(), {})]
    assert all(not list(FSDP(**{axis: getattr(layout, axis) for axis in AXES}).problems()) for layout in spread)
    assert any(layout.pipeline == layout.tensor == layout.sequence == 2 for layout in spread)


def test_a_batch_that_no_mesh_divides_is_refused_with_sizes_that_do():
    cfg = compose(RUN)
    twelve = dataclasses.replace(EIGHT, links=Links(per_node=12))
    with pytest.raises(ConfigError, match=r"batch.size=64 divides among no mesh of 12 devices .*; use 60 or 72"):
        list(plan(cfg, SEVEN, twelve, wish("strategy=ddp")))


def test_an_axis_that_no_size_works_of_is_left_out_with_its_reason():
    # No two ranks divide three heads.
    odd = dataclasses.replace(SEVEN, num_attention_heads=3, num_key_value_heads=3)
    refused: dict[str, str] = {}
    layouts = list(layouts_of(compose(RUN), odd, EIGHT, wish(), refused))
    assert layouts
    assert all(layout.tensor == 1 for _, layout in layouts)
    assert refused["tensor"].startswith("strategy.tensor=2 ")


def test_the_links_of_a_command_line_replace_those_of_the_device(tmp_path):
    words = ["--plan", "nodes=2", "gpus_per_node=4", "--device", "A100", "--between", "3", "--reached", "1"]
    code, out, _ = onecurve(tmp_path, "estimate", *words, "experiment=1b")
    assert code == 0
    assert "links of a device 300 GB/s within and 3 GB/s between nodes, 100% of them reached" in out


PLANS = [
    words
    for page in ("README.md", "docs/scale.md")
    for words in re.findall(r"^onecurve (estimate --plan .+)$", (ROOT / page).read_text(), re.MULTILINE)
]


@pytest.mark.slow
@pytest.mark.parametrize("words", PLANS)
def test_what_the_documentation_plans_fits(words, tmp_path):
    code, out, problem = onecurve(tmp_path, *words.split())
    assert code == 0, problem
    assert "| best |" in out


ROW = re.compile(r"^\| (\w+) \| ([\d,]+) \| `(.+?)` \| (\d+ GB) \| ([\d.]+ s) \| (\d+%) \|$", re.MULTILINE)
STRATEGIES = {kind().name: kind for kind in (DDP, Zero1, Zero2, FSDP)}


@pytest.mark.slow
def test_every_row_of_the_documentation_works_and_is_what_the_estimate_says():
    rows = ROW.findall((ROOT / "docs" / "scale.md").read_text())
    runs = {model: compose_without_data(overrides_of(model)) for model in MODELS}
    assert {(model, gpus) for model, gpus, *_ in rows} <= {(m, f"{8 * n:,}") for m in MODELS for n in NODES}
    assert len(rows) >= 20
    for model, gpus, words, *figures in rows:
        cluster, given = cluster_of(int(gpus.replace(",", "")) // 8), dict(word.split("=") for word in words.split())
        sizes = {name.removeprefix("strategy."): json.loads(v) for name, v in given.items() if "strategy." in name}
        cfg = runs[model]
        batch = dataclasses.replace(cfg.batch, micro=int(given["batch.micro"]))
        cfg = dataclasses.replace(cfg, strategy=STRATEGIES[given["strategy"]](**sizes), batch=batch)
        shape = cfg.model.architecture(cfg.model.vocab_size)
        refused = cfg.pipeline.validate_layout(batch, cfg.strategy.mesh, cluster.ranks)
        assert [*cfg.validate_division(shape), *refused] == [], (model, gpus)
        again = Recompute(given["model.activation_checkpointing"])
        spread = dataclasses.replace(cfg.layout(shape, cluster.ranks, cuda=True), recompute=again)
        timed = step_time(shape, spread, peak=cluster.peak, utilisation=cluster.utilisation, links=cluster.links)
        need = memory(shape, spread).total
        choice = Choice("", spread, need, timed)
        expected = [f"{need / 1e9:.0f} GB", f"{timed.total:.2f} s", f"{utilisation(shape, choice, cluster):.0%}"]
        assert figures == expected, f"{model} on {gpus}: print the table again with python -m scripts.mesh_table"
        assert need <= 0.8 * 80e9
