#!/bin/bash
# Stands for srun with pyxis: takes its options as its manual has them, and starts the step without a container.
# NOTED: a file for what was given; REAL_SRUN: srun itself.
refuse() { echo "pyxis: $*" >&2; exit 1; }

image='' workdir='' mounts='' home='' rest=()
while [ $# -gt 0 ]; do
  case "$1" in
    --container-image=*) image=${1#*=} ;;
    --container-mounts=*) mounts=${1#*=} ;;
    --container-workdir=*) workdir=${1#*=} ;;
    --no-container-mount-home) home=no ;;
    --container*) refuse "unknown option $1" ;;
    --*) rest+=("$1") ;;
    *) break ;;  # the command
  esac
  shift
done
[ -f "$image" ] || refuse "no such image: $image"
inside=
IFS=, read -r -a each <<<"$mounts"
for mount in "${each[@]}"; do
  IFS=: read -r source target flags more <<<"$mount"
  [ -z "$more" ] && [ -e "$source" ] && [ "${target:0:1}" = / ] || refuse "invalid mount: $mount"
  case "${flags:-rw}" in ro | rw | x-create=*) ;; *) refuse "invalid flags: $mount" ;; esac
  case "$workdir/" in "$target"/*) inside=yes ;; esac
done
[ "$inside" = yes ] || refuse "no such working directory: $workdir"
[ "$home" = no ] || refuse "the home directory would be mounted"
printf '%s\n' "--container-image=$image" "--container-mounts=$mounts" "--container-workdir=$workdir" \
  --no-container-mount-home >"$NOTED"
exec "$REAL_SRUN" "${rest[@]}" "$@"
