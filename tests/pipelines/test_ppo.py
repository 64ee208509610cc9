"""Policy gradients from the command line: ratio 1 at first, the same run on every layout, killed runs, adapters, refusals."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.chats import write_jsonl
from tests.command import TINY, Command, metrics
from tests.layouts import covering, overrides
from trainer.checkpoint.folder import FragmentFiles, read_manifest
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.generation.pretrained import RewardModel
from trainer.generation.scoring import score
from trainer.parallel.mesh import MeshShape
from trainer.rl.experience import Experience
from trainer.rl.settings import RolloutEngine
from trainer.run import run as start

PROMPTS = [
    {"prompt": f"In {place} {name}", "wanted": name}
    for name in ("Ada", "Ben", "Cleo")
    for place in ("Oslo", "Rome", "Lima")
]
WORTH = """
def vowels(prompts, completions, rows):
    return [sum(text.count(v) for v in "aeiou") / 10 for text in completions]

def brief(prompts, completions, rows):
    return [-float(len(text)) for text in completions]
"""
SMALL = [
    "pipeline=ppo", "data=prompts", "data.template=raw", "batch.size=8", "batch.micro=2", "batch.length=40",
    "pipeline.rollout.size=16", "pipeline.rollout.tokens=12", "pipeline.ppo_epochs=2", "pipeline.rollout.log_samples=99",
    "steps=20", "checkpoint.every=3", "schedule=constant", "optimizer.lr=0.001", "pipeline.critic_lr=0.001",
    "evaluation.samples=0", "tracking.wandb.mode=disabled", "tracking.tensorboard=false",
]  # fmt: skip
VOWELS = [
    "reward@pipeline.reward.main=function",
    "pipeline.reward.main.function=worth.vowels",
    "pipeline.critic=policy",
]
KINDS = {
    "gae": ["pipeline.kl_target=0.02"],
    "grpo": ["pipeline.advantage=grpo", "pipeline.samples_per_prompt=4", "pipeline.kl_loss_coef=0.1"],
    "lora": ["adapter=lora", "adapter.rank=4", "pipeline.reference=adapters_off", "pipeline.critic=head"],
}
QUICK = [("gae", (2, "zero3")), ("grpo", (2, "ddp"))]
MESHES = [("gae", (2, "fsdp tensor=2")), ("grpo", (2, "fsdp tensor=2"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small pretrained model, and prompts."""
    folder = tmp_path_factory.mktemp("base")
    Command(folder, "run_dir=run", *TINY, "steps=60", "optimizer.lr=0.003").finish()
    write_jsonl(folder / "prompts.jsonl", PROMPTS)
    return folder


def arguments(base, folder, *overrides) -> list[str]:
    (folder / "worth.py").write_text(WORTH)
    reward = [] if any(o.startswith("pipeline.reward.main.path") for o in overrides) else VOWELS
    return [
        "run_dir=run", f"model.path={base / 'run' / 'export'}", f"data.train=[{base}/prompts.jsonl]",
        f"data.eval=[{base}/prompts.jsonl]", f"data.cache={folder / 'cache'}", *SMALL, *reward, *overrides,
    ]  # fmt: skip


def run(base, folder, *overrides, ranks=1) -> list[dict]:
    Command(folder, *arguments(base, folder, *overrides), ranks=ranks).finish()
    return metrics(folder / "run")


def samples(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]


