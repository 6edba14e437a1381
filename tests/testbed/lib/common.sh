# shellcheck shell=bash disable=SC2034,SC2154
# Functions for every script of the testbed: messages, paths, the name of a guest.

export LC_ALL=C.UTF-8
readonly DEFAULT_SUITE=trixie
readonly GUEST_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
readonly BUSYBOX_IMAGE=docker.io/testbed/busybox:latest
readonly PAUSE_IMAGE=docker.io/testbed/pause:latest

cache_root=${TESTBED_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/containerd-shim-systemd-v1}
run_root=${TESTBED_RUN:-/run/containerd-shim-testbed}

say() { printf 'testbed: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Runs a function, and writes its output to a file, too, for the summary. If a command fails and ends the function,
# the file names that command.
logged() { # FILE FUNCTION ARGUMENT…
    local log=$1
    shift
    mkdir -p "${log%/*}"
    : >"$log"
    {
        set -E
        trap 'say "aborted: $BASH_COMMAND: status $?, in line $LINENO of ${BASH_SOURCE[0]##*/}"' ERR
        "$@"
    } 2>&1 | tee "$log"
}

need_root() { [ "$(id -u)" = 0 ] || die "must run as root (mounts, cgroups, namespaces)"; }

# The time limit of a suite in seconds, which ends a test that hangs. A whole suite in an emulated guest takes hours.
time_limit() { # LANE USUAL [FILTER…]
    if [ "$1" = vm ] && [ $# = 2 ]; then echo 36000; else echo "$2"; fi
}

# Sources the functions of the image or of a lane.
use() { # shellcheck source=/dev/null
    source "$testbed_dir/lib/$1.sh"; }

check_lane() {
    case ${1-} in
        vm | nspawn | host) ;;
        *) die "unknown lane '${1-}': vm, nspawn or host" ;;
    esac
}

check_suite() {
    case $1 in
        bookworm | trixie | forky) ;;
        *) die "unknown suite '$1': bookworm, trixie or forky" ;;
    esac
}

# The directory of one guest: TESTBED_NAME, else the only one that is up in this lane.
find_run() { # lane
    local candidates=()
    if [ -n "${TESTBED_NAME-}" ]; then
        run=$run_root/$TESTBED_NAME
        [ -e "$run/lane" ] || die "no guest named '$TESTBED_NAME' is up"
        [ "$(<"$run/lane")" = "$1" ] || die "guest '$TESTBED_NAME' is in lane $(<"$run/lane"), not $1"
        return
    fi
    for run in "$run_root"/*/; do
        run=${run%/}
        if [ -e "$run/lane" ] && [ "$(<"$run/lane")" = "$1" ]; then candidates+=("$run"); fi
    done
    case ${#candidates[@]} in
        0) die "no guest is up in lane $1: 'testbed up $1'" ;;
        1) run=${candidates[0]} ;;
        *) die "several guests are up in lane $1, choose with TESTBED_NAME: ${candidates[*]##*/}" ;;
    esac
}

# The path of this machine's cgroup v2 tree, which may exist beside v1.
cgroup2_root() {
    local root
    for root in /sys/fs/cgroup /sys/fs/cgroup/unified; do
        [ ! -e "$root/cgroup.controllers" ] || { echo "$root"; return; }
    done
    return 1
}

# A clean environment for the programs in a guest.
guest_env=(env -i "PATH=$GUEST_PATH" HOME=/root LANG=C.UTF-8)
