# bash completion for containerd-shim-systemd-v1, written by `make manual`.
_containerd_shim_systemd_v1() {
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} words
    if [ "$COMP_CWORD" = 1 ]; then
        mapfile -t COMPREPLY < <(compgen -W 'doctor ps inspect -v -h' -- "$word")
        return
    fi
    # bash takes = for a word.
    if [[ $word = = ]]; then previous=$word; fi
    case $previous in
        --namespace | -n | =) return ;;
    esac
    case ${COMP_WORDS[1]} in
        doctor) words='--json -h --help' ;;
        ps) words='-n --namespace --in-use -q --quiet --json -h --help' ;;
        inspect) words='-n --namespace --json -h --help' ;;
        *) return ;;
    esac
    if [[ ${COMP_WORDS[1]} = inspect && $word != -* ]]; then
        words=$(containerd-shim-systemd-v1 ps --quiet 2>/dev/null)
    fi
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -F _containerd_shim_systemd_v1 containerd-shim-systemd-v1
