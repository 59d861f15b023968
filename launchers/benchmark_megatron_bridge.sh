#!/usr/bin/env bash
# Megatron-Bridge's distillation on the benchmark's shapes, in its own container: rows beside ours in
# <run.directory>/benchmark/steps.json.
#
#   launchers/benchmark_megatron_bridge.sh [--gpus N] overrides...
#   launchers/benchmark_megatron_bridge.sh --gpus 8 experiment=benchmark_gpu parallel=tp8_sp
#
# Overrides are those of `python -m pipelines stage=benchmark`. IMAGE=... chooses the container; inside of it, or with
# IMAGE=none, torchrun starts at once. The default is the image that ModelOpt's example for Megatron-Bridge names.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=${IMAGE:-nvcr.io/nvidia/nemo:26.02}
gpus=
overrides=()
while [ $# -gt 0 ]; do
  case "$1" in
    --gpus | --gpus=*)
      if [ "$1" = --gpus ]; then shift; gpus=${1:-}; else gpus=${1#--gpus=}; fi
      case "$gpus" in
        '' | *[!0-9]* | 0) echo "--gpus: expected a number of GPUs, found '$gpus'." >&2; exit 2 ;;
      esac
      ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) overrides+=("$1") ;;
  esac
  [ $# -gt 0 ] && shift
done
gpus=${gpus:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}
if [ "$gpus" = 0 ]; then
  echo "benchmark_megatron_bridge: expected NVIDIA GPUs, found none. Megatron-Bridge needs them." >&2
  exit 2
fi

start=(torchrun "--nproc-per-node=$gpus" launchers/benchmark_megatron_bridge.py "${overrides[@]}")
if [ "$image" = none ] || python3 -c 'import megatron.bridge' 2>/dev/null; then
  cd "$root"
  exec "${start[@]}"
fi
command -v docker >/dev/null || {
  echo "benchmark_megatron_bridge: expected Megatron-Bridge or docker, found neither. Start it inside $image." >&2
  exit 2
}
exec docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$root:$root" -w "$root" \
  -e HF_HUB_OFFLINE=1 "$image" "${start[@]}"
