//! The properties that only the units of some containers have: those that the client (annotations) or the
//! administrator (runtime options) requests, and the devices that the container may use.

use std::collections::BTreeMap;

use crate::oci::bundle::Spec;
use crate::oci::resources::DeviceRule;
use crate::oci::{devices, signal};
use crate::services::Error;
use crate::task::Task;
use crate::task::request::{DeviceAllow, Property, PropertySource, Runtime};
use crate::unit;
use crate::unit::annotation::{self, Additions, Extension};
use crate::unit::systemd::Systemd;

/// The requested properties. Their names and values are checked, their types are not.
///
/// `extension`: the names in the option AnnotationProperties.
pub(crate) fn properties(
    task: &str,
    spec: &Spec,
    options: BTreeMap<String, String>,
    extension: &[String],
) -> Result<Vec<Property>, Error> {
    let extension = Extension::new(extension)?;
    let mut asked: Vec<Property> = options
        .into_iter()
        .map(|(name, value)| Property { source: PropertySource::Options, name, value })
        .collect();
    if let Some(text) = spec.annotation(annotation::STOP_SIGNAL) {
        match signal::parse(text) {
            Ok(number) => asked.push(Property {
                source: PropertySource::StopSignal,
                name: "KillSignal".to_owned(),
                value: number.to_string(),
            }),
            // The image's author wrote it. containerd-shim-runc-v2 runs the container, too.
            Err(error) => {
                tracing::warn!(%task, %error, "task {task}: systemd stops it with SIGTERM: {error}")
            }
        }
    }
    asked.extend(spec.annotations(annotation::PREFIX).into_iter().map(|(name, value)| Property {
        source: PropertySource::Annotation,
        name: name.to_owned(),
        value: value.to_owned(),
    }));
    let checked = annotation::check(asked, &extension)?;
    for (property, reason) in checked.left_out {
        tracing::warn!(%task, "task {task}: {property} has no effect: {reason}");
    }
    Ok(checked.properties)
}

/// The devices that the container may use, if systemd can express exactly the rules of the OCI runtime. A stricter
/// device filter of systemd would silently win.
pub(crate) fn allowed_devices(
    spec: &Spec,
    rules: &[DeviceRule],
    runtime: &Runtime,
) -> Option<Vec<DeviceAllow>> {
    let binary = runtime.binary.file_name().and_then(|name| name.to_str());
    // Other OCI runtimes need devices of their own, such as /dev/kvm.
    let known = matches!(binary, Some("runc" | "crun")) && spec.annotation(CRUN_HANDLER).is_none();
    // Hooks may give the container more devices, such as GPUs.
    let hooks = spec.has_hooks();
    // Without rules, crun has no filter (1.8 to 1.21), and runc has one.
    let has_filter = binary != Some("crun") || !rules.is_empty();
    if !known || hooks || !has_filter {
        return None;
    }
    devices::allowed(rules)
}

/// Selects a handler of crun, such as one that runs the container in a virtual machine.
const CRUN_HANDLER: &str = "run.oci.handler";

/// Whether the container may use sd_notify(3). The annotation can only forbid what the option allows.
pub(crate) fn notifies(task: &str, spec: &Spec, option: bool) -> Result<bool, Error> {
    match spec.annotation(NOTIFY) {
        None => Ok(option),
        Some("true") if option => Ok(true),
        Some("true") => {
            tracing::warn!(%task, "task {task}: annotation {NOTIFY} has no effect: the runtime option Notify does not allow it");
            Ok(false)
        }
        Some("false") => Ok(false),
        Some(other) => Err(Error::Notify { value: other.chars().take(80).collect() }),
    }
}

/// The annotation that allows or forbids notifications: `true` or `false`.
const NOTIFY: &str = "io.containerd.systemd.notify";

/// The properties, as systemd gets them.
pub(crate) fn of(task: &Task) -> Result<Additions, Error> {
    let devices = task.devices.as_deref().map(devices::with_defaults);
    Ok(Additions::new(devices.as_deref(), &task.properties)?)
}

/// Turns an error of systemd into one that names the requested property. A property that systemd does not know, or a
/// value that it refuses, is a requested one: systemd accepts all properties of the shim itself.
pub(crate) fn refused(task: &Task, error: unit::error::Error) -> Error {
    let of_asked = error.is_about_a_property() && !task.properties.is_empty();
    match error {
        unit::error::Error::Refused { reason, .. } if of_asked => {
            let origins = task.properties.iter().map(ToString::to_string).collect();
            Error::Property(annotation::Error::Refused { origins, reason })
        }
        other => Error::Unit(other),
    }
}

