"""From conf/ and command line overrides to a typed Config, with one clear message per mistake. Imports no torch."""

import difflib
import functools
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pipelines import cluster_settings, evaluation_settings, processes, prune_settings
from pipelines import config as configuration
from pipelines.config import Config, UserError
from pipelines.path_settings import PATHS, expand_home

GROUPS = ("experiment", "model", "student", "parallel", "data", "teacher", "distil", "signals", "benchmark", "cluster")


def conf_directory() -> Path:
    """conf/ of the checkout, or the copy that an installation carries inside the package."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def group_options(group: str) -> list[str]:
    """Their names; those of a folder below with it, as ablations/kd."""
    directory = conf_directory() / group
    return sorted(str(path.relative_to(directory).with_suffix("")) for path in directory.rglob("*.yaml"))


def compose(overrides: list[str]) -> Config:
    """The configuration of `conf/config.yaml` with `overrides` (Hydra's syntax). Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    _register()
    overrides = [_expand_home(o.lstrip("+")) for o in overrides]  # every key exists: +key=value means key=value
    overrides = [ALIASES.get(key := o.partition("=")[0], key) + o[len(key) :] for o in overrides]
    for override in overrides:
        group, equals, option = override.partition("=")
        if override.startswith("~"):
            raise UserError(f"{override}: a setting cannot be removed. Give it another value with key=value.")
        if not group or not equals:
            raise UserError(_not_an_override(override))
        if listed := _list_above(group):
            raise UserError(f"{override}: expected a whole list, found a name within one. Write {_type_of(listed)}.")
        if group.startswith("hydra"):
            raise UserError(
                f"{override}: there is no such setting. Hydra's own settings have no use here: leave it out."
            )
        if group in GROUPS and group != "experiment" and option in ("null", ""):
            raise UserError(f"{override}: expected one of {', '.join(group_options(group))}.")
    mappings = {key: value for o in overrides if (key := o.partition("=")[0]) in MAPPINGS for value in [_mapping(o)]}
    others = [override for override in overrides if override.partition("=")[0] not in MAPPINGS]
    try:
        with initialize_config_dir(config_dir=str(conf_directory()), version_base="1.3"):
            tree = hydra_compose("config", overrides=others)
        for key, value in mappings.items():
            OmegaConf.update(tree, key, value, merge=False)  # Hydra cannot merge a mapping into null
        OmegaConf.register_new_resolver("now", _no_time, replace=True)  # in place of Hydra's, which each start brings
        config = OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides)) from None
    except YAMLError as error:
        raise UserError(_not_yaml(error)) from None
    assert isinstance(config, Config)
    expand_home(config)  # the same for paths that were quoted, or that stand in a file
    return config


@functools.cache
def _register() -> None:
    """Once per process: it takes a quarter of the time of composing."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("oc.env", _of_environment, replace=True)
    OmegaConf.register_new_resolver("one_minus", lambda a: round(1 - a, 12), replace=True)  # conf/signals


_NONE = object()


def _no_time(*pattern: str) -> str:
    """In place of Hydra's ${now:}: every rank, and every job of a chain, composes the settings by itself."""
    raise UserError(
        f"${{now:{','.join(pattern)}}}: expected a value that is the same in every process and at each start, found "
        "the time. Write a name that stays: by it the same command continues a run."
    )


def _of_environment(name: str, default: Any = _NONE) -> Any:
    """OmegaConf's ${oc.env:NAME}, but for variables that each process or job has of its own."""
    from omegaconf.resolvers import oc

    if name.startswith(processes.OF_A_JOB) or name in (*processes.OF_A_RANK, "HOSTNAME"):
        raise UserError(
            f"${{oc.env:{name}}}: expected a variable that is the same in every process and job, found one that each "
            f"has of its own. Let the shell expand it once, as in key=${name}, or write the value."
        )
    return oc.env(name) if default is _NONE else oc.env(name, default)


MAPPINGS = (  # settings that hold names and values of their own
    "model.shape.rope_scaling",
    *("evaluate.tasks.shots", "evaluate.tasks.metrics", "evaluate.tasks.published"),
)
ALIASES = {"dry_run": "plan.dry_run"}


