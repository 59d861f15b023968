# How it runs. This shell stays on the first node, outside of any container, where scontrol and sbatch are. It starts
# one task per node, passes on by a file that SLURM wants the job to end, reads why the stage ended, and decides.

state=$directory/state
counter=$state/$part.restarts  # restarts in a row without progress, and where the stage was then
running=$state/$part.running   # there while an attempt has not ended in order
next=$state/$part.next         # a job of this stage, and the one that was submitted to continue it
found=                         # its progress when the stage was started
attempt=0                      # starts of the stage in this allocation
asked=                         # the signal that asked us to stop
limited=                       # whether the time limit asked us
late=                          # the signal that was sent to processes that did not stop in time
insuring=                      # whether one was asked for
insured=                       # the job that was submitted before the stage had ended, to continue a preempted one
leave_out=                     # nodes that failed their check
step=
mkdir -p "$state"
# The first job of this stage: jobs that continue it inherit the name, and so may take over what it has locked.
export STILLHOUSE_JOB=${STILLHOUSE_JOB:-$SLURM_JOB_ID}
export STILLHOUSE_GRACE_SECONDS=$grace  # the training warns where its saves take longer

say() { printf '%s  %s\n' "$(date '+%F %T')" "$*"; }

for_good() {  # code, reason
  rm -f "$running"
  [ -z "$insured" ] || scancel "$insured"
  say "stage $stage of run $run ended for good: $2. The stages after it do not start;" \
    "once that is mended, the same launchers/slurm.sh command continues."
  exit "$1"
}

# Being asked to stop

ask() {  # signal: SLURM's warning (USR1), or its wish to end the job (TERM), which outdoes a warning before it
  if [ -n "$asked" ]; then
    [ "$1" != TERM ] || asked=TERM
    return
  fi
  asked=$1
  deadline=$((SECONDS + grace))
  if [ "$1" = USR1 ]; then limited=$(near_limit); fi
  say "SIG$1: asking stage $stage to save and stop, at most $grace s"
  [ -z "${STILLHOUSE_STOP_FILE:-}" ] || : >"$STILLHOUSE_STOP_FILE"
}
near_limit() {  # yes, where the job's time is up but for the warning; SLURM may give that a minute early
  local job end
  job=$(scontrol show job "$SLURM_JOB_ID" --oneliner 2>/dev/null)
  [[ ! "$job" =~ \ PreemptTime=[0-9] ]] || return 0
  end=$(sed -n 's/.* EndTime=\([0-9][^ ]*\).*/\1/p' <<<"$job")
  [ -n "$end" ] && end=$(date -d "$end" +%s) || return 0
  [ $((end - $(date +%s))) -gt $((warning + 90)) ] || echo yes
}

trap 'ask USR1' USR1
trap 'ask TERM' TERM

signal_steps() {  # signal, to the processes that srun has started
  squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i | grep -E '^[0-9]+\.[0-9]+$' | while read -r id; do
    scancel --signal="$1" "$id"
  done
}

wait_for() {  # process: its exit code, in $code; one that outlasts the grace is ended
  while kill -0 "$1" 2>/dev/null; do
    sleep 1 &
    wait $!  # a trap ends this wait, not the process
    if [ "$asked" = TERM ] && [ -z "$insuring" ] && [ "$(ending)" = preempted ]; then
      # At once: SLURM may kill this shell together with processes that take longer to end than it waits. Where sbatch
      # takes none now, it is asked once more when they have ended.
      insuring=yes
      if submit_new_job "preempted"; then insured=$new; fi
    fi
    if [ -n "$asked" ] && [ -z "$late" ] && [ "$SECONDS" -ge "$deadline" ]; then
      late=TERM
      say "not stopped after $grace s: ending the processes"
      signal_steps TERM
    elif [ "$late" = TERM ] && [ "$SECONDS" -ge $((deadline + 35)) ]; then
      late=KILL
      signal_steps KILL
    fi
  done
  code=0
  wait "$1" || code=$?
}

# Going on in another allocation

