//! The configuration of a pod, as CRI passes it to CreateSandbox (Kubernetes' CRI, runtime/v1): the fields that tests set.

use std::collections::HashMap;

use prost::Message;
use prost_types::Any;

use super::node::unique;

#[derive(Clone, PartialEq, Message)]
pub struct Pod {
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<Metadata>,
    #[prost(string, tag = "2")]
    pub hostname: String,
    #[prost(message, optional, tag = "4")]
    pub dns: Option<Dns>,
    #[prost(message, optional, tag = "8")]
    pub linux: Option<Linux>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Metadata {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub uid: String,
    #[prost(string, tag = "3")]
    pub namespace: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Dns {
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub searches: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Linux {
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    pub security: Option<Security>,
    #[prost(map = "string, string", tag = "3")]
    pub sysctls: HashMap<String, String>,
    #[prost(message, optional, tag = "5")]
    pub resources: Option<Resources>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Resources {
    #[prost(int64, tag = "1")]
    pub cpu_period: i64,
    #[prost(int64, tag = "2")]
    pub cpu_quota: i64,
    #[prost(int64, tag = "3")]
    pub cpu_shares: i64,
    #[prost(int64, tag = "4")]
    pub memory: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Security {
    #[prost(message, optional, tag = "1")]
    pub namespaces: Option<Namespaces>,
    #[prost(message, optional, tag = "3")]
    pub run_as_user: Option<Number>,
    #[prost(message, optional, tag = "9")]
    pub seccomp: Option<Profile>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Profile {
    #[prost(int32, tag = "1")]
    pub kind: i32,
    #[prost(string, tag = "2")]
    pub path: String,
}

/// A profile in a file of the node.
pub const LOCALHOST: i32 = 2;

#[derive(Clone, PartialEq, Message)]
pub struct Number {
    #[prost(int64, tag = "1")]
    pub value: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Namespaces {
    #[prost(int32, tag = "1")]
    pub network: i32,
    #[prost(int32, tag = "2")]
    pub pid: i32,
    #[prost(int32, tag = "3")]
    pub ipc: i32,
}

pub const OF_NODE: i32 = 2;

/// The options with which CRI creates the sandbox of a pod.
pub fn pod(change: impl FnOnce(&mut Pod)) -> Option<Any> {
    let metadata = Metadata { name: "web-1".to_string(), uid: unique("uid"), namespace: "shop".to_string() };
    let mut pod = Pod { metadata: Some(metadata), ..Default::default() };
    change(&mut pod);
    Some(Any { type_url: "runtime.v1.PodSandboxConfig".to_string(), value: pod.encode_to_vec() })
}
