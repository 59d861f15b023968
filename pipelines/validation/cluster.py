"""What the settings of a site may hold, before they are written into batch scripts.

#SBATCH lines are no shell and know quoting of their own: what stands there is made of plain characters alone. All else
is quoted for the shell (cluster/script.py) and may hold anything that can be printed.
"""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from pipelines import path_settings, processes, secrets
from pipelines.artifacts import run_directory
from pipelines.choices import Device
from pipelines.cluster_settings import ClusterConfig, StageNodesConfig
from pipelines.config import Config, expect
from pipelines.stages import STAGES

WORD = re.compile(r"[A-Za-z0-9_.,:@+-]+")
FEATURES = re.compile(r"[A-Za-z0-9_.,:@+&|*()\[\]-]+")
PATH = re.compile(r"[A-Za-z0-9_./,:@+=~-]+")
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@/#+-]*")
OF_APPTAINER = (".sif", ".simg")
NAME = re.compile(r"[A-Za-z0-9_.,@+=][A-Za-z0-9_.,@+=-]*")
OPTION = re.compile(r"--[a-z][a-z0-9-]*(=[A-Za-z0-9_./,:@+=~&|*()\[\]-]+)?")
TIME = re.compile(
    r"((?P<days>\d+)-(?=\d+(:\d+){0,2}$)|(?=\d+:\d+:\d+$))(?P<hours>\d+)(:(?P<minutes>\d+))?(:(?P<rest>\d+))?"
)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OF_SHELLS = (
    "BASH_ENV",
    "ENV",
    "SHELLOPTS",
    "BASHOPTS",
    "POSIXLY_CORRECT",
    "IFS",
    "SECONDS",
    "PWD",
)  # change the script
SPARE = 60  # seconds between the end of the grace and that of the job: SLURM looks at its jobs twice a minute
# What the scripts set themselves. SLURM takes any beginning of an option that is no other's.
OF_SBATCH = (
    *("--job-name", "--output", "--error", "--open-mode", "--signal", "--requeue", "--no-requeue", "--dependency"),
    *("--kill-on-invalid-dep", "--array", "--wrap", "--parsable", "--export", "--export-file", "--chdir", "--nodes"),
    *("--ntasks", "--ntasks-per-node", "--time", "--account", "--partition", "--qos", "--constraint", "--no-kill"),
    *("--input", "--wait", "--test-only", "--help", "--version", "--hold", "--exclusive", "--gpus-per-node"),
)
OF_SRUN = (
    *("--nodes", "--ntasks", "--ntasks-per-node", "--kill-on-bad-exit", "--wait", "--container-image", "--nodelist"),
    *("--container-mounts", "--container-workdir", "--no-container-mount-home", "--output", "--error", "--input"),
    *("--export", "--jobid", "--het-group", "--exclude", "--time", "--job-name", "--help", "--version", "--test-only"),
)


def check(config: Config, stages: Collection[str]) -> None:
    """Raises UserError for what no batch script can hold, or no job could do. stages: those that become jobs."""
    cluster = config.cluster
    for number, variable in enumerate(cluster.environment):
        found = variable.value
        remedy = 'Quote it: "on" and "1" without quotes are true and a number in YAML and on the command line.'
        expect(isinstance(found, str), f"cluster.environment[{number}].value", "a text", repr(found), remedy)
    remedy = (
        "Give cluster=NAME, one of conf/cluster, whose file has a name: too; copy ngc.yaml there for a site of yours."
    )
    expect(cluster.name is not None, "cluster", "a site", "none", remedy)
    _check_words(config)
    for setting, text in _texts(config):
        remedy = "Leave line breaks and other characters that cannot be printed out."
        expect(text.isprintable(), setting, "characters that can be printed", repr(text), remedy)
    _check_arguments(cluster)
    _check_environment(cluster)
    _check_times(config, stages)
    _check_nodes(cluster, stages)
    if config.parallel.device is not Device.cpu:
        _check_gpus(cluster, stages)
    _check_places(config)


