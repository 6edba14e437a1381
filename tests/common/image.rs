//! The image of the testbed: imports it into a namespace, and knows the chain id of its only layer.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{GetImageRequest, ReadContentRequest};
use containerd_client::tonic::Status;
use serde_json::Value;

use super::node::{Node, request};

pub const IMAGE: &str = "docker.io/testbed/busybox:latest";
const ARCHIVE: &str = "/usr/share/testbed/busybox.tar";

/// The parent of a container's snapshot: the chain id of the image. For an image of one layer this is the diff id of
/// the layer.
pub fn chain_id(node: &Node, namespace: &str) -> String {
    static KNOWN: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(id) = known().get(namespace) {
        return id.clone();
    }
    let id = look_up(node, namespace);
    known().insert(namespace.to_string(), id.clone());
    id
}

fn look_up(node: &Node, namespace: &str) -> String {
    let target = match target(node, namespace) {
        Ok(digest) => digest,
        Err(_) => {
            import(namespace);
            target(node, namespace).unwrap_or_else(|error| panic!("no {IMAGE} after its import: {error}"))
        }
    };
    let mut manifest = read(node, namespace, &target);
    if let Some(first) = manifest["manifests"][0]["digest"].as_str() {
        manifest = read(node, namespace, first);
    }
    let config = manifest["config"]["digest"].as_str().unwrap_or_else(|| panic!("no config in {manifest}"));
    let config = read(node, namespace, config);
    match config["rootfs"]["diff_ids"].as_array().map(Vec::as_slice) {
        Some([layer]) => layer.as_str().expect("a diff id is a string").to_string(),
        layers => panic!("{IMAGE} has one layer, here: {layers:?}"),
    }
}

fn import(namespace: &str) {
    let output = Command::new("ctr")
        .args(["--namespace", namespace, "image", "import", "--snapshotter", "overlayfs", ARCHIVE])
        .output()
        .expect("run ctr");
    assert!(
        output.status.success(),
        "import {ARCHIVE} into {namespace}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn target(node: &Node, namespace: &str) -> Result<String, Status> {
    let get = request(namespace, GetImageRequest { name: IMAGE.to_string() });
    let image = node.call(ImagesClient::new(node.channel()).get(get))?.image;
    let target = image.and_then(|image| image.target);
    Ok(target.unwrap_or_else(|| panic!("{IMAGE} has no target")).digest)
}

fn read(node: &Node, namespace: &str, digest: &str) -> Value {
    let read = ReadContentRequest { digest: digest.to_string(), ..Default::default() };
    let mut stream = node
        .call(ContentClient::new(node.channel()).read(request(namespace, read)))
        .unwrap_or_else(|error| panic!("read {digest}: {error}"));
    let mut bytes = Vec::new();
    while let Some(part) =
        node.block_on(stream.message()).unwrap_or_else(|error| panic!("read {digest}: {error}"))
    {
        bytes.extend(part.data);
    }
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{digest} is not JSON: {error}"))
}
