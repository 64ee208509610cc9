"""From a command line to a configuration: the only place that composes with Hydra."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from trainer.config import ConfigError, offer_schemas, parse
from trainer.models.load import Model
from trainer.run import Run


def compose(
    overrides: Sequence[str], *, config_dirs: Sequence[str] = (), name: str | None = None, later: Sequence[str] = ()
) -> Run:
    """Compose and parse the configuration of a run.

    Args:
        overrides: as on the command line: ``group=choice`` and ``setting=value``.
        config_dirs: folders of further YAML files, beside the package's own.
        name: the run's name; None = the one that is configured.
        later: paths that will exist by the time of the run; problems that name one of them are left out.

    Raises:
        ConfigError: with one sentence for everything that cannot work.
    """
    problems = list(Model.override_problems(overrides))
    with _composed(overrides, config_dirs, name) as cfg:
        try:
            run: Run = parse(cfg, later)
        except ConfigError as error:
            raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    return run


def compose_raw(overrides: Sequence[str], *, config_dirs: Sequence[str] = (), name: str | None = None) -> DictConfig:
    """Compose the configuration as `compose` does, and leave it unparsed, with its interpolations.

    Raises:
        ConfigError: if it cannot be composed, or its settings contradict each other.
    """
    if problems := list(Model.override_problems(overrides)):
        raise ConfigError(problems)
    with _composed(overrides, config_dirs, name) as cfg:
        return cfg


@contextmanager
def _composed(overrides: Sequence[str], config_dirs: Sequence[str], name: str | None) -> Iterator[DictConfig]:
    """The composed configuration; within the context ``${hydra:...}`` can be resolved."""
    problems = [f"--config-dir {f} is not a folder; name one that exists" for f in config_dirs if not Path(f).is_dir()]
    problems += [problem for override in overrides if (problem := override_problem(override))]
    if problems:
        raise ConfigError(problems)
    register_imports(overrides, config_dirs)
    given = [*([f"name={name}"] if name else []), *map(spelling_tolerant, overrides)]
    given += [f"{key}=null" for key in other_length(overrides)]
    if config_dirs:
        given.append(f"hydra.searchpath=[{','.join(f'file://{Path(folder).absolute()}' for folder in config_dirs)}]")
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            cfg = hydra.compose("train", overrides=given, return_hydra_config=True)
        except HydraException as error:
            raise ConfigError([composition_problem(error)]) from None
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        yield cfg
    finally:
        HydraConfig.instance().cfg = before


def composition_problem(error: HydraException) -> str:
    """What Hydra says about a configuration that cannot be composed, as one sentence with its remedy."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        near = difflib.get_close_matches(choice, error.options, n=1)
        hint = f"did you mean {group}={near[0]}? It has" if near else "it has"
        return f"{group}={choice} is not a choice; {hint} {', '.join(sorted(error.options))}"
    return " ".join(str(error).partition("Config search path")[0].split())


def override_problem(override: str) -> str | None:
    """What is wrong with a word that is no override of one run, with its remedy; None if it is one."""
    key, equals, value = override.partition("=")
    if not equals and Path(override).suffix in (".yaml", ".yml"):
        remedy = f"put it into FOLDER/experiment/ and write --config-dir FOLDER experiment={Path(override).stem}"
        return f"{override} is a file, not an override; {remedy}"
    if not equals or not key or key != key.strip():
        return f"{override!r} is not a valid override; write setting=value, without spaces around the equals sign"
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        for left, right in ("[]", "{}"):
            if value.startswith(left) and not value.endswith(right):
                return f"{override} is not a valid override; close the bracket: {key}={left}...{right}"
    else:
        if not parsed.is_sweep_override():
            return None
    quote = '"' if "'" in value else "'"
    remedy = f"quote the value: {key}={quote}{value}{quote} (and the whole word once more, for the shell)"
    return f"{override} is not a valid override; {remedy}"


def config_folder() -> Path:
    """Where the YAML files are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def register_imports(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> None:
    """Import the modules named by ``imports``, whose schemas must exist before Hydra composes.

    Raises:
        ConfigError: naming a module that cannot be imported.
    """
    problems = []
    for module in _imports(overrides, config_dirs):
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(f"imports={module} cannot be imported ({error}); is its folder on PYTHONPATH?")
    if problems:
        raise ConfigError(problems)
    offer_schemas([config_folder(), *map(Path, config_dirs)])


def _imports(overrides: Sequence[str], config_dirs: Sequence[str]) -> Iterator[str]:
    """Modules named on the command line or in the experiment's file."""
    folders = [config_folder(), *map(Path, config_dirs)]
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "imports":
            yield from DictConfig(OmegaConf.create(f"imports: {value}"))["imports"]
        if key == "experiment":
            for file in (folder / "experiment" / f"{value}.yaml" for folder in folders):
                if file.is_file():
                    yield from DictConfig(OmegaConf.load(file)).get("imports", [])


def other_length(overrides: Sequence[str]) -> dict[str, None]:
    """``epochs`` where a command line gives ``steps`` alone, and the other way round: what it says wins over a file."""
    given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    stated = [key for key in ("steps", "epochs") if given.get(key, "null") not in ("null", "")]
    return {key: None for key in ("steps", "epochs") if len(stated) == 1 and key not in given}


def spelling_tolerant(override: str) -> str:
    """Let an override of a root setting that does not exist reach `parse`, which knows what was meant."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return override
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    root = str(parsed.key_or_group).partition(".")[0]
    known = root in Run.__dataclass_fields__ or root.partition("/")[0] in groups | {"hydra"}
    return override if known or not parsed.type or override.startswith(("+", "~")) else f"++{override}"