def _mapping(override: str) -> dict[str, Any] | None:
    """The value of an override of one of MAPPINGS."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    key = override.partition("=")[0]
    if not _parses(override):
        raise UserError(_not_an_override(override))
    value = OverridesParser.create().parse_override(override).value()
    if not (value is None or isinstance(value, dict)):
        raise UserError(f"{override}: expected names and values, as in '{key}={{one: 1, two: 2}}', or null.")
    return value and {str(name): entry for name, entry in value.items()}


def _expand_home(override: str) -> str:
    """`~` at the start of a path stands for the home directory, as in a shell; Hydra does not take it unquoted."""
    key, equals, value = override.partition("=")
    if key in PATHS and value.startswith("~"):
        return f"{key}={os.path.expanduser(value)}"
    if f"{key}[]" in PATHS:
        value = re.sub(r"([\[,] *)(~[^,\]\s]*)", lambda found: found[1] + os.path.expanduser(found[2]), value)
    if f"{key}[].path" in PATHS:
        value = re.sub(r"(\bpath: *)(~[^,}\s]*)", lambda found: found[1] + os.path.expanduser(found[2]), value)
    return key + equals + value


def explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's errors in the words of the command line, with the names that come closest."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if ours := next((part for part in chain if isinstance(part, UserError)), None):
        where = _full_key("\n".join(str(part) for part in chain))
        return f"{where}: {ours}" if where else str(ours)
    text = "\n".join(str(part) for part in chain)
    overridden = re.search(r"Could not override '([^']+)'", text)
    if match := re.search(r"Could not find '([^'/]+)/([^']*)'", text):
        return _unknown_option(*match.groups())
    if match := re.search(r"Key '([^']+)' (?:is )?not in '(\w+)'", text):
        key, kind = _full_key(text) or match.group(1), match.group(2)
        written = next((o.split("=", 1)[0] for o in overrides if o.startswith(f"{key}.")), key)
        return _unknown(written, kind, overrides)
    if overridden:
        return _unknown(overridden.group(1))
    if match := re.search(r"[Ii]nterpolation key '([^']+)'|Environment variable '([^']+)'", text):
        return _unknown_interpolation(match.group(1) or match.group(2), overrides)
    if match := re.search(r"merging override (\S+?)=", text) or re.search(r"full_key: (\S+)", text):
        problems = [line for line in text.splitlines() if re.match(r"(?i)(value|invalid|cannot|field|object)\b", line)]
        return _wrong_value(match.group(1), (problems or [text.splitlines()[-1]])[0], overrides)
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return _several(*match.groups())
    if type(error).__name__ == "OverrideParseException":
        return _not_an_override(next((o for o in overrides if not _parses(o)), overrides[-1]))
    return text.splitlines()[0]


def _several(key: str, value: str) -> str:
    """A comma outside of brackets: Hydra would start one run per value."""
    if key in GROUPS:
        return f"{key}={value}: expected one value, found several. Give one of {', '.join(group_options(key))}."
    kind = _type_of(key)
    if kind.startswith("a text"):
        return f"{key}={value}: expected one text, found commas outside of quotes. Write '{key}=\"{value}\"'."
    remedy = f"Give {kind}." if kind.startswith(("a whole", "a number", "true")) else f"Write {key}=[{value}]."
    return f"{key}={value}: expected one value or a list, found several. {remedy}"


def _unknown_interpolation(name: str, overrides: list[str]) -> str:
    where = next((o for o in overrides if name in o), f"${{{name}}}")
    return (
        f"{where}: expected ${{group.setting}} of the configuration or ${{oc.env:NAME}} of the environment, found no "
        f"{name} there. Let the shell expand it, or write the value."
    )


def _not_an_override(override: str) -> str:
    return (
        f"{override!r}: expected key=value, as in distil.steps=200 or stage=[prune,distil]. Quote for Hydra what has "
        "commas, brackets or spaces in it, as in 'export.prompt=\"a, b\"'."
    )


def _parses(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _not_yaml(error: Exception) -> str:
    """Of a file of conf/, or of a site's own."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a file of settings"
    tab = " Indent with spaces: YAML takes no tabs." if "\\t" in problem else " Mend the file."
    return f"{where}: expected YAML, found: {problem}.{tab}"


