#compdef containerd-shim-systemd-v1
# Written by `make manual`.

local -a commands
commands=(
    'doctor:say what is wrong on this machine, and what to do about it'
    'ps:list the tasks of this runtime with their units'
    'inspect:show all that is known of a task'
)
if (( CURRENT == 2 )); then
    _describe command commands
    return
fi
case ${words[2]} in
    doctor)
        shift words; (( CURRENT-- ))
        _arguments -s \
            '--json[write JSON]' \
            '-h[show this text]' \
            '--help[show this text]' \
            && return
        ;;
    ps)
        shift words; (( CURRENT-- ))
        _arguments -s \
            '-n+[only tasks of this namespace of containerd]:NAMESPACE:' \
            '--namespace=[only tasks of this namespace of containerd]:NAMESPACE:' \
            '--in-use[only tasks that a client has]' \
            '-q[write only ids, in full]' \
            '--quiet[write only ids, in full]' \
            '--json[write JSON]' \
            '-h[show this text]' \
            '--help[show this text]' \
            && return
        ;;
    inspect)
        shift words; (( CURRENT-- ))
        _arguments -s \
            '-n+[only tasks of this namespace of containerd]:NAMESPACE:' \
            '--namespace=[only tasks of this namespace of containerd]:NAMESPACE:' \
            '--json[write JSON]' \
            '-h[show this text]' \
            '--help[show this text]' \
            "1:ID:($(containerd-shim-systemd-v1 ps --quiet 2>/dev/null))"
        ;;
esac
