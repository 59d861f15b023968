"""The command line: compose the configuration, validate it, and run the stages in their order. Imports no torch.

Megatron's checkpoint writer imports this module again in its helper processes: nothing happens here on import.
"""

import os
import sys
import time
import traceback

from pipelines import artifacts, console, gates
from pipelines.config import Config, UserError
from pipelines.interpreter import QuickEnd
from pipelines.stages import PIPELINE, STAGES

HELP_FLAGS = ("-h", "--help", "--hydra-help")


def usage() -> str:
    from pipelines.compose import GROUPS, group_options

    width = max(map(len, STAGES))
    stages = "\n".join(f"  {stage.name:<{width}}  {stage.does}" for stage in STAGES.values())
    groups = "\n".join(f"  {group + '=':<12} {', '.join(group_options(group))}" for group in GROUPS)
    return f"""Stillhouse prunes a Llama-class teacher and distils the student, sharded over the same devices.

  python -m pipelines stage=NAME experiment=NAME [key=value ...]

stage= one name, a list such as stage=[prune,distil], or all ({PIPELINE[0]} to {PIPELINE[-1]}):
{stages}

groups of settings (conf/<group>/<option>.yaml):
{groups}

Any single setting is key=value, as in distil.steps=200; all of them with types and units: pipelines/config.py.
  overwrite=true starts a stage again whose settings or inputs changed; --cfg job prints the composed configuration.

examples:
  python -m pipelines stage=all experiment=quickstart
  python -m pipelines stage=plan experiment=llama31_8b_to_4b_width format=json
  python -m pipelines stage=verify parallel=tp2
"""


def stage_names(config: Config) -> list[str]:
    """The stages asked for, in the order of the table. Raises UserError for names that are none."""
    import difflib

    asked = config.stage if isinstance(config.stage, list) else [config.stage]
    names: set[str] = set()
    for name in asked:
        if name == "all":
            names.update(PIPELINE)
        elif isinstance(name, str) and name in STAGES:
            names.add(name)
        else:
            close = difflib.get_close_matches(str(name), [*STAGES, "all"], n=2, cutoff=0.5)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise UserError(f"stage={name}: expected all or some of {', '.join(STAGES)}.{hint}")
    if not names:
        raise UserError(f"stage=[]: expected all or some of {', '.join(STAGES)}.")
    return [name for name in STAGES if name in names]


def not_needed(config: Config, stage: str) -> str:
    """Why a stage has nothing to do under this configuration; empty where it has."""
    if stage == "corpus" and config.data.corpus:
        return f"data.corpus={config.data.corpus} is given"
    if stage == "prune" and config.student.path:
        return f"student.path={config.student.path} is given"
    return ""


def run(config: Config, stage: str, overrides: list[str]) -> None:
    """One stage from the parent's side: skip, continue or start it, then judge its gates. Raises UserError and
    launch.StageFailed."""
    from pipelines import launch

    directory = artifacts.stage_directory(config, stage)
    if reason := not_needed(config, stage):
        return console.say(f"{stage}: nothing to do, {reason}")
    if STAGES[stage].kept:
        state = artifacts.examine(config, STAGES[stage]).state
        if state is artifacts.State.finished:
            again = (
                f"; overwrite=true starts only what changed, remove {directory} to run it again"
                if config.overwrite
                else ""
            )
            console.say(f"{stage}: finished already in {directory}{again}")
            return gates.check(config, stage)
        if state is artifacts.State.unfinished:
            console.say(f"{stage}: continuing in {directory}")
    started = time.monotonic()
    launch.run_stage(config, stage, overrides)
    console.say(f"{stage}  {time.monotonic() - started:.1f} s  {directory}")
    if STAGES[stage].kept:
        gates.check(config, stage)


def dispatch(arguments: list[str]) -> None:
    from pipelines import launch
    from pipelines.compose import compose, to_yaml
    from pipelines.iteration import expand
    from pipelines.validation import validate

    show = "--cfg" in arguments
    overrides = [a for a in arguments if a not in ("--cfg", "job", "all")] if show else arguments
    for flag in (a for a in overrides if a.startswith("-")):
        raise UserError(f"{flag}: expected key=value. python -m pipelines --help shows the stages and groups.")
    config = compose(overrides)
    if show:
        return print(to_yaml(config), end="")
    names = stage_names(config)
    for warning in validate(config, names):
        if console.rank() == 0:
            print(f"warning: {warning}", file=sys.stderr)
    parts = [
        (part, compose([*overrides, *part.overrides]) if part.overrides else config) for part in expand(config, names)
    ]
    for part, own in parts:
        if STAGES[part.stage].kept and not not_needed(own, part.stage):
            artifacts.refuse_changed_settings(own, STAGES[part.stage])
    if launch.is_child():
        for part, own in parts:
            if code := launch.work(own, part.stage):
                sys.exit(code)
        return None
    for number, (part, own) in enumerate(parts):
        if part.stage in ("plan", "decide"):  # they answer in a second, in this process
            from importlib import import_module

            stage = import_module(f"pipelines.stages.{part.stage}")
            stage.run(artifacts.StageContext(own, part.stage, artifacts.stage_directory(own, part.stage)))
        else:
            if number:  # with what the stages before it have made; of a run in steps the next one alone can be checked
                left = [part.stage] if config.iterate.students else [other.stage for other, _ in parts[number:]]
                validate(own, left)
            run(own, part.stage, [*overrides, *part.overrides])
    return None


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 for our own failure, 2 for a user's mistake, 75 stopped as asked, 130 after Ctrl-C."""
    from pipelines import stopping
    from pipelines.files import is_disk_error
    from pipelines.launch import StageFailed, tell_parent

    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or set(arguments) & set(HELP_FLAGS):
        print(usage(), end="")
        return 0
    stopping.listen()
    try:
        dispatch(arguments)
        return 0
    except stopping.Stopped as error:
        tell_parent(error)
        return _end(str(error), stopping.EXIT_STOPPED)
    except UserError as error:
        tell_parent(error)
        return _end(str(error) if os.environ.get("LOCAL_RANK", "0") == "0" else "", 2)  # once per machine
    except StageFailed as error:
        return _end(str(error), error.code)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        if isinstance(error, PermissionError) or is_disk_error(error):
            message = f"{error}: expected a place to write. Check run.directory and the free space there."
            stopping.leave_verdict(2, message, "")
            return _end(message, 2)
        traceback.print_exc()
        return 1


def _end(message: str, code: int) -> int:
    if message:
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    end = QuickEnd()
    end.code = main()
    sys.exit(end.code)
