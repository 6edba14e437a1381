//! The names of a container for people (pure), from the annotations that clients write into the spec.

use crate::id::{ExecId, SHORT_ID, TaskKey, is_long_hex};
use crate::task::TaskMetadata;

use crate::text;

use super::bundle::Spec;

/// The longest name, in bytes: it must fit into a line of a terminal.
const MAX_NAME: usize = 160;

/// Names and journal fields of a container.
pub fn of(key: &TaskKey, spec: &Spec) -> TaskMetadata {
    let cri = |name: &str| spec.annotation(&format!("io.kubernetes.cri.{name}"));
    let pod = cri("sandbox-name").map(|name| match cri("sandbox-namespace") {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name.to_owned(),
    });
    let name = match (&pod, cri("container-name"), cri("container-type")) {
        (Some(pod), Some(container), _) => format!("{pod}/{container}"),
        (Some(pod), None, Some("sandbox")) => format!("{pod} (sandbox)"),
        (Some(pod), None, _) => pod.clone(),
        (None, ..) => spec.annotation("nerdctl/name").map_or_else(|| plain_name(key, spec), str::to_owned),
    };
    let name = text::line(&name, MAX_NAME);
    let image = cri("image-name").map(|image| text::line(image, MAX_NAME));
    let shown = match &image {
        Some(image) => format!("{name} ({image})"),
        None => name.clone(),
    };
    let mut fields = vec![
        ("CONTAINER_ID".to_owned(), key.id.to_string()),
        ("CONTAINER_NAMESPACE".to_owned(), key.namespace.to_string()),
        // systemd parses the fields as a list of words when it reloads its units.
        ("CONTAINER_NAME".to_owned(), text::word(&name, MAX_NAME)),
    ];
    fields.extend(image.map(|image| ("CONTAINER_IMAGE".to_owned(), text::word(&image, MAX_NAME))));
    for (field, annotation) in
        [("POD_NAME", "sandbox-name"), ("POD_NAMESPACE", "sandbox-namespace"), ("POD_UID", "sandbox-uid")]
    {
        fields.extend(cri(annotation).map(|value| (field.to_owned(), text::word(value, MAX_NAME))));
    }
    TaskMetadata { description: format!("{shown}, container {key}"), fields }
}

/// The description of an exec: its program and its container. It does not contain the arguments, which may hold secrets:
/// every user of the machine can read the description of a unit.
pub fn of_exec(container: &str, exec: &ExecId, program: &str) -> String {
    let short = if is_long_hex(exec.as_str()) { &exec.as_str()[..SHORT_ID] } else { exec.as_str() };
    format!("{} (exec {short} in {})", text::line(program, MAX_NAME), container)
}

/// The identifier of the container's lines in the journal: its short name.
pub fn identifier(fields: &[(String, String)]) -> &str {
    let name =
        fields.iter().find(|(field, _)| field == "CONTAINER_NAME").map_or("container", |(_, name)| name);
    name.rsplit('/').next().unwrap_or(name)
}

/// Docker does not pass the container's name. A host name that somebody chose is more readable than an id.
fn plain_name(key: &TaskKey, spec: &Spec) -> String {
    let id = key.id.as_str();
    if !is_long_hex(id) {
        return id.to_owned();
    }
    let short = &id[..SHORT_ID];
    if spec.hostname.is_empty() || spec.hostname == short { short.to_owned() } else { spec.hostname.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Namespace, TaskId};

    fn metadata_of(id: &str, spec: &str) -> TaskMetadata {
        let key = TaskKey::usual(Namespace::new("n").unwrap(), TaskId::new(id).unwrap());
        of(&key, &Spec::parse(spec.as_bytes()).unwrap())
    }

    #[test]
    fn an_id_that_is_a_name_is_the_name() {
        let metadata = metadata_of("web", "{}");
        assert_eq!(metadata.description, "web, container n/web");
        assert_eq!(identifier(&metadata.fields), "web");
    }

    #[test]
    fn kubernetes_names_pod_and_container() {
        let spec = r#"{"annotations":{"io.kubernetes.cri.sandbox-name":"dns","io.kubernetes.cri.sandbox-namespace":"kube",
            "io.kubernetes.cri.container-name":"main","io.kubernetes.cri.image-name":"dns:1"}}"#;
        let metadata = metadata_of(&"ab".repeat(32), spec);
        assert!(
            metadata.description.starts_with("kube/dns/main (dns:1), container n/abab"),
            "{}",
            metadata.description
        );
        assert!(metadata.fields.contains(&("POD_NAME".to_owned(), "dns".to_owned())));
        assert_eq!(identifier(&metadata.fields), "main");
    }

    #[test]
    fn an_exec_is_named_after_its_program() {
        let shown = of_exec(&metadata_of("web", "{}").description, &ExecId::new("e1").unwrap(), "s\nh");
        assert_eq!(shown, "sh (exec e1 in web, container n/web)");
    }

    #[test]
    fn a_docker_container_is_named_after_its_host_name() {
        let id = "cd".repeat(32);
        assert!(metadata_of(&id, r#"{"hostname":"db"}"#).description.starts_with("db, "));
        assert!(metadata_of(&id, r#"{"hostname":"cdcdcdcdcdcd"}"#).description.starts_with("cdcdcdcdcdcd, "));
    }

    #[test]
    fn a_name_can_not_add_lines_or_fields() {
        let spec = r#"{"annotations":{"nerdctl/name":"x OBJECT_SYSTEMD_UNIT=ssh.service\\"}}"#;
        let metadata = metadata_of("a", spec);
        assert_eq!(identifier(&metadata.fields), "x_OBJECT_SYSTEMD_UNIT=ssh.service");
        assert!(
            metadata.fields.iter().all(|(_, value)| !value.contains([' ', '\\'])),
            "{:?}",
            metadata.fields
        );
        assert!(metadata.description.ends_with("container n/a"), "{}", metadata.description);
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let metadata = metadata_of("a", "{\"annotations\":{\"nerdctl/name\":\"x\\ny\\u001b[31m\"}}");
        assert!(metadata.description.starts_with("xy[31m, "), "{}", metadata.description);
    }
}
