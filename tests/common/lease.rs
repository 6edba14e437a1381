//! Content that containerd keeps for a test: without a lease, containerd removes content that no image uses.

use std::ops::Deref;

use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{CreateRequest, DeleteRequest};
use containerd_client::tonic::Request;
use containerd_client::types::Descriptor;

use super::node::{Node, request, unique};

/// A lease of containerd, which ends on drop.
pub struct Lease<'n> {
    node: &'n Node,
    namespace: String,
    id: String,
}

impl<'n> Lease<'n> {
    pub fn new(node: &'n Node, namespace: &str) -> Self {
        let lease = Self { node, namespace: namespace.to_string(), id: unique("lease") };
        let create = CreateRequest { id: lease.id.clone(), ..Default::default() };
        let mut leases = LeasesClient::new(node.channel());
        node.call(leases.create(request(namespace, create))).expect("create a lease");
        lease
    }

    /// A request whose content containerd keeps as long as this lease.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = request(&self.namespace, message);
        request.metadata_mut().insert("containerd-lease", self.id.parse().expect("an id is a header"));
        request
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let delete = DeleteRequest { id: self.id.clone(), sync: false };
        let mut leases = LeasesClient::new(self.node.channel());
        if let Err(error) = self.node.call(leases.delete(request(&self.namespace, delete))) {
            eprintln!("can't delete lease {}: {error}", self.id);
        }
    }
}

/// The images of a checkpoint, which containerd keeps until they are dropped.
pub struct Images<'n> {
    pub descriptor: Descriptor,
    pub _lease: Lease<'n>,
}

impl Deref for Images<'_> {
    type Target = Descriptor;

    fn deref(&self) -> &Descriptor {
        &self.descriptor
    }
}
