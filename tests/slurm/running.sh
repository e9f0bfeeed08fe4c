#!/bin/bash
# For up.sh and down.sh.

# running PIDFILE PROGRAM: whether the process of the file lives and is that program (numbers are used anew).
running() {
  local pid
  pid=$(cat "$1" 2>/dev/null) && [[ -n $pid ]] || return 1
  [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$2" ]] && ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status" 2>/dev/null
}
