# shellcheck shell=bash disable=SC2034,SC2154
# The lane "vm": the image as a QEMU machine with its own kernel, emulated where KVM can't be used.
# Everything works in it. It is controlled over ssh through a forwarded port.

lane_timeout=600

lane_run() { # image
    local accelerator port
    accelerator=$(pick_accelerator "$1")
    port=$(pick_port)
    echo "$port" >"$run/port"
    cp "$1/ssh-key" "$run/ssh-key"
    # The disk is a private, unlinked copy-on-write layer; nothing in it has to survive this machine.
    qemu-system-x86_64 -name "testbed-${run##*/}" -no-user-config -nodefaults -display none -machine q35 \
        -accel "$accelerator" -cpu max -smp 2 -m "${TESTBED_MEMORY:-3072}" \
        -kernel "$1/vmlinuz" -initrd "$1/initrd" -append "$(kernel_options)" \
        -drive "file=$1/disk.ext4,format=raw,if=virtio,cache=unsafe,snapshot=on" \
        -netdev "user,id=net,hostfwd=tcp:127.0.0.1:$port-:22" -device virtio-net-pci,netdev=net,romfile= \
        -device virtio-rng-pci \
        -chardev stdio,id=console,signal=off -serial chardev:console \
        -chardev "file,id=events,path=$run/events,append=on" -serial chardev:events &
    echo $! >"$run/pid"
    wait $!
}

# Expedited RCU makes up for some of the emulation: every write to cgroup.procs waits for a grace period.
kernel_options() {
    echo root=/dev/vda rw rootflags=noatime fsck.mode=skip console=ttyS0 quiet systemd.show_status=no \
        net.ifnames=0 mitigations=off audit=0 nowatchdog rcupdate.rcu_expedited=1 panic=-1
}

# /dev/kvm may exist and hang. Proof that it works is a kernel that complains about its missing root. The answer is
# kept until this machine boots again.
pick_accelerator() { # image
    local known
    known=$run_root/.accelerator-$(</proc/sys/kernel/random/boot_id)
    if [ ! -e "$known" ]; then
        if [ -w /dev/kvm ] && timeout -s KILL 10 qemu-system-x86_64 -no-user-config -nodefaults -display none \
            -machine q35 -accel kvm -cpu max -smp 2 -m 512 -no-reboot -serial stdio \
            -kernel "$1/vmlinuz" -append 'console=ttyS0 panic=-1' </dev/null 2>&1 | grep -q 'Unable to mount root'; then
            echo kvm >"$known"
        else
            # The guest's kernel patches its own code, for example while criu sets breakpoints. With one thread for each
            # processor of the guest, another processor sometimes executes half of a patch, and the kernel crashes (int3 in
            # __schedule). One thread is enough: an emulated guest uses half a processor on average.
            echo tcg,thread=single >"$known"
        fi
    fi
    cat "$known"
}

pick_port() {
    local port
    while port=$((20000 + RANDOM % 12000)) && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}

set_ssh() {
    ssh=(ssh -F none -i "$run/ssh-key" -p "$(<"$run/port")" -S "$run/ssh"
        -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR
        # A guest whose kernel has crashed says nothing more.
        -o ServerAliveInterval=15
        root@127.0.0.1)
}

# One connection carries all commands: a handshake takes long in an emulated machine. A connection from before a
# reboot would carry nothing. A guest that has just reported that it is ready may not accept a connection yet.
lane_ready() {
    local ssh start=$SECONDS
    lane_clean
    set_ssh
    until "${ssh[@]}" -fNM -o ConnectTimeout=60 </dev/null >"$run/ssh.log" 2>&1; do
        [ $((SECONDS - start)) -lt "$lane_timeout" ] || die "no connection to ${run##*/}: $(tail -n 3 "$run/ssh.log")"
        sleep 1
    done
}

# ssh runs the command through the guest's shell. The shell stays, so that it turns a death by a signal into an exit
# code, and its message about the signal is discarded.
lane_command() {
    local ssh words
    set_ssh
    printf -v words '%q ' "${guest_env[@]}" "TERM=${TERM-dumb}" "$@"
    command=("${ssh[@]}" -T -- "cd /; exec 3>&2 2>/dev/null; $words 2>&3 3>&-; exit \$?")
}

lane_shell() {
    local ssh
    set_ssh
    "${ssh[@]}" -t
}

lane_kill() { kill -KILL "$(<"$run/pid")"; }

# The ssh process of the connection ends with its peer, but only when it notices: end it now.
lane_clean() {
    local ssh
    [ -e "$run/ssh" ] || return 0
    set_ssh
    "${ssh[@]}" -O exit >/dev/null 2>&1 || true
    rm -f "$run/ssh"
}
