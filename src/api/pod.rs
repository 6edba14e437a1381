//! Converts CRI's configuration of a pod to the domain type (pure).

use std::path::PathBuf;

use protobuf::{EnumOrUnknown, Message};

use protobuf::well_known_types::any::Any;

use crate::oci::pod::{Context, Dns, IdRange, Namespace, Pod, Resources, Seccomp, UserNamespace};

use super::convert::Error;
use super::messages::cri::{
    IDMapping, LinuxSandboxSecurityContext, NamespaceMode, PodSandboxConfig, security_profile::ProfileType,
};

/// The name of the message.
const CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// The pod that the options of a sandbox describe; `None` if the client is not CRI and passes no options.
///
/// # Errors
/// The type is not known, the message is broken, or the pod needs something that is not supported.
pub fn pod(options: Option<&Any>) -> Result<Option<Pod>, Error> {
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(None);
    };
    if any.type_url.rsplit('/').next() != Some(CONFIG) {
        return Err(Error::UnknownSandbox(any.type_url.clone()));
    }
    let broken = |source| Error::Broken {
        what: "configuration of the pod",
        type_url: any.type_url.clone(),
        source: Box::new(source),
    };
    of(PodSandboxConfig::parse_from_bytes(&any.value).map_err(broken)?).map(Some)
}