def weights(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    made = {}

    def of(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = (run(base, folder, *KINDS[kind]), samples(folder), folder)
        return made[kind]

    return of


@pytest.mark.parametrize(("kind", "ranks", "strategy"), covering(KINDS, QUICK, MESHES))
def test_every_layout_gives_the_same_run(kind, ranks, strategy, base, reference, tmp_path):
    expected, texts, _ = reference(kind)
    found = run(base, tmp_path, *KINDS[kind], *overrides(strategy), ranks=ranks)
    first = [row for row in samples(tmp_path) if row["step"] == 1]
    assert [row["completion"] for row in first] == [row["completion"] for row in texts if row["step"] == 1]
    # Five iterations; from the second on completions may differ where a draw falls between two sums.
    for one, other in zip(expected, found, strict=True):
        for key in ("loss", "grad_norm", "policy/approx_kl", "objective/score", "objective/kl", "value/loss"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), (one["step"], key)


def test_at_first_nothing_has_moved(reference):
    for kind in ("gae", "grpo"):
        first = reference(kind)[0][0]
        assert first["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert first["policy/approx_kl"] == pytest.approx(0, abs=1e-8)
        assert first["policy/clip_fraction"] == 0
        assert first["objective/kl"] == 0
        assert first["rollout/mismatch"] < 1e-5  # sampler and trainer: sums in another order
    later = reference("gae")[0]
    assert max(line.get("policy/approx_kl", 0) for line in later) > 1e-4


@pytest.mark.parametrize(
    ("kind", "ranks", "strategy"),
    [
        ("gae", 1, "ddp"),
        *(
            pytest.param(kind, 2, strategy, marks=pytest.mark.slow)
            for kind, strategy in (("gae", "zero3"), ("grpo", "ddp"), ("lora", "zero2"))
        ),
    ],
)
def test_what_the_sampler_said_serves_in_place_of_reading_again(kind, ranks, strategy, base, reference, tmp_path):
    expected, texts, _ = reference(kind)
    alike = [*KINDS[kind], f"strategy={strategy}", "pipeline.rollout.recompute_logprobs=false"]
    found = run(base, tmp_path, *alike, ranks=ranks)
    first = [row["completion"] for row in samples(tmp_path) if row["step"] == 1]
    assert first == [row["completion"] for row in texts if row["step"] == 1]
    for one, other in zip(expected, found, strict=True):
        for key in ("loss", "grad_norm", "policy/approx_kl", "objective/score", "objective/kl", "value/loss"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-4), (one["step"], key)
    assert found[0]["rollout/mismatch"] == 0
    assert found[0]["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    # Another estimate of the same entropy: of the tokens that were drawn, about 150 of them.
    assert found[0]["objective/entropy"] != expected[0]["objective/entropy"]
    assert found[0]["objective/entropy"] == pytest.approx(expected[0]["objective/entropy"], rel=0.2)


def test_sampler_and_trainer_route_a_policy_of_experts_alike_at_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "worth.py").write_text(WORTH)
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    # Weights so large that a token which goes to another expert has another probability by far.
    shape = ["model.family=mixtral", "model.experts=8", "model.initializer_range=0.3", "tracking.report=false"]
    start(compose(["run_dir=base", *TINY, *shape, "steps=1", "model.intermediate_size=32"]))
    own = ["model.path=base/export", "data.train=[prompts.jsonl]", "data.eval=[prompts.jsonl]", "data.cache=cache"]
    start(compose(["run_dir=r", *SMALL, *VOWELS, *KINDS["grpo"], *own, "steps=1", "tracking.report=false"]))
    first = metrics(tmp_path / "r")[0]
    # Float32: the same sums in another order, of the same experts.
    assert first["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert first["rollout/mismatch"] < 1e-5
    assert first["router/load_max"] > 1


def test_the_kl_coefficient_follows_its_target(reference):
    lines = [line for line in reference("gae")[0] if "objective/kl_coef" in line]
    prices, found = ([line[f"objective/{name}"] for line in lines] for name in ("kl_coef", "kl"))
    assert prices[0] == 0.05
    for n in range(1, len(prices)):
        wanted = prices[n - 1] * (1 + 0.1 * min(0.2, max(-0.2, found[n - 1] / 0.02 - 1)))
        assert prices[n] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", ["gae", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_continues_bitwise(kind, base, reference, tmp_path):
    expected, texts, folder = reference(kind)
    kills = 0
    for after in (4, 10):  # in the middle of an iteration's updates, and around a rollout
        going = Command(tmp_path, *arguments(base, tmp_path, *KINDS[kind]))
        file = tmp_path / "run" / "metrics.jsonl"
        while not (file.exists() and sum(1 for _ in file.open()) >= after):
            assert going.processes[0].poll() is None, going.processes[0].communicate()[0]
            time.sleep(0.02)
        os.kill(going.processes[0].pid, signal.SIGKILL)
        going.kill()
        kills += 1
    found = run(base, tmp_path, *KINDS[kind])
    assert kills == 2
    keys = ("step", "loss", "objective/score", "policy/approx_kl", "objective/kl_coef", "value/loss")
    assert [[line.get(k) for k in keys] for line in found] == [[line.get(k) for k in keys] for line in expected]
    assert samples(tmp_path) == texts
    ours, theirs = weights(tmp_path), weights(folder)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_export_is_the_policy_alone(base, reference):
    before = load_file(base / "run" / "export" / "model.safetensors")
    after = weights(reference("gae")[2])
    assert after.keys() == before.keys()
    assert any(not np.array_equal(after[name], before[name]) for name in before)


def test_adapters_are_written_without_the_critic(reference):
    written = load_file(reference("lora")[2] / "run" / "adapter" / "adapter_model.safetensors")
    assert written
    assert all("lora" in name for name in written)


def test_held_out_prompts_are_answered_and_scored(base, tmp_path):
    extra = ["+reward@pipeline.reward.brief=function", "pipeline.reward.brief.function=worth.brief",
             "pipeline.reward.brief.weight=0"]  # fmt: skip
    found = run(base, tmp_path, *extra, "steps=1", "evaluation.answers=9", "evaluation.samples=9",
                "evaluation.sample_tokens=6", "evaluation.temperature=0")  # fmt: skip
    rows = [row for row in samples(tmp_path) if "kl" not in row]
    assert len(rows) == 9
    last = found[-1]
    assert last["eval/score"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert last["eval/main"] == last["eval/score"]  # the other counts for nothing
    assert last["eval/brief"] == pytest.approx(np.mean([-len(row["completion"]) for row in rows]))
    assert found[0]["objective/brief"] < 0


@pytest.fixture(scope="module")
def judged_by(base, tmp_path_factory):
    """A reward model, hardly trained."""
    folder = tmp_path_factory.mktemp("reward")
    pairs = [{"prompt": row["prompt"], "chosen": f" {row['wanted']}.", "rejected": " The end."} for row in PROMPTS]
    write_jsonl(folder / "pairs.jsonl", pairs)
    Command(
        folder, "pipeline=reward", "data=preference", "run_dir=run", f"model.path={base / 'run' / 'export'}",
        f"data.train=[{folder}/pairs.jsonl]", f"data.cache={folder / 'cache'}", "data.template=raw", "batch.size=3",
        "batch.micro=3", "batch.length=40", "steps=3", "optimizer.lr=0.001", "evaluation.samples=0",
        "tracking.wandb.mode=disabled", "tracking.tensorboard=false",
    ).finish()  # fmt: skip
    return folder / "run" / "export"


def experience(checkpoint) -> Experience:
    """What a checkpoint in the middle of an iteration holds of it."""
    manifest = read_manifest(checkpoint)
    files = FragmentFiles(checkpoint, manifest)
    shapes = {name: shape for name, shape in manifest.shapes.items() if name.startswith("data/")}
    return Experience.of({n.removeprefix("data/"): files.full_tensor(n, "held", shape) for n, shape in shapes.items()})


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "ddp"), pytest.param(2, "zero3", marks=pytest.mark.slow)])
def test_a_reward_model_scores_what_was_sampled_and_the_critic_begins_from_it(
    ranks, strategy, base, judged_by, tmp_path
):
    model = f"pipeline.reward.main.path={judged_by}"
    found = run(base, tmp_path, model, f"strategy={strategy}", "steps=3", ranks=ranks)
    reward, held = RewardModel.open(judged_by), experience(tmp_path / "run" / "checkpoints" / "step-00000003")
    prompts, completions = held.prompts.split(held.prompt_lengths.tolist()), held.ids.split(held.lengths.tolist())
    with torch.no_grad():
        ids = [[*prompt.tolist(), *ids.tolist()] for prompt, ids in zip(prompts, completions, strict=True)]
        alone = score(reward.model, ids, torch.device("cpu"))
    given = [row["score"] for row in samples(tmp_path) if row["step"] == 1]
    # The ids that were sampled, not their text encoded again (docs/algorithms.md#ppo).
    assert given == pytest.approx([(value - reward.mean) / reward.std for value in alone], rel=1e-4, abs=1e-4)
    assert found[0]["objective/score"] == pytest.approx(np.mean(given), rel=1e-5)
    assert found[0]["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_passes_end_early_once_the_policy_has_moved_too_far(base, tmp_path):
    found = run(base, tmp_path, "pipeline.kl_limit=1e-9", "steps=6")
    starts = [line["step"] for line in found if "objective/score" in line]
    # The first step of an iteration cannot have moved; the second has, and ends it: two of four steps are taken.
    assert starts == [1, 3, 5]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pipeline.advantage=gea"], "pipeline.advantage=gea is not one of gae, grpo"),
        (["pipeline.rollout.size=20"], "pipeline.rollout.size=20 is not a multiple of batch.size=8; use 16"),
        (["pipeline.advantage=grpo", "pipeline.samples_per_prompt=1"], "pipeline.advantage=grpo needs 2 or more"),
        (["pipeline.critic=reward"], "pipeline.critic=reward needs a reward model in pipeline.reward"),
        (["pipeline.reward.main.function=worth.nothing"], "is not a function; worth has none called nothing"),
        (["pipeline.reward.main.weight=0"], "pipeline.reward scores nothing"),
        (["pipeline.rollout.tokens=40"], "leaves no room for a prompt in batch.length=40"),
        (
            ["pipeline.rollout.engine=vllm", "pipeline.rollout.recompute_logprobs=false"],
            "recompute_logprobs=false does not work with engine=vllm",
        ),
        (
            ["pipeline.rollout.engine=vllm", "pipeline.rollout.temperature=0.7", "pipeline.rollout.top_k=20"],
            "pipeline.rollout.temperature=0.7 with top_k, top_p or min_p gives no unfiltered log-probabilities",
        ),
        (
            ["pipeline.rollout.engine=vllm", "pipeline.rollout.min_p=0.1", "pipeline.rollout.top_p=0.9"],
            "pipeline.rollout.min_p=0.1 with top_p=0.9 filters in another order with engine=vllm",
        ),
        (["data=preference"], "the pipeline learns from prompts and the data holds preference pairs"),
    ],
)
def test_what_cannot_work_is_refused(overrides, said, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as refused:
        compose(arguments(base, tmp_path, *overrides), name="run")
    assert said in str(refused.value)


def test_ranks_that_must_have_the_same_completions_do_not_sample_by_vllm(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    pipeline = compose(arguments(base, tmp_path), name="run").pipeline
    assert list(pipeline.validate_mesh(MeshShape(tensor=2))) == []
    pipeline.rollout.engine = RolloutEngine.vllm  # not by name: the package need not be here
    assert list(pipeline.validate_mesh(MeshShape())) == []
    [sentence] = pipeline.validate_mesh(MeshShape(tensor=2))
    assert sentence.startswith("pipeline.rollout.engine=vllm samples on each rank by itself")
