# shellcheck shell=bash disable=SC2034,SC2154
# Builds the image of a suite once: rootfs/ (nspawn), disk.ext4, vmlinuz, initrd (vm), busybox.tar, ssh key.

image_packages=(
    systemd systemd-sysv dbus udev libpam-systemd
    containerd runc crun busybox-static
    iproute2 procps psmisc kmod strace util-linux mount ca-certificates
    "linux-image-cloud-$(dpkg --print-architecture)" initramfs-tools openssh-server
)
# Installed where the suite has them.
image_optional=(criu)
# For the tests of clients, in the suites that they run in. Tests start dockerd.
image_clients=(docker.io docker-cli containernetworking-plugins)
image_clients_suites=(trixie)

# What would only delay the boot, or disturb measurements, in a guest that lives for minutes.
image_masked=(
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service
    fstrim.timer man-db.timer systemd-tmpfiles-clean.timer getty@tty1.service serial-getty@ttyS0.service
    modprobe@configfs.service modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service
    sys-kernel-config.mount sys-fs-fuse-connections.mount systemd-pstore.service
)

# Sets $image, the directory of the suite's image; its name changes with all that goes into it.
find_image() { # suite
    local hash
    hash=$({
        echo "${image_packages[@]}" "${image_optional[@]}" "${image_clients[@]}" "${TESTBED_PACKAGES-}"
        cat "$testbed_dir/lib/image.sh"
        tar -C "$testbed_dir" --sort=name --mtime=@0 --owner=0 --group=0 -c guest
    } | sha256sum)
    image=$cache_root/$1-${hash:0:12}
}

# Sets $image after having built it if need be. Builders of the same image wait for each other; an
# image appears whole, by rename.
ensure_image() { # suite
    find_image "$1"
    [ ! -d "$image" ] || { touch "$image"; return; }
    mkdir -p "$cache_root"
    remove_old_images
    local lock
    exec {lock}>"$image.lock"
    flock -n "$lock" || { say "another process builds ${image##*/}, waiting for it"; flock "$lock"; }
    if [ ! -d "$image" ]; then
        "$testbed_dir/deps" image
        rm -rf --one-file-system "$image".tmp.*
        # A process of its own, so that `set -e` holds whoever calls us and Ctrl-C leaves nothing.
        "$testbed_dir/testbed" _build "$1" "$image.tmp.$$" || die "building the image of $1 failed"
        mv -T "$image.tmp.$$" "$image"
    fi
    exec {lock}>&-
}

# What no guest has used for a week and none uses now (a guest holds a lock on its image).
remove_old_images() {
    local old
    find "$cache_root" -mindepth 1 -maxdepth 1 -type d -mtime +7 | while read -r old; do
        flock -n "$old" rm -rf --one-file-system "$old" "$old.lock" || true
    done
}

build_image() { # suite directory
    local suite=$1 dir=$2 rootfs=$2/rootfs start=$SECONDS
    # A mount that is left in a broken image shows the machine's own files.
    # shellcheck disable=SC2064
    trap "rm -rf --one-file-system '$dir'" EXIT
    mkdir -p "$dir"

    ssh-keygen -q -t ed25519 -N '' -C testbed -f "$dir/ssh-key"
    say "$suite: installing packages (half a minute to two)"
    build_rootfs "$suite" "$rootfs" "$dir"
    cp "$rootfs"/boot/vmlinuz-* "$dir/vmlinuz"
    cp "$rootfs"/boot/initrd.img-* "$dir/initrd"

    say "$suite: writing the disk ($((SECONDS - start)) s so far)"
    mke2fs -q -t ext4 -L testbed -m 0 -E lazy_itable_init=1,root_owner=0:0 -d "$rootfs" "$dir/disk.ext4" 8G >/dev/null
    trap - EXIT
    say "$suite: image ready after $((SECONDS - start)) s: $(du -sh "$dir" | cut -f1)"
}

build_rootfs() { # suite rootfs image-directory
    local suite=$1 rootfs=$2 image_dir=$3 log=$3/mmdebstrap.log packages
    packages="${image_packages[*]} ${TESTBED_PACKAGES-}"
    [[ " ${image_clients_suites[*]} " != *" $suite "* ]] || packages+=" ${image_clients[*]}"
    # An initrd with just what the VM's disk and network need is unpacked quickly, also by an emulated CPU.
    # shellcheck disable=SC2016
    local lean_initrd='
        mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
        echo MODULES=list >"$1/etc/initramfs-tools/conf.d/testbed"
        printf "%s\n" virtio_pci virtio_blk virtio_net ext4 >"$1/usr/share/initramfs-tools/modules.d/testbed"'
    run_mmdebstrap() { # APT-OPTION
        mmdebstrap --mode=root --variant=apt ${1:+"--aptopt=$1"} \
            --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
            --dpkgopt='path-exclude=/usr/share/locale/*' \
            --include="$packages" \
            --essential-hook="$lean_initrd" \
            --customize-hook="'$testbed_dir/testbed' _configure \"\$1\" '$image_dir'" \
            "$suite" "$rootfs" 2>&1 | tee "$log" >&2
    }
    run_mmdebstrap "${TESTBED_APT_OPTION-}" && return
    # Signatures are still checked: only the date up to which the mirror promises to be current is not.
    grep -q 'is expired' "$log" || return 1
    say "$suite: the mirror lags behind (its release file has expired); continuing with it, for a test guest"
    rm -rf "$rootfs"
    run_mmdebstrap 'Acquire::Check-Valid-Until "false"'
}

