#!/usr/bin/env bash
# Trains on several machines by ssh, one process per GPU:
#
#     launch/ssh.sh HOST0,HOST1 --processes=auto --config=configs/gpt2_124m.py --workdir=SHARED_FOLDER
#
# Without --processes=auto, one process per machine has all of its GPUs. Run it in the repository, with
# the virtual environment active. Both must have the same path on all machines, and ssh must not ask
# for a password. HOST0 is the coordinator of jax.distributed, on port JAX_COORDINATOR_PORT (55527).
# Ctrl-C or SIGTERM stops all processes, with everything saved. If one fails, the others are stopped.
# Exit status: the status of the first process that failed; else 75 if they were stopped on request;
# else 0.

set -uo pipefail
if (($# < 2)); then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
stopped=75
IFS=, read -ra hosts <<<"$1"
shift
coordinator="${hosts[0]#*@}:${JAX_COORDINATOR_PORT:-55527}"

# A process stops at the end of its standard input: when this script closes it, is killed, or loses
# the connection.
pipes=$(mktemp -d)
mkfifo "$pipes/input" "$pipes/ended"
exec {hold}<>"$pipes/input" {ended}<>"$pipes/ended"
exec {input}<"$pipes/input"
rm -r "$pipes"
stop() { { exec {hold}>&-; } 2>/dev/null; }
trap stop INT TERM

quote() { printf "'%s' " "${@//\'/\'\\\'\'}"; }

for id in "${!hosts[@]}"; do
    train=$(quote "$(command -v python)" -u -m jaxdp.train "$@" "--coordinator_address=$coordinator" \
        "--num_processes=${#hosts[@]}" "--process_id=$id")
    # shellcheck disable=SC2016  # The shell on the host expands these variables.
    remote="cd $(quote "$PWD") || exit; exec 3<&0; $train </dev/null & "'run=$!
        { cat <&3; kill $run; } >/dev/null 2>&1 & watch=$!
        wait $run; status=$?; kill $watch; exit $status'
    {
        ssh -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[$id]}" \
            "exec sh -c $(quote "$remote")" <&"$input"
        echo "$?" >&"$ended"
    } {hold}>&- &
done

status=0
for _ in "${hosts[@]}"; do
    until read -r -u "$ended" code; do :; done
    if ((code != 0 && (status == 0 || status == stopped))); then
        status=$code
    fi
    # If one has finished, or stopped on request, the others will do the same by themselves.
    ((code == 0 || code == stopped)) || stop
done
exit "$status"
