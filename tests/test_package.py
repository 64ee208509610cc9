"""What is installed: configurations inside the package, found from any folder."""

import subprocess
import sys
import zipfile

from tests.command import ROOT, environment
from trainer.cli import VERBS


def test_a_wheel_holds_the_configurations_inside_the_package_and_runs_without_the_checkout(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", "."]
    source = tmp_path / "source"
    ignored = [".git", ".venv", "runs", "build", "*.egg-info", ".*_cache"]
    exclude = [f"--exclude={name}" for name in ignored]
    archive = subprocess.run(["tar", "-C", ROOT, "-c", *exclude, "."], check=True, capture_output=True).stdout
    source.mkdir()
    subprocess.run(["tar", "-C", source, "-x"], input=archive, check=True)
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [wheel] = (tmp_path / "dist").glob("onecurve-*.whl")
    with zipfile.ZipFile(wheel) as archived:
        names = archived.namelist()
        archived.extractall(tmp_path / "site")
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"trainer"}
    shipped = {p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    assert {n.removeprefix("trainer/configs/") for n in names if n.startswith("trainer/configs/")} == shipped
    assert {f"trainer/cli/{verb.replace('-', '_')}.py" for verb in VERBS} | {"trainer/cli/slurm.sbatch"} <= set(names)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {**environment(), "PYTHONPATH": str(tmp_path / "site")}
    show = "import trainer, runpy, sys; print(trainer.__file__); sys.argv = ['trainer', '--cfg', 'job']; "
    show += "runpy.run_module('trainer', run_name='__main__')"
    done = subprocess.run([sys.executable, "-P", "-c", show], cwd=elsewhere, env=env, capture_output=True, text=True)
    assert str(tmp_path / "site") in done.stdout, done.stderr
    assert "pipeline:" in done.stdout
    assert "batch:" in done.stdout
