#!/usr/bin/env bash
# Trains on several machines by ssh, a process on each, with all of its GPUs:
#
#     launch/ssh.sh HOST0,HOST1 --config=configs/gpt2_124m.py --workdir=SHARED_FOLDER
#
# From the repository, with the virtual environment active; both lie at the same place on all
# machines, and ssh asks for no password. HOST0 is the coordinator of jax.distributed, on port
# JAX_COORDINATOR_PORT. Ctrl-C or SIGTERM stops all processes, with everything saved; where one fails,
# the others are stopped. Exit status: that of the first process that failed; 75 where all were
# stopped as asked; else 0.

set -uo pipefail
if (($# < 2)); then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
stopped=75
IFS=, read -ra hosts <<<"$1"
shift
coordinator="${hosts[0]#*@}:${JAX_COORDINATOR_PORT:-55527}"

# A process is told to stop by the end of its standard input, which comes when this script closes
# it, is killed, or loses the connection.
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
    # shellcheck disable=SC2016  # The host's shell fills in these.
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
    # Where one is done, or has stopped as asked, the others come to that by themselves.
    ((code == 0 || code == stopped)) || stop
done
exit "$status"