fn of(config: PodSandboxConfig) -> Result<Pod, Error> {
    let metadata = config.metadata.unwrap_or_default();
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let namespaces = security.namespace_options.clone().unwrap_or_default();
    let user = namespaces.userns_options.into_option().filter(|user| is(user.mode, NamespaceMode::POD));
    let selinux = security.selinux_options.clone().into_option();
    let context = selinux.map(|given| Context {
        user: given.user,
        role: given.role,
        kind: given.type_,
        level: given.level,
    });
    Ok(Pod {
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        hostname: config.hostname,
        log_directory: config.log_directory,
        dns: config.dns_config.into_option().map(|dns| Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        cgroup_parent: linux.cgroup_parent,
        network: owner(namespaces.network),
        pid: owner(namespaces.pid),
        ipc: owner(namespaces.ipc),
        user: user.map(|user| UserNamespace { uids: ranges(user.uids), gids: ranges(user.gids) }),
        sysctls: linux.sysctls.into_iter().collect(),
        run_as: (
            security.run_as_user.as_ref().map_or(Ok(0), |user| id(user.value))?,
            security.run_as_group.as_ref().map_or(Ok(0), |group| id(group.value))?,
        ),
        groups: security.supplemental_groups.iter().map(|group| id(*group)).collect::<Result<_, _>>()?,
        selinux: context.filter(|context| *context != Context::default()),
        apparmor: apparmor(&security),
        seccomp: seccomp(&security),
        resources: linux.resources.into_option().map(|sum| Resources {
            cpu_period: sum.cpu_period,
            cpu_quota: sum.cpu_quota,
            cpu_shares: sum.cpu_shares,
            memory: sum.memory_limit_in_bytes,
        }),
    })
}

fn is(given: EnumOrUnknown<NamespaceMode>, mode: NamespaceMode) -> bool {
    given == EnumOrUnknown::new(mode)
}

fn owner(mode: EnumOrUnknown<NamespaceMode>) -> Namespace {
    if is(mode, NamespaceMode::NODE) { Namespace::Node } else { Namespace::Pod }
}

fn id(number: i64) -> Result<u32, Error> {
    u32::try_from(number).map_err(|_| Error::NoId(number))
}

fn ranges(mappings: Vec<IDMapping>) -> Vec<IdRange> {
    let range = |one: IDMapping| IdRange { container: one.container_id, host: one.host_id, size: one.length };
    mappings.into_iter().map(range).collect()
}

/// Accepts only a profile of the node: CRI names no default profile for a sandbox.
fn apparmor(security: &LinuxSandboxSecurityContext) -> Option<String> {
    let profile = security.apparmor.as_ref()?;
    let is_local = profile.profile_type == EnumOrUnknown::new(ProfileType::Localhost);
    is_local.then(|| without_scheme(&profile.localhost_ref).to_owned())
}

/// The field that is a message, or the older one that is a string.
fn seccomp(security: &LinuxSandboxSecurityContext) -> Seccomp {
    if security.privileged {
        return Seccomp::Own;
    }
    let local = match security.seccomp.as_ref() {
        Some(profile) => (profile.profile_type == EnumOrUnknown::new(ProfileType::Localhost))
            .then_some(profile.localhost_ref.as_str()),
        None => Some(security.seccomp_profile_path.as_str()).filter(|path| path.starts_with(LOCALHOST)),
    };
    local.map_or(Seccomp::Own, |path| Seccomp::File(PathBuf::from(without_scheme(path))))
}

const LOCALHOST: &str = "localhost/";

fn without_scheme(profile: &str) -> &str {
    profile.strip_prefix(LOCALHOST).unwrap_or(profile)
}

#[cfg(test)]
mod tests {
    use super::super::messages::cri::{
        Int64Value, LinuxPodSandboxConfig, NamespaceOption, PodSandboxMetadata, SecurityProfile,
    };
    use super::*;
    use protobuf::MessageField;

    fn any(config: &PodSandboxConfig) -> Any {
        Any { type_url: CONFIG.to_owned(), value: config.write_to_bytes().unwrap(), ..Any::default() }
    }

    fn with(security: LinuxSandboxSecurityContext) -> PodSandboxConfig {
        let linux = LinuxPodSandboxConfig {
            security_context: MessageField::some(security),
            ..LinuxPodSandboxConfig::default()
        };
        PodSandboxConfig { linux: MessageField::some(linux), ..PodSandboxConfig::default() }
    }

    #[test]
    fn a_client_without_options_is_not_cri() {
        assert_eq!(pod(None).unwrap(), None);
        assert_eq!(pod(Some(&Any::default())).unwrap(), None);
    }

    #[test]
    fn options_of_an_unknown_type_are_refused_by_name() {
        let other = Any { type_url: "example.com/x.Pod".to_owned(), ..Any::default() };
        assert!(pod(Some(&other)).unwrap_err().to_string().contains("x.Pod"));
        let broken = Any { value: vec![0xff], ..any(&PodSandboxConfig::default()) };
        assert!(matches!(pod(Some(&broken)), Err(Error::Broken { .. })));
    }

    #[test]
    fn an_empty_configuration_is_a_pod_with_namespaces_of_its_own() {
        assert_eq!(pod(Some(&any(&PodSandboxConfig::default()))).unwrap(), Some(Pod::default()));
    }

    #[test]
    fn a_pod_is_read() {
        let node = EnumOrUnknown::new(NamespaceMode::NODE);
        let options = NamespaceOption { network: node, ..NamespaceOption::default() };
        let profile = SecurityProfile {
            profile_type: EnumOrUnknown::new(ProfileType::Localhost),
            localhost_ref: "/profiles/a.json".to_owned(),
            ..SecurityProfile::default()
        };
        let user = Int64Value { value: 65535, ..Int64Value::default() };
        let mut config = with(LinuxSandboxSecurityContext {
            namespace_options: MessageField::some(options),
            seccomp: MessageField::some(profile),
            run_as_user: MessageField::some(user),
            supplemental_groups: vec![7],
            ..LinuxSandboxSecurityContext::default()
        });
        let metadata = PodSandboxMetadata { name: "web".to_owned(), ..PodSandboxMetadata::default() };
        config.metadata = MessageField::some(metadata);
        let pod = pod(Some(&any(&config))).unwrap().unwrap();
        assert_eq!((pod.name.as_str(), pod.run_as, &pod.groups[..]), ("web", (65535, 0), &[7][..]));
        assert_eq!((pod.network, pod.pid), (Namespace::Node, Namespace::Pod));
        assert_eq!(pod.seccomp, Seccomp::File("/profiles/a.json".into()));
    }

    #[test]
    fn the_older_name_of_a_profile_is_read() {
        let of = |path: &str| {
            let security = LinuxSandboxSecurityContext {
                seccomp_profile_path: path.to_owned(),
                ..LinuxSandboxSecurityContext::default()
            };
            super::of(with(security)).unwrap().seccomp
        };
        assert_eq!(of("localhost//profiles/a.json"), Seccomp::File("/profiles/a.json".into()));
        assert_eq!(of("runtime/default"), Seccomp::Own);
    }

    #[test]
    fn a_user_that_does_not_exist_is_refused() {
        let user = Int64Value { value: -1, ..Int64Value::default() };
        let security = LinuxSandboxSecurityContext {
            run_as_user: MessageField::some(user),
            ..LinuxSandboxSecurityContext::default()
        };
        assert!(matches!(super::of(with(security)), Err(Error::NoId(-1))));
    }
}
