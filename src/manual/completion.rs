//! Completion for shells, from the table of commands.

use std::fmt::Write;

use super::{NAME, Opt, TOOLS};

fn all(options: &[Opt]) -> impl Iterator<Item = &Opt> {
    options.iter().chain([&super::HELP])
}

/// The completion for bash.
pub fn bash() -> String {
    let names: Vec<&str> = TOOLS.iter().map(|tool| tool.name).collect();
    let mut cases = String::new();
    for tool in TOOLS {
        let words: Vec<String> = all(tool.options)
            .flat_map(|option| {
                option.short.map(|c| format!("-{c}")).into_iter().chain([format!("--{}", option.long)])
            })
            .collect();
        // Writing to a string does not fail.
        let _ = writeln!(cases, "        {}) words='{}' ;;", tool.name, words.join(" "));
    }
    format!(
        "# bash completion for {NAME}, written by `make manual`.\n\
         _containerd_shim_systemd_v1() {{\n    local word=${{COMP_WORDS[COMP_CWORD]}} words\n\
         \x20   if [ \"$COMP_CWORD\" = 1 ]; then\n        mapfile -t COMPREPLY < <(compgen -W '{} -v -h' -- \"$word\")\n        return\n    fi\n\
         \x20   case ${{COMP_WORDS[1]}} in\n{cases}        *) return ;;\n    esac\n\
         \x20   if [[ ${{COMP_WORDS[1]}} = inspect && $word != -* ]]; then\n        words=$({NAME} ps --quiet 2>/dev/null)\n    fi\n\
         \x20   mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$word\")\n}}\ncomplete -F _containerd_shim_systemd_v1 {NAME}\n",
        names.join(" "),
    )
}

/// The completion for zsh.
pub fn zsh() -> String {
    let mut text = format!("#compdef {NAME}\n# Written by `make manual`.\n\nlocal -a commands\ncommands=(\n");
    for tool in TOOLS {
        let _ = writeln!(text, "    '{}:{}'", tool.name, tool.summary);
    }
    text += ")\nif (( CURRENT == 2 )); then\n    _describe command commands\n    return\nfi\ncase ${words[2]} in\n";
    for tool in TOOLS {
        let _ = writeln!(
            text,
            "    {})\n        shift words; (( CURRENT-- ))\n        _arguments -s \\",
            tool.name
        );
        for option in all(tool.options) {
            let (mark, value) = match option.value {
                Some(value) => ("=", format!(":{value}:")),
                None => ("", String::new()),
            };
            if let Some(letter) = option.short {
                let plus = if option.value.is_some() { "+" } else { "" };
                let _ = writeln!(text, "            '-{letter}{plus}[{}]{value}' \\", option.text);
            }
            let _ = writeln!(text, "            '--{}{mark}[{}]{value}' \\", option.long, option.text);
        }
        let rest = match tool.words {
            "" => "            && return".to_owned(),
            word => format!("            \"1:{word}:($({NAME} ps --quiet 2>/dev/null))\""),
        };
        let _ = writeln!(text, "{rest}\n        ;;");
    }
    text + "esac\n"
}

/// The completion for fish.
pub fn fish() -> String {
    let mut text =
        format!("# fish completion for {NAME}, written by `make manual`.\ncomplete -c {NAME} -f\n");
    for tool in TOOLS {
        let (name, summary) = (tool.name, tool.summary);
        let _ = writeln!(text, "complete -c {NAME} -n __fish_use_subcommand -a {name} -d '{summary}'");
        let when = format!("complete -c {NAME} -n '__fish_seen_subcommand_from {name}'");
        for option in all(tool.options) {
            let short = option.short.map(|letter| format!(" -s {letter}")).unwrap_or_default();
            let value = if option.value.is_some() { " -x" } else { "" };
            let _ = writeln!(text, "{when}{short} -l {}{value} -d '{}'", option.long, option.text);
        }
        if !tool.words.is_empty() {
            let _ = writeln!(text, "{when} -a '({NAME} ps --quiet 2>/dev/null)'");
        }
    }
    text
}