def of_stage(cluster: ClusterConfig, stage: str) -> StageNodesConfig:
    """The settings of one stage, filled with those for all. Without ranks: one process on one node."""
    own: StageNodesConfig = getattr(cluster.stages, stage)
    alone = not STAGES[stage].takes_all_nodes
    gpus = cluster.gpus_per_node if own.gpus_per_node is None else own.gpus_per_node
    processes = own.processes_per_node or cluster.processes_per_node or gpus or 2
    if own.gpus_per_node is not None and own.processes_per_node is None:
        processes = gpus or processes
    return StageNodesConfig(
        partition=own.partition or cluster.partition,
        time=own.time or cluster.time,
        nodes=1 if alone else own.nodes or cluster.nodes,
        gpus_per_node=gpus,
        processes_per_node=1 if alone else processes,
    )


def seconds(time: str) -> int | None:
    """What a time limit is in seconds: H:M:S, D-H, D-H:M or D-H:M:S; None where it is none of these."""
    found = TIME.fullmatch(time)
    if not found:
        return None
    days, hours, minutes, rest = (int(found[name] or 0) for name in ("days", "hours", "minutes", "rest"))
    return 86400 * days + 3600 * hours + 60 * minutes + rest


def _time_meant(time: str) -> str:
    """What to write in place of a time that is none, or is one to SLURM and another to people."""
    if time.isdecimal():
        whole, minutes = (f"{n // 3600:02}:{n // 60 % 60:02}:{n % 60:02}" for n in (int(time), 60 * int(time)))
        return (
            f"Quote it in YAML, where {whole.removeprefix('0')} without quotes is the number {time}: "
            f'time: "{whole}". If {time} minutes are meant: "{minutes}".'
        )
    if two := re.fullmatch(r"(\d+):(\d+)", time):
        first, second = two.groups()
        return (
            f"SLURM takes it for minutes and seconds. Write all three: {first:0>2}:{second:0>2}:00 for hours and "
            f"minutes, 00:{first:0>2}:{second:0>2} for minutes and seconds."
        )
    return 'Write it so, in quotes in YAML: "04:00:00" is four hours, "1-12" a day and a half.'


def _check_words(config: Config) -> None:
    cluster = config.cluster
    words = {f"cluster.{name}": getattr(cluster, name) for name in ("name", "account", "partition", "qos")}
    words |= {f"cluster.stages.{stage}.partition": own.partition for stage, own in vars(cluster.stages).items()}
    for setting, word in words.items():
        expected = "letters, digits and _.,:@+-"
        expect(word is None or bool(WORD.fullmatch(word)), setting, expected, repr(word), "Change it.")
    found, expected = cluster.constraint, "features of nodes, such as h100&nvlink"
    expect(found is None or bool(FEATURES.fullmatch(found)), "cluster.constraint", expected, repr(found), "Change it.")
    name, expected = config.run.name, "letters, digits and _.,@+=- in a name that jobs bear"
    expect(bool(NAME.fullmatch(name)), "run.name", expected, repr(name), "Choose another.")
    directory = str(run_directory(config).absolute())
    expected = "a path of letters, digits and _./,:@+=~- in a directory that #SBATCH lines name"
    expect(bool(PATH.fullmatch(directory)), "run.directory", expected, repr(directory), "Choose another.")


def _texts(config: Config) -> Iterator[tuple[str, str]]:
    """(setting, value) of what is quoted for the shell."""
    cluster = config.cluster
    for name in ("image", "workdir", "python"):
        if (value := getattr(cluster, name)) is not None:
            yield f"cluster.{name}", value
    for name in ("mounts", "sbatch_arguments", "srun_arguments"):
        for number, value in enumerate(getattr(cluster, name)):
            yield f"cluster.{name}[{number}]", value
    for number, variable in enumerate(cluster.environment):
        for part in ("name", "value", "why"):
            yield f"cluster.environment[{number}].{part}", getattr(variable, part)


