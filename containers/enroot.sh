#!/usr/bin/env bash
# An image as the .sqsh file that enroot and pyxis start: srun --container-image=stillhouse.sqsh
#
#   containers/enroot.sh [--dry-run] stillhouse:latest [OUTPUT.sqsh]            from this machine's Docker
#   containers/enroot.sh [--dry-run] HOST/TEAM/stillhouse:TAG [OUTPUT.sqsh]     from a registry
#
# An image whose name begins with a host (it has a dot or a port before the first slash) comes from that registry, with the
# credentials of $ENROOT_CONFIG_PATH/.credentials; every other from the Docker daemon. The file appears whole.
set -euo pipefail

dry_run=
arguments=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) echo "$argument: expected --dry-run, an image and a file. --help shows how." >&2; exit 2 ;;
    *) arguments+=("$argument") ;;
  esac
done
if [ "${#arguments[@]}" -lt 1 ] || [ "${#arguments[@]}" -gt 2 ]; then
  echo "expected an image and perhaps a file, found ${#arguments[@]} arguments. --help shows how." >&2
  exit 2
fi

image=${arguments[0]}
host=${image%%/*}
if [ "$host" != "$image" ] && [[ "$host" == *[.:]* ]]; then
  uri="docker://$host#${image#*/}"
else
  uri="dockerd://$image"
fi
name=${image##*/}
output=${arguments[1]:-${name//[:@]/-}.sqsh}
case "$output" in
  *.sqsh) ;;
  *) echo "$output: expected a file that ends in .sqsh, which is how pyxis knows it." >&2; exit 2 ;;
esac
if [ -e "$output" ]; then
  echo "$output: expected no such file yet. Move it away, or give another name." >&2
  exit 2
fi

command=(enroot import --output "$output.partial" "$uri")
if [ -n "$dry_run" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
if ! command -v enroot >/dev/null; then
  echo "enroot: expected on PATH, found none. Run this where enroot is installed, such as a login node." >&2
  exit 2
fi
trap 'rm -f "$output.partial"' EXIT
"${command[@]}"
mv "$output.partial" "$output"
echo "$output"
