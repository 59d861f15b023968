#!/usr/bin/env bash
# A cluster with SLURM: one batch job per stage, each after the one before it has ended well.
#
#   launchers/slurm.sh [--dry-run] overrides...
#   launchers/slurm.sh --dry-run experiment=quickstart cluster=local
#   launchers/slurm.sh experiment=llama31_8b_to_4b_width cluster=ngc model.path=MODEL data=files 'data.sources=[{path: TEXT}]'
#
# --dry-run writes the scripts into <run>/slurm and shows them. Without stage= it is stage=all; what is finished is left
# out, so that the same command continues a chain that has ended. cluster= is one of conf/cluster; docs/cluster.md says
# how to write one for a site. PYTHON=... chooses the interpreter; the default is the checkout's .venv, else python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)
fi
case " $* " in
  '  ' | *' --help '* | *' -h '*) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m pipelines.cluster "$@"