def _check_arguments(cluster: ClusterConfig) -> None:
    for name, owned in (("sbatch_arguments", OF_SBATCH), ("srun_arguments", OF_SRUN)):
        for number, argument in enumerate(getattr(cluster, name)):
            setting, option = f"cluster.{name}[{number}]", argument.partition("=")[0]
            plain = argument.startswith("--") if owned is OF_SRUN else OPTION.fullmatch(argument)
            expected = "--option or --option=value" + " of plain characters, without spaces" * (owned is OF_SBATCH)
            expect(bool(plain), setting, expected, repr(argument), "Write it so.")
            ours = next((one for one in owned if one.startswith(option)), None)
            remedy = "A setting of `cluster` has it, or the script needs it as it is: leave it out."
            expect(ours is None, setting, f"another option than {ours}", argument, remedy)


def _check_environment(cluster: ClusterConfig) -> None:
    for number, variable in enumerate(cluster.environment):
        setting, name = f"cluster.environment[{number}]", variable.name
        expect(bool(VARIABLE.fullmatch(name)), f"{setting}.name", "a variable's name", repr(name), "Change it.")
        remedy = "Scripts and configurations can be read by others: export it in your shell, which jobs inherit."
        expect(not secrets.named_secret(name, variable.value), f"{setting}.name", "no secret", name, remedy)
        ours = name.startswith(processes.OF_A_JOB) or name in (*processes.OF_A_RANK, *OF_SHELLS)
        ours = ours or name.islower() and not name.endswith("_proxy")  # as the scripts' own are written
        remedy = "SLURM, torchrun, the shell or the script sets it: leave it out."
        expect(not ours, f"{setting}.name", "a variable of your own", name, remedy)
        remedy = (
            "The script finds srun and scontrol by it: export it in the shell that you submit from, which the jobs "
            "inherit, and give an interpreter in full by cluster.python."
        )
        expect(name != "PATH", f"{setting}.name", "another variable", name, remedy)
        expected, remedy = "text as it is to be, which nothing expands", "Write it in full, in place of $NAME and ~."
        plain = not re.search(r"\$[A-Za-z_{(]|^~", variable.value)
        expect(plain, f"{setting}.value", expected, repr(variable.value), remedy)
        remedy = "Say in a few words what it is for: it stands beside it in the scripts."
        expect(bool(variable.why.strip()), f"{setting}.why", f"the reason for {name}", "none", remedy)


def _check_times(config: Config, stages: Collection[str]) -> None:
    cluster = config.cluster
    warning, grace, most = cluster.warning_seconds, cluster.grace_seconds, 65535
    expect(warning <= most, "cluster.warning_seconds", f"at most SLURM's {most}", warning, "Lower it.")
    expected = f"at least {SPARE} less than cluster.warning_seconds={warning}, so that all ends before the time limit"
    expect(grace + SPARE <= warning, "cluster.grace_seconds", expected, grace, "Raise the one or lower the other.")
    for stage in stages:
        own = getattr(cluster.stages, stage).time
        setting = "cluster.time" if own is None else f"cluster.stages.{stage}.time"
        time = cluster.time if own is None else own
        limit = seconds(time)
        expect(limit is not None, setting, "H:M:S, D-H, D-H:M or D-H:M:S", repr(time), _time_meant(time))
        expected = f"more than cluster.warning_seconds={warning}, in seconds"
        expect(limit is None or limit > warning, setting, expected, f"{time} = {limit}", "Raise it.")


def _check_nodes(cluster: ClusterConfig, stages: Collection[str]) -> None:
    for stage in stages:
        own = getattr(cluster.stages, stage)
        for name in ("nodes", "processes_per_node"):
            found, expected = getattr(own, name), "1: it has no ranks"
            good = STAGES[stage].takes_all_nodes or found in (None, 1)
            expect(good, f"cluster.stages.{stage}.{name}", expected, found, "Leave it out.")


def _check_gpus(cluster: ClusterConfig, stages: Collection[str]) -> None:
    """That no two ranks share a GPU, which NCCL refuses."""
    for stage in stages:
        nodes, own = of_stage(cluster, stage), getattr(cluster.stages, stage)
        gpus, processes = nodes.gpus_per_node or 0, nodes.processes_per_node or 0
        if not gpus or not STAGES[stage].ranks:
            continue
        of = "cluster" if own.processes_per_node is None else f"cluster.stages.{stage}"
        expected = f"at most one process for each of the {gpus} GPUs of a node in stage {stage}"
        remedy = "Lower it, or leave it out: it is the number of GPUs then."
        expect(processes <= gpus, f"{of}.processes_per_node", expected, processes, remedy)


