#!/bin/bash
# Ends the cluster that up.sh has started, and nothing else; its jobs first.
#
#   down.sh [FOLDER]            the logs stay
#   down.sh [FOLDER] --purge    FOLDER goes as well
set -uo pipefail
purge=no
[[ ${!#} == --purge ]] && purge=yes && set -- "${@:1:$#-1}"
folder=$(realpath -m "${1:-${KFAC_DIST_SLURM:-/tmp/kfac-dist-slurm}}")
# shellcheck source=tests/slurm/running.sh
source "$(dirname "${BASH_SOURCE[0]}")/running.sh"
export SLURM_CONF=$folder/slurm.conf

if running "$folder/pid/slurmctld" slurmctld; then
  scancel --user="$(id -un)" 2>/dev/null
  for ((attempt = 0; attempt < 75; attempt++)); do
    [[ -z $(squeue --noheader 2>/dev/null) ]] && break
    sleep 0.2
  done
fi

for file in "$folder"/pid/*; do
  [[ -e $file ]] || continue
  name=$(basename "$file")
  program=${name%%-*}
  if running "$file" "$program"; then
    pid=$(cat "$file")
    kill "$pid"
    for ((attempt = 0; attempt < 50; attempt++)); do
      running "$file" "$program" || break
      sleep 0.1
    done
    running "$file" "$program" && kill -KILL "$pid"
  fi
  rm -f "$file"
done

# /etc/hosts may be a mount, which cannot be replaced, only written.
if grep -q '# kfac-dist tests$' /etc/hosts; then
  rest=$(grep -v '# kfac-dist tests$' /etc/hosts)
  echo "$rest" >/etc/hosts
fi
[[ $purge == yes && -f $folder/slurm.conf ]] && rm -rf "$folder"
exit 0
