"""What is submitted to Slurm, and what is refused before."""

import json
import subprocess

import pytest

from tests.command import ROOT, TINY, onecurve
from trainer.cli import submit
from trainer.config import ConfigError

RUN = [*TINY, "steps=6"]


def refused(*arguments: str, run: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as error:
        submit.parse_job(arguments, [*RUN, *run])
    return error.value.problems


def script(*arguments: str, run: tuple[str, ...] = ()) -> str:
    job, cfg = submit.parse_job(arguments, [*RUN, *run])
    return submit.render(job, cfg, ROOT / "runs" / "x", [*RUN, *run])


def test_everything_wrong_with_a_job_and_its_run_is_said_at_once():
    problems = refused(
        "nodes=none", "lancher=srun", "time=soon", "launcher=mpirun", "mail=me", "requeue=maybe", "restarts=-1",
        "container_mounts=/data", "cpus_per_task=0", run=("stepz=3", "seed=-1"),
    )  # fmt: skip
    text = "\n".join(problems)
    assert len(problems) == 11
    assert "onecurve submit has no argument 'lancher=srun'; did you mean 'launcher'?" in text
    assert "nodes=none is not a number of at least 1" in text
    assert "time=soon is not a time limit; give minutes, or [days-]hours:minutes:seconds" in text
    assert "launcher=mpirun is not known; use srun, torchrun or deepspeed" in text
    assert "Run has no setting 'stepz'; did you mean 'steps'?" in text
    assert "seed=-1 must be at least 0" in text


def test_a_password_that_a_script_would_hold_is_refused_unless_a_variable_has_it(monkeypatch):
    monkeypatch.setenv("CACHE", "http://me:hunter2@host/x")
    [problem] = refused(run=("data.cache=http://me:hunter2@host/x",))
    assert problem.startswith("data.cache=http://***@host/x holds a user or password, which job.sbatch would hold, too")
    assert problem.endswith("write data.cache='${oc.env:NAME}'")
    assert "hunter2" not in script(run=("data.cache=${oc.env:CACHE}",))


def test_the_run_is_checked_with_the_ranks_of_the_job():
    assert refused("nodes=3", "gpus_per_node=8", "time=60") == [
        "batch.size=8 is not a multiple of 96 (24 ranks x batch.micro=4); use 96, or a smaller batch.micro"
    ]
    assert submit.parse_job(["nodes=2", "tasks_per_node=1"], RUN)[0].ranks == 2


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:01", 7201),
        ("1-12", 129600),
        ("2-01:30", 178200),
        ("1-00:00:05", 86405),
        ("", 0),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time, seconds):
    assert submit.Job(time=time).seconds == seconds


def test_a_limit_that_leaves_no_time_to_train_is_refused():
    [signal, deadline] = refused("time=2")
    assert signal.startswith("signal=120 seconds before a limit of time=2 is before the job begins")
    assert deadline.startswith("checkpoint.before_deadline=120 seconds is not less than time=2")


@pytest.mark.parametrize("policy", ["new", "never"])
def test_a_policy_under_which_a_requeued_job_would_not_continue_is_refused(policy):
    assert refused(run=(f"resume={policy}",))[0].startswith(f"resume={policy} does not let a requeued job continue")
    submit.parse_job(["requeue=false"], [*RUN, f"resume={policy}"])


def test_what_slurm_is_asked_for_is_in_the_script():
    asked = {
        "partition": "gpu", "account": "a", "qos": "q", "constraint": "c&d", "exclude": "n1", "dependency": "afterok:3",
        "mem": "0", "time": "1-00:00:00",
    }  # fmt: skip
    text = script(
        "nodes=1", "gpus_per_node=2", "mail=me@here", "container=image", "sbatch=--gres=nvme:1 --exclusive",
        *(f"{key}={value}" for key, value in asked.items()),
    )  # fmt: skip
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {f"--{key}={value}" for key, value in asked.items()} <= set(directives)
    assert {
        "--ntasks-per-node=2", "--gpus-per-node=2", "--signal=USR2@120", "--requeue", "--mail-user=me@here", "--gres=nvme:1",
        "--exclusive", "--open-mode=append", "--job-name=pretrain",
    } <= set(directives)  # fmt: skip
    assert "container=(--container-image=image)" in text
    assert "#@" not in text


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_the_script_is_one_that_bash_reads_whatever_an_override_holds(launcher):
    odd = ('name="it\'s $HOME; `x`"', "tracking.wandb.tags=['a b',c]")
    text = script(f"launcher={launcher}", "tasks_per_node=2", "nodes=1", run=odd)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    block = text[text.index("overrides=(") :].partition("\n)")[0] + "\n)\nprintf '%s\\n' \"${overrides[@]}\""
    said = subprocess.run(["bash"], input=block, text=True, capture_output=True, check=True).stdout.splitlines()
    assert said[-2:] == list(odd)
    tasks = 2 if launcher == "srun" else 1
    assert f"#SBATCH --ntasks-per-node={tasks}\n" in text


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        *(
            (f"{key}=x\necho owned", f"{key}='x\\necho owned' holds '\\n'")
            for key in ("partition", "dependency", "mem")
        ),
        ("mail=me@here\necho owned", "mail='me@here\\necho owned' holds"),
        ("account=a\u2028b", "account='a\\u2028b' holds '\\u2028'"),
        ('comment="', "has no argument"),
        (
            "sbatch=--comment='x",
            "sbatch=--comment='x cannot be cut into arguments (No closing quotation); close its quotation",
        ),
        ("sbatch='--comment=\"x\"'", "holds '\"', which a line of a batch script cannot; use another sbatch"),
        ("nodes=\u00b2", "nodes=\u00b2 is not a number of at least 1"),
        ("restarts=\u0663", "restarts=\u0663 is not a number"),
        ("time=1:99:99", "time=1:99:99 is not a time limit"),
    ],
)
def test_no_argument_becomes_a_line_of_the_script(argument, problem):
    assert any(problem in one for one in refused(argument)), refused(argument)


