//! A disk image for snapshots.

use serde_json::{Value, json};

use super::Qmp;

/// Wait until a job is concluded, and assert that it succeeded.
#[track_caller]
pub fn await_job(client: &mut Qmp, name: &str) {
    client.await_event("JOB_STATUS_CHANGE", |data| {
        data["id"] == name && data["status"] == "concluded"
    });
    let jobs = client.run("query-jobs", json!({}));
    let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == name).unwrap();
    assert_eq!(job.get("error"), None);
    client.run("job-dismiss", json!({ "id": name }));
}

/// Let QEMU create an image for snapshots, as node `disk`.
pub fn make_image(client: &mut Qmp, path: &str) {
    let create = |client: &mut Qmp, job: &str, options: Value| {
        client.run("blockdev-create", json!({"job-id": job, "options": options}));
        await_job(client, job);
    };
    create(client, "file", json!({"driver": "file", "filename": path, "size": 0}));
    let protocol = json!({"driver": "file", "node-name": "protocol", "filename": path});
    client.run("blockdev-add", protocol);
    create(client, "image", json!({"driver": "qcow2", "file": "protocol", "size": 1 << 20}));
    let disk = json!({"driver": "qcow2", "node-name": "disk", "file": "protocol"});
    client.run("blockdev-add", disk);
}
