# shellcheck shell=bash disable=SC2034,SC2154
# The paths of cargo's programs.

repo_dir=$(readlink -f "$testbed_dir/../..")
target_dir=${CARGO_TARGET_DIR:-$repo_dir/target}
cd "$repo_dir" || exit

# Runs one function at a time that builds: two suites that run side by side share the target directory, and one would
# overwrite the programs of the other before it has copied them.
exclusively() { # FUNCTION
    local lock
    mkdir -p "$target_dir/testbed"
    exec {lock}>"$target_dir/testbed/build.lock"
    flock "$lock"
    "$@"
    exec {lock}>&-
}

# Builds the daemon as it is installed.
build_daemon() { make --no-print-directory -C "$repo_dir" build; }

# Builds the daemon with its fault points, and prints the path of the program. Tests use the debug build; a release
# build is for the benchmark.
build_faults() { # debug|release
    local path=$target_dir/testbed/containerd-shim-systemd-v1-$1 profile=dev
    [ "$1" = debug ] || profile=$1
    mkdir -p "${path%/*}"
    cargo rustc --quiet --locked --profile "$profile" --features faults --bin containerd-shim-systemd-v1 -- \
        -C target-feature=+crt-static >&2
    # The next build without the feature overwrites the program in the target directory. Another suite may be reading the
    # earlier copy.
    cp -f "$target_dir/$1/containerd-shim-systemd-v1" "$path.$$"
    mv -f "$path.$$" "$path"
    echo "$path"
}

# Builds one test or bench target and prints the path of its program. cargo also prints the daemon's, in no fixed
# order.
cargo_executable() { # test|bench OPTION…
    local path
    path=$(cargo "$@" --no-run --message-format=json-render-diagnostics |
        sed -n '/"kind":\["'"$1"'"\]/s/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    [ -x "$path" ] || die "cargo $* built no program"
    echo "$path"
}

# Builds the tests in a directory of tests/ and prints the path of their program. They have the feature of `build_faults`, so
# that the library is built once for both.
test_program() { # NAME
    cargo_executable test --locked --features faults --test "$1"
}