/// Checks the types of the requested properties: the error of systemd would not name the property.
pub(crate) async fn check_types(manager: &dyn Systemd, properties: &[Property]) -> Result<(), Error> {
    if !properties.is_empty() {
        manager.property_types().await?.check(properties)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    fn asked(text: &str, options: &[(&str, &str)]) -> Result<Vec<String>, Error> {
        let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let properties = properties("default/web", &spec(text), options.collect(), &[])?;
        Ok(properties.iter().map(|property| format!("{property} = {}", property.value)).collect())
    }

    #[test]
    fn annotations_override_the_stop_signal_but_not_the_options() {
        let options = [("KillSignal", "10"), ("TimeoutStopSec", "5")];
        let stop = r#""io.containerd.image.config.stop-signal":"SIGQUIT""#;
        let own = r#""org.systemd.property.KillSignal":"1","org.systemd.property.TimeoutStopUSec":"@t 7""#;
        let of_options =
            ["runtime option Properties.KillSignal = 10", "runtime option Properties.TimeoutStopSec = 5"];
        for annotations in [stop.to_owned(), format!("{stop},{own}")] {
            let text = format!(r#"{{"annotations":{{{annotations}}}}}"#);
            assert_eq!(asked(&text, &options).unwrap(), of_options);
        }
        assert_eq!(
            asked(&format!(r#"{{"annotations":{{{stop},{own}}}}}"#), &[]).unwrap(),
            [
                "annotation org.systemd.property.KillSignal = 1",
                "annotation org.systemd.property.TimeoutStopUSec = @t 7",
            ]
        );
        assert_eq!(
            asked(&format!(r#"{{"annotations":{{{stop}}}}}"#), &[]).unwrap(),
            ["annotation io.containerd.image.config.stop-signal = 3"]
        );
        assert_eq!(asked("{}", &[]).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_stop_signal_that_ends_no_process_is_ignored() {
        let text = r#"{"annotations":{"io.containerd.image.config.stop-signal":"SIGCONT"}}"#;
        assert_eq!(asked(text, &[]).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn an_annotation_can_not_allow_what_the_option_forbids() {
        let notifies = |value: &str, option| {
            let text = format!(r#"{{"annotations":{{"{NOTIFY}":"{value}"}}}}"#);
            notifies("default/web", &spec(&text), option)
        };
        assert!(!notifies("true", false).unwrap() && notifies("true", true).unwrap());
        assert!(!notifies("false", true).unwrap() && notifies("", true).unwrap());
        notifies("yes", true).unwrap_err();
    }

    #[test]
    fn a_stop_signal_that_is_no_signal_changes_nothing() {
        let asked = asked(r#"{"annotations":{"io.containerd.image.config.stop-signal":"9x"}}"#, &[]);
        assert_eq!(asked.unwrap(), Vec::<String>::new());
    }

    fn devices(text: &str, binary: &str, rules: &[DeviceRule]) -> Option<Vec<DeviceAllow>> {
        let runtime = Runtime { binary: binary.into(), ..Runtime::default() };
        allowed_devices(&spec(text), rules, &runtime)
    }

    fn deny_all() -> DeviceRule {
        DeviceRule { allow: false, kind: "a".to_owned(), major: None, minor: None, access: "rwm".to_owned() }
    }

    #[test]
    fn systemds_filter_is_never_stricter_than_the_oci_runtimes() {
        for (text, binary) in [
            ("{}", "/usr/bin/runsc"),
            (r#"{"annotations":{"run.oci.handler":"krun"}}"#, "/usr/bin/crun"),
            (r#"{"hooks":{"prestart":[{"path":"/gpu"}]}}"#, "/usr/bin/runc"),
        ] {
            assert_eq!(devices(text, binary, &[deny_all()]), None, "{text} {binary}");
        }
        for binary in ["/usr/sbin/runc", "/usr/bin/crun"] {
            assert_eq!(devices("{}", binary, &[deny_all()]), Some(vec![]));
        }
        assert_eq!(devices("{}", "/usr/sbin/runc", &[]), Some(vec![]));
        assert_eq!(devices("{}", "/usr/bin/crun", &[]), None);
    }
}