@pytest.mark.parametrize("override", ['name="two\\nlines"', 'run_dir="a\\nb"'])
def test_no_name_of_a_run_becomes_a_line_of_the_script(override):
    override = override.encode().decode("unicode_escape")
    assert any("holds '\\n', which a line of a batch script cannot" in problem for problem in refused(run=(override,)))


def test_what_sbatch_would_cut_or_fill_in_is_written_as_it_is_meant():
    job, cfg = submit.parse_job(["sbatch=--comment='two words' --gres=gpu:2"], [*RUN, "name='two words'"])
    lines = submit.render(job, cfg, ROOT / "with space" / "100%j", RUN).splitlines()
    assert '#SBATCH "--job-name=two words"' in lines
    assert f'#SBATCH "--output={ROOT}/with space/100%%j/logs/%j.log"' in lines
    assert '#SBATCH "--comment=two words"' in lines
    assert "#SBATCH --gres=gpu:2" in lines


def test_a_dry_run_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert submit.main(["--dry-run", "time=30", "--", *RUN]) == 0
    assert capsys.readouterr().out.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=pretrain\n")
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_nothing_is_written_and_the_dry_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, errors = onecurve(tmp_path, "submit", "time=30", "--", *RUN)
    assert (code, out) == (2, "")
    assert errors == "error: sbatch is not on this machine, so nothing was submitted; --dry-run shows the script\n"
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_cannot_work_is_refused_by_that_name(tmp_path):
    code, _, errors = onecurve(tmp_path, "submit", "nodes=none", "--", *RUN)
    assert (code, errors.splitlines()[0]) == (2, "This job cannot work:")


def test_code_and_configuration_are_kept_and_the_job_s_number_comes_last(tmp_path, monkeypatch, capsys):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\ntest "$1" = --parsable && test -f "$2" && echo "4711;cluster"\n')
    sbatch.chmod(0o755)
    repository = tmp_path / "mine"
    repository.mkdir()
    (repository / "judge.sh").write_text("ask http://host/v1\n")
    for command in (
        ["init", "-q"],
        ["add", "judge.sh"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", "-C", repository, *command], check=True)
    (repository / "judge.sh").write_text("ask http://me:hunter2@host/v1\n")
    (repository / "notes.txt").write_text("untracked")
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    monkeypatch.chdir(repository)
    assert submit.main(["nodes=2", "tasks_per_node=1", "--", *RUN, "run_dir=runs/mine"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["4711"]
    [kept] = (repository / "runs" / "mine" / "submissions").iterdir()
    assert f"{kept}/changes-0.diff has *** in place of passwords" in shown.err
    assert "+ask http://***@host/v1\n" in (kept / "changes-0.diff").read_text()
    # The other one is what differs in this project, whose tests have the word.
    assert not any("hunter2" in file.read_text() for file in kept.iterdir() if file.name != "changes-1.diff")
    state = json.loads((kept / "state.json").read_text())
    assert "notes.txt" in state["code"][str(repository)]["untracked"]
    assert len(state["code"][str(repository)]["commit"]) == 40
    assert "steps: 6" in (kept / "config.yaml").read_text()
    assert (kept / "job").read_text() == "4711\n"
    # A run folder that holds nothing else is free for the run.
    from trainer.checkpoint.run_folder import choose

    assert choose(str(repository / "runs" / "mine"), "never", {}, {}) == repository / "runs" / "mine"