def _check_places(config: Config) -> None:
    """That what the run reads and writes is under the same path on this machine and inside the container."""
    cluster = config.cluster
    given = dict(path_settings.of_jobs(config))
    here = Path.cwd()
    workdir = Path(cluster.workdir) if cluster.workdir else here
    expect(workdir.is_absolute(), "cluster.workdir", "an absolute path", cluster.workdir, "Write it in full.")
    for setting, path in given.items():
        remedy = "Give it in full, or leave cluster.workdir out."
        same = Path(path).is_absolute() or workdir.resolve() == here.resolve()
        expect(same, setting, f"an absolute path with cluster.workdir={cluster.workdir}", path, remedy)
    if cluster.image is None:
        expect(not cluster.mounts, "cluster.mounts", "none without cluster.image", cluster.mounts, "Drop one.")
        return
    _check_image(cluster.image)
    seen = []
    for number, mount in enumerate(cluster.mounts):
        source, target = split_mount(mount)[:2]
        good = "," not in mount and source.startswith("/") and target.startswith("/") and mount.count(":") < 3
        expected = "/path, /source:/target or /source:/target:flags, without commas"
        expect(good, f"cluster.mounts[{number}]", expected, repr(mount), "Change it.")
        if os.path.normpath(source) == os.path.normpath(target):
            seen.append(Path(os.path.normpath(source)))
    given["run.directory"] = str(here / config.run.directory)  # the chain gives it to its jobs in full
    for setting, path in {**given, "the working directory": str(workdir)}.items():
        place = Path(os.path.normpath(workdir / path))
        leads = (workdir / path).resolve()
        expected = "a path that is mounted under the same name inside the image"
        remedy = f"Add it, or what it lies in, to cluster.mounts={cluster.mounts}."
        inside = any(place.is_relative_to(mount) for mount in seen)
        expect(inside, setting, expected, str(place), remedy)
        # A link that leads out of every mount leads nowhere inside; a mount that is itself a link is none there.
        inside = any(leads.is_relative_to(end) for mount in seen for end in (mount, mount.resolve()))
        expect(inside, setting, expected, f"{place}, which leads to {leads}", remedy)


def _check_image(image: str) -> None:
    """A file must be one that enroot runs; whether a registry has a name, the nodes find out."""
    expected = "registry/name:tag, or an absolute path to a .sqsh"
    scheme, _, name = image.rpartition("://")
    remedy = f"Leave {scheme}:// out: {name}." if scheme in ("docker", "dockerd", "podman") else "Write it so."
    as_file = image.startswith(("/", ".")) or image.endswith((".sqsh", ".squashfs", *OF_APPTAINER))
    named = bool(IMAGE.fullmatch(image)) and "://" not in image
    expect(as_file or named, "cluster.image", expected, repr(image), remedy)
    if not as_file:
        return
    path = Path(image)
    expect(path.is_absolute(), "cluster.image", "an absolute path to the .sqsh", image, "Write it in full.")
    remedy = "Make a .sqsh of the image: enroot import -o stillhouse.sqsh docker://REGISTRY#NAME:TAG."
    foreign = path.suffix in OF_APPTAINER
    expect(not foreign, "cluster.image", "a .sqsh, which enroot runs", f"Apptainer's {path}", remedy)
    expect(not path.is_dir(), "cluster.image", "a .sqsh", f"the directory {path}", "Name the file in it.")
    remedy = f"Check {image}, which this machine must see as the nodes do."
    expect(path.is_file(), "cluster.image", "an existing file", "nothing there", remedy)


def split_mount(mount: str) -> tuple[str, ...]:
    """Source, target and flags of a mount; a path alone is both."""
    parts = mount.split(":")
    return (parts[0], parts[0]) if len(parts) == 1 else tuple(parts)