# Runs while mmdebstrap still has /proc and the package lists in place.
configure_rootfs() { # rootfs image-directory
    local rootfs=$1 package
    for package in "${image_optional[@]}"; do
        if chroot "$rootfs" apt-cache show "$package" >/dev/null 2>&1; then
            chroot "$rootfs" apt-get install -qy --no-install-recommends "$package" >/dev/null
        else
            say "this suite has no package $package"
        fi
    done

    echo testbed >"$rootfs/etc/hostname"
    echo '127.0.0.1 localhost testbed' >"$rootfs/etc/hosts"
    # A machine id from the beginning: no first-boot work at each boot.
    tr -d - </proc/sys/kernel/random/uuid >"$rootfs/etc/machine-id"
    install -d -m 700 "$rootfs/root/.ssh"
    install -m 600 "$2/ssh-key.pub" "$rootfs/root/.ssh/authorized_keys"
    build_busybox "$rootfs" "$2/busybox.tar" "$BUSYBOX_IMAGE" '"sh"'
    install -D -m 644 "$2/busybox.tar" "$rootfs/usr/share/testbed/busybox.tar"
    # For the first container of a pod, which has nothing to do.
    build_busybox "$rootfs" "$rootfs/usr/share/testbed/pause.tar" "$PAUSE_IMAGE" '"sleep","2147483647"'
    mkdir -p "$rootfs/var/log/journal"
    cp -r --preserve=mode "$testbed_dir/guest/." "$rootfs/"
    chroot "$rootfs" systemctl -q enable testbed-ready.service testbed-network.service testbed-timeouts.service
    chroot "$rootfs" systemctl -q mask "${image_masked[@]}"
    if [ -e "$rootfs/usr/sbin/dockerd" ]; then
        chroot "$rootfs" systemctl -q disable docker.service docker.socket
    fi
    chroot "$rootfs" systemctl -q set-default multi-user.target
    # ssh over vsock: there is none, and it complains.
    mkdir -p "$rootfs/etc/systemd/system-generators"
    ln -s /dev/null "$rootfs/etc/systemd/system-generators/systemd-ssh-generator"
    # Nothing in /usr waits to be taken up at boot (ldconfig, sysusers, catalog…).
    touch "$rootfs/etc/.updated" "$rootfs/var/.updated"
}

# An OCI layout with one layer, busybox under all its names, without help of any registry. The words of the command are
# separated by commas.
build_busybox() { # rootfs file image command
    local work=$2.work tree=$2.work/tree layout=$2.work/layout applet layer config manifest
    mkdir -p "$tree"/{bin,sbin,dev,etc,home/user,proc,root,run,sys,tmp,usr/bin,usr/sbin,var} "$layout/blobs/sha256"
    cp "$1/bin/busybox" "$tree/bin/busybox"
    chroot "$1" busybox --list-full | while read -r applet; do
        [ "$applet" = bin/busybox ] || ln -sf /bin/busybox "$tree/$applet"
    done
    chmod 1777 "$tree/tmp"
    chown 1000:1000 "$tree/home/user"
    printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n' >"$tree/etc/passwd"
    printf 'root:x:0:\nuser:x:1000:\n' >"$tree/etc/group"
    tar -C "$tree" --sort=name --mtime=@0 --numeric-owner -cf "$work/layer" .
    layer=$(add_blob "$layout" "$work/layer")

    cat >"$work/config" <<JSON
{"architecture":"$(dpkg --print-architecture)","os":"linux",
 "config":{"Env":["PATH=$GUEST_PATH"],"Cmd":[$4],"WorkingDir":"/"},
 "rootfs":{"type":"layers","diff_ids":["sha256:$layer"]},
 "history":[{"created_by":"testbed"}]}
JSON
    config=$(add_blob "$layout" "$work/config")
    cat >"$work/manifest" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
 "config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:$config",
  "size":$(stat -c %s "$work/config")},
 "layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:$layer",
  "size":$(stat -c %s "$work/layer")}]}
JSON
    manifest=$(add_blob "$layout" "$work/manifest")
    cat >"$layout/index.json" <<JSON
{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",
 "digest":"sha256:$manifest","size":$(stat -c %s "$work/manifest"),
 "annotations":{"io.containerd.image.name":"$3","org.opencontainers.image.ref.name":"latest"}}]}
JSON
    echo '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
    tar -C "$layout" --sort=name --mtime=@0 --owner=0 --group=0 -cf "$2" .
    rm -rf "$work"
}

add_blob() { # layout file; prints the digest
    local digest
    digest=$(sha256sum <"$2")
    cp "$2" "$1/blobs/sha256/${digest%% *}"
    echo "${digest%% *}"
}