ending() {  # why SLURM ends this job; nothing where it does not. JobState is COMPLETING then, whatever the reason
  local job state reason preempted restarts
  job=" $(scontrol show job "$SLURM_JOB_ID" --oneliner 2>/dev/null) "
  value() { sed -n "s/.* $1=\([^ ]*\) .*/\1/p" <<<"$job"; }
  state=$(value JobState) reason=$(value Reason) preempted=$(value PreemptTime) restarts=$(value Restarts)
  case "$state" in '' | RUNNING | SUSPENDED) return ;; esac
  if [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
    echo requeued  # which forgets the time of a preemption, though not in every version of SLURM
  elif [ "$state" = PREEMPTED ] || [[ "$preempted" =~ ^[0-9] ]]; then
    echo preempted
  elif [ "$state" = TIMEOUT ] || [ "$reason" = TimeLimit ]; then
    echo "out of time"
  elif [[ "$state" =~ ^(CANCELLED|COMPLETING)$ ]]; then
    echo cancelled
  fi
}

obey() {  # what the stage did: ends this shell where SLURM ends the job, and does not start it again, or does by itself
  local why
  why=$(ending)
  case "$why" in
    cancelled)
      say "$1: job $SLURM_JOB_ID was cancelled, and so nothing continues it. The jobs after it do not start;" \
        "the same launchers/slurm.sh command goes on."
      ;;
    requeued) say "$1: SLURM starts job $SLURM_JOB_ID again" ;;
    preempted) return ;;
    *) [ "$asked" = TERM ] && [ -z "$why" ] || return 0
      say "$1: SIGTERM to this shell ends the job, and nothing continues it. The jobs after it do not start;" \
        "the same launchers/slurm.sh command goes on."
      ;;
  esac
  exit 75
}

again() {  # reason: requeue this job, or continue in a new one
  obey "$1"
  rm -f "$running"
  if [ "$(ending)" = preempted ]; then continue_in_new_job "preempted"; fi  # SLURM does not requeue it, if asked
  if [ "$requeue" = true ] && [ -z "$leave_out" ]; then
    say "$1: requeueing job $SLURM_JOB_ID"
    if scontrol requeue "$SLURM_JOB_ID"; then
      trap - USR1 TERM
      sleep 60  # SLURM ends this shell
      exit 75
    fi
    say "SLURM does not requeue it: a new job continues, as with cluster.requeue=false"
  fi
  continue_in_new_job "$1"
}

