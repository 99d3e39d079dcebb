#!/bin/sh
# Run a command in a memory cgroup of its own, removed afterwards. Page cache counts against the
# limit, so a model larger than it has to come from the disk on every weight pass. Pages that were
# cached before are charged to nobody here: drop them first (decode.py --cap does). Needs root;
# works with cgroup v1 and v2.
#
# usage: capped.sh MEGABYTES COMMAND [ARGUMENT ...]        (a megabyte is 2**20 bytes here)
set -eu
[ $# -ge 2 ] || { echo "usage: capped.sh MEGABYTES COMMAND [ARGUMENT ...]" >&2; exit 2; }
limit=$(($1 << 20))
shift

root=/sys/fs/cgroup
if [ -d $root/memory ]; then
    group=$root/memory/ollm-benchmark-$$ limit_file=memory.limit_in_bytes
else
    group=$root/ollm-benchmark-$$ limit_file=memory.max
    grep -qw memory $root/cgroup.subtree_control || echo +memory >$root/cgroup.subtree_control
fi
mkdir "$group"
trap 'rmdir "$group"' EXIT
trap : TERM INT # ended with the command, which gets it too
echo "$limit" >"$group/$limit_file"
for swap in memory.swap.max:0 memory.memsw.limit_in_bytes:"$limit"; do
    [ ! -e "$group/${swap%:*}" ] || echo "${swap#*:}" >"$group/${swap%:*}"
done

status=0
sh -c 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"' capped "$group" "$@" || status=$?
exit $status
