#!/usr/bin/env bash
# One machine: any stages under torchrun, over N GPUs or CPU processes.
#
#   launchers/torchrun.sh [--gpus N] overrides...
#   launchers/torchrun.sh stage=all experiment=quickstart
#   launchers/torchrun.sh --gpus 8 stage=all experiment=llama31_8b_to_4b_tutorial model.path=MODEL
#
# Without --gpus it takes every GPU of the machine, or two CPU processes where there is none. PYTHON=... chooses the
# interpreter; the default is the checkout's .venv, else python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)
fi

overrides=()
while [ $# -gt 0 ]; do
  case "$1" in
    --gpus | --gpus=*)
      if [ "$1" = --gpus ]; then shift; gpus=${1:-}; else gpus=${1#--gpus=}; fi
      case "$gpus" in
        '' | *[!0-9]* | 0) echo "--gpus: expected a number of GPUs, found '$gpus'." >&2; exit 2 ;;
      esac
      overrides+=("parallel.processes=$gpus" "parallel.device=cuda")
      ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) overrides+=("$1") ;;
  esac
  [ $# -gt 0 ] && shift
done

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m pipelines "${overrides[@]}"