submit_new_job() {  # reason; its id in $new; 1 where sbatch takes none
  # Never beside this job: scontrol and SLURM's wish may have requeued it all the same, and then the new one waits for
  # the end of that start too. Both are one job to the run's lock.
  local before='' excluded name
  new=
  local options=(--parsable "--dependency=afterany:$SLURM_JOB_ID")
  scontrol update "JobId=$SLURM_JOB_ID" Requeue=0 ||
    say "SLURM may still start job $SLURM_JOB_ID again: the one that continues waits for it"
  if [ -f "$next" ]; then read -r before new <"$next"; fi
  if [ "$before" = "$SLURM_JOB_ID" ] && [ -n "$(squeue --noheader --jobs="$new" --states=PENDING 2>/dev/null)" ]; then
    say "$1: job $new, which waits for this one, continues"
    return
  fi
  excluded=$(scontrol show job "$SLURM_JOB_ID" --oneliner | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
  [ "$excluded" != '(null)' ] || excluded=
  excluded=${excluded:+$excluded${leave_out:+,}}$leave_out
  [ -z "$excluded" ] || options+=("--exclude=$excluded")
  new=$(
    for name in "${!SLURM_@}" "${!SBATCH_@}"; do [[ "$name" =~ ^SLURM_(CONF|JWT)$ ]] || unset "$name"; done
    unset STILLHOUSE_STOP_FILE STILLHOUSE_VERDICT
    sbatch "${options[@]}" "$script"
  ) || return 1
  new=${new%%;*}
  if [ "$(ending)" = cancelled ]; then
    scancel "$new"
    obey "$1"
  fi
  printf '%s %s\n' "$SLURM_JOB_ID" "$new" >"$next"
  say "$1: job $new continues${excluded:+ without $excluded}"
  squeue --noheader --user="$(id -u)" --states=PENDING --format='%i|%E' | while IFS='|' read -r id needs; do
    needs=$(sed 's/([^)]*)//g' <<<"$needs")
    [ "$id" != "$new" ] && [[ "$needs" =~ :$SLURM_JOB_ID([,?:]|$) ]] || continue
    needs=$(sed -E "s/:$SLURM_JOB_ID([,?:]|\$)/:$new\1/g" <<<"$needs")
    if scontrol update "JobId=$id" "Dependency=$needs"; then
      say "job $id waits for job $new now"
    else
      say "job $id cannot be made to wait for job $new: it will not start; submit the chain again when $new is done"
    fi
  done
  return 0
}

continue_in_new_job() {  # reason
  submit_new_job "$1" || for_good 1 "$1, and sbatch took no job to continue in"
  exit 75
}

progress() {  # the newest checkpoint or, of a stage that keeps what it has measured, a number that changes with that
  local newest directory=${checkpoints%/checkpoints}
  newest=$(ls -1 "$checkpoints" 2>/dev/null | grep '^step-' | sort | tail -n 1)
  if [ -z "$newest" ] && [[ "$stage" =~ ^(prune|evaluate)$ ]]; then
    newest=measured-$(cat "$directory"/{search.json,speed.json,scores.safetensors,parts/*,parts/*/*} \
      "$directory"/candidates/*/checkpoints/step-*/*.json \
      2>/dev/null | cksum | cut -d' ' -f1)
  fi
  printf '%s\n' "$newest"
}

count_restart() {  # reason: one restart more, or the end
  local count=0 before='' newest
  newest=$(progress)
  if [ -f "$counter" ]; then read -r count before <"$counter"; fi
  [ "$newest" = "$before" ] || count=0
  [ "$count" -lt "$restarts" ] || for_good 1 "$1, after $count restarts without a new checkpoint"
  count=$((count + 1))
  printf '%s %s\n' "$count" "$newest" >"$counter"
  say "$1: restart $count of at most $restarts, from ${newest:-the beginning}"
}

time_is_up() {  # ends for good what a whole job was too short for; a start that a failure has cut counts as a restart
  [ -n "$limited" ] && [ "$attempt" -le 1 ] && [ "$(progress)" = "$found" ] || return 0
  for_good 1 "the time limit $limit of its job came, and nothing new was saved in it. Raise $limit_setting"
}

# The nodes

check_nodes() {  # each by itself; those that fail are left out in a new allocation
  local check=(true) failing=() tasks=() host number=0
  if [ "$preflight" = true ]; then
    check=("${container[@]}" "$python" -m pipelines.preflight "--directory=$run_directory")
    [ "$gpus" -eq 0 ] || check+=("--gpus=$gpus")  # a stage without GPUs takes whatever a whole node brings
  elif [ "$attempt" -eq 0 ]; then
    return
  fi
  for host in "${hosts[@]}"; do
    timeout --kill-after=30 "$preflight_seconds" srun --nodes=1 --ntasks=1 --nodelist="$host" --cpu-bind=none \
      "${srun_arguments[@]}" "${check[@]}" >"$state/$part.check.$host" 2>&1 &
    tasks+=($!)
  done
  for host in "${hosts[@]}"; do
    wait_for "${tasks[number]}"
    number=$((number + 1))
    [ "$code" -ne 0 ] || continue
    if [ "$code" -ne 3 ] && [ -n "$asked$(ending)" ]; then
      say "the check of node $host was interrupted: the job is asked to stop, and the node counts as unchecked"
      continue
    fi
    failing+=("$host")
    say "node $host failed its check (exit code $code):"
    sed "s/^/  /" "$state/$part.check.$host"
  done
  [ -z "$asked" ] || return
  [ "${#failing[@]}" -gt 0 ] || return
  if [ "${#failing[@]}" -eq "${#hosts[@]}" ] && [ "${#hosts[@]}" -gt 1 ]; then
    for_good 1 "every node failed its check; cluster.preflight=false goes on without it"
  fi
  leave_out=$(IFS=,; printf %s "${failing[*]}")
  count_restart "$leave_out failed the check of nodes"
  again "other nodes are needed"
}

# The stage

start_stage() {  # in the background; its process in $step
  local number command address port
  attempt=$((attempt + 1))
  number=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$attempt
  # New names each time: no stop or verdict of an earlier attempt is met again.
  export STILLHOUSE_STOP_FILE=$state/$part.$number.stop STILLHOUSE_VERDICT=$state/$part.$number.verdict
  command=("$python" -m pipelines "${overrides[@]}")
  if [ "$ranks" = true ]; then
    address=$(scontrol show node "${hosts[0]}" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    port=$((20000 + (7 * SLURM_JOB_ID + 3 * ${SLURM_RESTART_COUNT:-0} + attempt) % 12000))
    # shellcheck disable=SC2016  # the task knows its SLURM_NODEID, not this shell
    command=(bash -c 'exec "$0" -m torch.distributed.run --rdzv-conf="is_host=$((SLURM_NODEID == 0))" "$@"' "$python"
      "--nnodes=$nodes" "--nproc-per-node=$processes" --max-restarts=0
      --rdzv-backend=c10d "--rdzv-endpoint=${address:-${hosts[0]}}:$port" "--rdzv-id=$number"
      -m "$module" "${overrides[@]}")
  fi
  found=$(progress)
  touch "$running"
  # A task that has ended well waits for rank 0, which may still write and hash: for long. One that fails ends all.
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=3600 \
    "${container[@]}" "${srun_arguments[@]}" "${command[@]}" &
  step=$!
  [ -z "$asked" ] || : >"$STILLHOUSE_STOP_FILE"
}

read_verdict() {  # into $verdict, a number or nothing, and $message, its last line
  local text tries
  verdict='' message=''
  for tries in 1 2 3 4 5; do  # a file of another node may take a moment to be seen on a network file system
    [ ! -s "$STILLHOUSE_VERDICT" ] || break
    [ "$code" -ne 0 ] || return 0
    [ "$tries" -eq 5 ] || { ls "$state" >/dev/null; sleep 1; }
  done
  [ -s "$STILLHOUSE_VERDICT" ] || return 0
  text=$(head -n 1 "$STILLHOUSE_VERDICT")
  verdict=$(sed -n 's/^{"code": \([0-9]*\), "message": .*/\1/p' <<<"$text")
  message=$(sed -n 's/^{"code": [0-9]*, "message": "\(.*\)", "stage": "[^"]*"}$/\1/p' <<<"$text")
  while [ "${message%\\n}" != "$message" ]; do message=${message%\\n}; done
  message=${message##*\\n}
  message=${message//\\\"/\"}
}

stopped() {  # as it was asked
  rm -f "$running"
  obey "stage $stage has saved and stopped"
  # A limit that is too short for anything to be saved would go on for ever.
  if [ "$(progress)" != "$found" ]; then
    rm -f "$counter"
  elif [ "$(ending)" != preempted ]; then
    time_is_up
    count_restart "stage $stage has stopped without anything new to save"
  fi
  again "stage $stage has saved and stopped"
}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
say "stage $stage of run $run, job $SLURM_JOB_ID on ${hosts[*]}"
found=$(progress)
if [ -e "$running" ]; then count_restart "the last attempt ended without a word, as when a node fails"; fi
while true; do
  check_nodes
  if [ -n "$asked" ]; then
    rm -f "$running"
    obey "stage $stage was asked to stop before it began"
    time_is_up
    count_restart "stage $stage was asked to stop before it began"
    again "no time is left"
  fi
  start_stage
  wait_for "$step"
  read_verdict
  case "$verdict:$code" in
    :0)
      rm -f "$running" "$counter"
      say "stage $stage of run $run is done"
      exit 0
      ;;
    75:*) stopped ;;
    :*)
      obey "stage $stage ended before it had saved"
      time_is_up
      why=$(ending)
      count_restart "stage $stage ended without a word (exit code $code), as when a process is killed"
      [ -z "$asked$why" ] || again "${why:-the time is up}"
      ;;
    *) for_good "$verdict" "${message:-its log in $run_directory/logs says why}" ;;
  esac
done
