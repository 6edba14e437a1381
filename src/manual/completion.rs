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
    // The options of all commands that take a value: nothing is known of the values.
    let mut valued: Vec<String> = TOOLS
        .iter()
        .flat_map(|tool| all(tool.options).filter(|option| option.value.is_some()))
        .flat_map(|option| {
            option.short.map(|c| format!("-{c}")).into_iter().chain([format!("--{}", option.long)])
        })
        .collect();
    valued.sort();
    valued.dedup();
    format!(
        "# bash completion for {NAME}, written by `make manual`.\n\
         _containerd_shim_systemd_v1() {{\n    local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words\n\
         \x20   if [ \"$COMP_CWORD\" = 1 ]; then\n        mapfile -t COMPREPLY < <(compgen -W '{} -v -h' -- \"$word\")\n        return\n    fi\n\
         \x20   # bash takes = for a word.\n\
         \x20   if [[ $word = = ]]; then previous=$word; fi\n\
         \x20   case $previous in\n        {} | =) return ;;\n    esac\n\
         \x20   case ${{COMP_WORDS[1]}} in\n{cases}        *) return ;;\n    esac\n\
         \x20   if [[ ${{COMP_WORDS[1]}} = inspect && $word != -* ]]; then\n        words=$({NAME} ps --quiet 2>/dev/null)\n    fi\n\
         \x20   mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$word\")\n}}\ncomplete -F _containerd_shim_systemd_v1 {NAME}\n",
        names.join(" "),
        valued.join(" | "),
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    /// What bash offers for the last of these words.
    fn offered(words: &str) -> String {
        // The command that lists ids.
        let ids = format!("{}() {{ echo web; }}\n", super::NAME);
        let last = words.split('|').count();
        let words = words.split('|').map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
        let script = format!(
            "{ids}{}COMP_WORDS=(x {words}); COMP_CWORD={last}; _containerd_shim_systemd_v1; echo \"${{COMPREPLY[*]}}\"",
            super::bash()
        );
        let output = Command::new("bash").args(["-c", &script]).output().unwrap();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[test]
    fn bash_offers_nothing_for_the_value_of_an_option() {
        for words in [
            "ps|-n|",
            "inspect|-n|",
            "inspect|--namespace|w",
            "inspect|--namespace|=",
            "inspect|--namespace|=|w",
        ] {
            assert_eq!(offered(words), "", "{words}");
        }
        assert_eq!(offered("inspect|-n|default|"), "web");
        assert_eq!(offered("inspect|"), "web");
        assert_eq!(offered("ps|--q"), "--quiet");
        assert_eq!(offered("do"), "doctor");
    }
}