def _list_above(key: str) -> str:
    """The setting that is a list, and of which a key names neither the whole nor an entry by its number."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        above = ".".join(parts[:length])
        if "list[" in str(_kind_of(above)) and not parts[length].isdigit():
            return above
    return ""


def known_keys(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted path of the schema, groups too."""
    keys = []
    for entry in fields(kind):
        keys.append(prefix + entry.name)
        if is_dataclass(entry.type):
            keys += known_keys(entry.type, f"{prefix}{entry.name}.")
    return keys


def _full_key(text: str) -> str:
    match = re.search(r"full_key: (\S+)", text)
    return match.group(1) if match else ""


def _entry(key: str, kind: Any, overrides: Sequence[str]) -> str:
    """The path of a name in an entry of a list of settings, "gates[0].blow"; without the number where no override on
    the command line has it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    homes = [name for name in known_keys() if _kind_of(name) == list[kind]]
    for override in overrides:
        home = override.lstrip("+~").partition("=")[0]
        if home in homes:
            entries = OverridesParser.create().parse_override(override).value()
            for place, entry in enumerate(entries if isinstance(entries, list) else []):
                if isinstance(entry, dict) and key in map(str, entry):
                    return f"{home}[{place}].{key}"
    return f"{homes[0]}[].{key}" if len(homes) == 1 else key


def _unknown(key: str, kind: str = "", overrides: Sequence[str] = ()) -> str:
    names = known_keys() + [group for group in GROUPS if group not in known_keys()]
    homes = (configuration, prune_settings, cluster_settings, evaluation_settings)
    inner = next((found for home in homes if (found := getattr(home, kind, None)) is not None), None)
    inner = None if inner is Config or "." in key else inner  # an entry of a list has no path of its own
    if inner is not None:
        siblings = [entry.name for entry in fields(inner)]
    else:
        parent = key.rpartition(".")[0]
        siblings = [n for n in names if n.rpartition(".")[0] == parent]
    siblings = siblings or names
    same_leaf = [n for n in names if n.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, siblings, n=3, cutoff=0.75) or same_leaf
    remedy = f"Did you mean {' or '.join(close)}?" if close else f"Expected one of {', '.join(siblings)}."
    if inner is not None:
        key = _entry(key, inner, overrides)
    return f"{key}: there is no such setting. {remedy}"


def _unknown_option(group: str, option: str) -> str:
    options = group_options(group)
    close = difflib.get_close_matches(option, options, n=3, cutoff=0.4)
    remedy = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{group}={option}: there is no such option. Expected one of {', '.join(options)}.{remedy}"


def _wrong_value(key: str, problem: str, overrides: list[str]) -> str:
    given = [o for o in overrides if o.lstrip("+~").split("=", 1)[0] == key]
    kind = _type_of(key)
    expected = f" Expected {kind}." if kind and "expected one of" not in problem else ""
    return f"{given[-1] if given else key}: {problem.strip().rstrip('.')}.{expected}"


def _kind_of(key: str) -> Any:
    """The type of a setting in the schema; None of one that is not there."""
    kind: Any = Config
    for name in key.split("."):
        kinds = {entry.name: entry.type for entry in fields(kind)} if is_dataclass(kind) else {}
        if name not in kinds:
            return None
        kind = kinds[name]
    return kind


def _type_of(key: str) -> str:
    kind = _kind_of(key)
    if kind is None:
        return ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(kind.__members__)
    if kind == list[configuration.SourceConfig]:
        return f"a list of sources, as in '{key}=[{{path: text.jsonl}}, {{path: more.parquet, weight: 2}}]'"
    if kind == list[cluster_settings.VariableConfig]:
        return f"a list of variables, as in '{key}=[{{name: NCCL_DEBUG, value: INFO, why: a reason}}]'"
    if kind == list[evaluation_settings.GateConfig]:
        return f"a list of gates, as in '{key}=[{{figure: student.kl, below: 0.2}}]'"
    if kind == list[evaluation_settings.DomainConfig]:
        return f"a list of domains, as in '{key}=[{{name: law, path: law.jsonl}}, {{name: news, path: news.txt}}]'"
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    name = kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)
    if name.removesuffix(" | None") in words:
        return words[name.removesuffix(" | None")] + " or null" * name.endswith(" | None")
    if is_dataclass(kind):
        return f"a group of settings: {', '.join(entry.name for entry in fields(kind))}"
    name = name.replace("pipelines.config.", "").replace(" | None", " or null")
    return words.get(name, name)


def to_yaml(config: Config) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
