# shellcheck shell=bash disable=SC2034,SC2154
# The lane "nspawn": the image booted by systemd-nspawn on this machine's kernel. It needs no systemd on
# the machine and no controllers in cgroup v2 (limits can't be tested without).

lane_timeout=60

# A soft reboot leaves this mounted: systemd in the guest could not mount it again.
stays_mounted() { # name of the mount unit; uses $fs
    mkdir -p "$fs/root/etc/systemd/system/$1.mount.d"
    printf '[Unit]\nDefaultDependencies=no\n' >"$fs/root/etc/systemd/system/$1.mount.d/soft-reboot.conf"
}

lane_run() { # image
    local fs=$run/fs cgroup directory binds=()
    cgroup=$(cgroup2_root)/testbed-${run##*/} || die "no cgroup v2 tree on this machine"

    # Everything that the guest writes is in memory. The image below does not change.
    mkdir "$fs"
    mount -t tmpfs -o mode=755,size=75% testbed "$fs"
    mkdir "$fs"/{upper,work,root}
    mount -t overlay -o "lowerdir=$1/rootfs,upperdir=$fs/upper,workdir=$fs/work" testbed "$fs/root"
    # Overlay filesystems can't have their upper layer on another one.
    for directory in containerd docker; do
        mkdir "$fs/$directory"
        binds+=("--bind=$fs/$directory:/var/lib/$directory")
        stays_mounted "var-lib-$directory"
    done
    stays_mounted 'run-testbed\x2devents'

    mkdir "$cgroup"
    echo +cpu +memory +pids +io +cpuset >"$cgroup/../cgroup.subtree_control" 2>/dev/null || true
    # With exit code 133, nspawn says that the guest wants to be rebooted.
    local status=133
    while [ "$status" = 133 ]; do
        (
            echo "$BASHPID" >"$cgroup/cgroup.procs"
            export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
            exec systemd-nspawn --quiet --directory="$fs/root" --boot --register=no --keep-unit \
                --capability=all --system-call-filter='@keyring bpf @mount @privileged pidfd_getfd' \
                --private-network --resolv-conf=off --timezone=off --link-journal=no --console=pipe \
                --bind="$run/events:/run/testbed-events" "${binds[@]}"
        ) &
        echo $! >"$run/pid"
        status=0
        wait $! || status=$?
    done
    return "$status"
}

lane_ready() { :; }

# PID 1 of the guest. It changes with a reboot, so it is looked up each time.
leader() {
    local pid children
    pid=$(<"$run/pid")
    children=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null) || true
    [ -n "$children" ] || die "${run##*/} is not running"
    echo "${children%% *}"
}

lane_command() {
    command=(nsenter -t "$(leader)" --all --root --wd -- "${guest_env[@]}" "TERM=${TERM-dumb}" "$@")
}

lane_shell() { lane_exec bash -l; }

# When PID 1 of the guest ends, the kernel ends every process in the guest.
lane_kill() {
    local pid
    pid=$(leader 2>/dev/null) || pid=$(<"$run/pid")
    kill -KILL "$pid"
}

# nspawn also creates its cgroup in systemd's v1 hierarchy, if this machine has one.
lane_clean() {
    local cgroup
    for cgroup in "$(cgroup2_root)" /sys/fs/cgroup/systemd; do
        cgroup+=/testbed-${run##*/}
        [ ! -d "$cgroup" ] || find "$cgroup" -depth -type d -exec rmdir {} +
    done
}
