//! The protocol between a keeper and clients of another version.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::Snapshot;
use serde_json::{Value, json};
use vpn_exec::linux::local_socket::{self, LocalListener};
use vpn_exec::linux::memory_file;
use vpn_exec::linux::poll::wait_for;
use vpn_exec::{lease, registry};

use crate::support::{PATIENCE, assert_unchanged, is_there, prepare, start};

/// A client that sends any message.
struct Client(OwnedFd);

impl Client {
    fn connect(name: &str) -> Result<Self> {
        Ok(Self(local_socket::connect(&registry::socket_of(&name.parse()?), lab::patience(PATIENCE))?))
    }

    /// Sends a request and returns the keeper's next event.
    fn request(&self, request: Value) -> Result<Value> {
        local_socket::send(&self.0, request.to_string().as_bytes(), None)?;
        let mut message = vec![0; 65536];
        ensure!(wait_for(&[self.0.as_fd()], Some(lab::patience(PATIENCE)))? == [true], "{request} is not answered");
        let (length, _) = local_socket::receive(&self.0, &mut message)?.context("the keeper closed the connection")?;
        Ok(serde_json::from_slice(&message[..length])?)
    }
}

#[test]
fn an_unknown_request_is_refused_and_the_lease_lives_on() {
    lab::world::test(|| {
        lab::tunnel::needs_root("the clients of a rootless tunnel first prove that they are outside")?;
        prepare()?;
        let before = Snapshot::take()?;
        let running = start("older", "wait")?;
        let client = Client::connect("older")?;
        assert_eq!(client.request(json!("Join"))?, json!("Welcome"));
        for unknown in [json!("Teleport"), json!({ "Teleport": { "to": "Mars" } }), json!({ "Down": { "softly": 1 } })]
        {
            let refused = client.request(unknown.clone())?;
            let message = refused["Refused"]["message"].as_str().with_context(|| format!("{unknown}: {refused}"))?;
            assert!(message.contains("does not know the request"), "{message}");
            assert!(refused["Refused"]["advice"].as_str().is_some_and(|advice| advice.contains("restart the tunnel")));
        }
        assert_eq!(lease::status::of(&"older".parse()?)?.context("a tunnel")?.leases, 2);

        // The client alone now keeps the tunnel up. Its end takes the tunnel down.
        running.end()?;
        assert_eq!(lease::status::of(&"older".parse()?)?.context("a tunnel")?.leases, 1);
        drop(client);
        let until = Instant::now() + lab::patience(PATIENCE);
        while is_there(vpn_exec::registry::Scope::current().directory()) {
            ensure!(Instant::now() < until, "the tunnel outlives its last lease");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_unchanged(&before, "at the end")
    });
}

/// The first of two keepers answers only after the second was asked. If each was asked in turn, the first would count
/// as hanging.
#[test]
fn all_keepers_are_asked_before_the_first_answer_is_waited_for() {
    lab::world::test(|| {
        let listeners = ["first", "second"].map(|name| -> Result<LocalListener> {
            let directory = Path::new("/run/vpn-exec").join(name);
            std::fs::create_dir_all(&directory)?;
            Ok(LocalListener::bind(&directory.join("socket"), 0o600)?)
        });
        let list = std::thread::spawn(|| lab::vpn_exec(["list", "--json"]).output());
        let mut asked = Vec::new();
        for (name, listener) in ["first", "second"].into_iter().zip(listeners) {
            let listener = listener?;
            ensure!(wait_for(&[listener.as_fd()], Some(lab::patience(PATIENCE)))? == [true], "{name} is not asked");
            let (client, _) = listener.accept()?.context("a client")?;
            ensure!(wait_for(&[client.as_fd()], Some(lab::patience(PATIENCE)))? == [true], "{name} is not asked");
            local_socket::receive(&client, &mut [0; 256])?;
            asked.push((name, client));
        }
        for (name, client) in asked {
            let status = json!({
                "name": name, "state": "up", "standing": true, "backend": null, "namespace": null, "keeper": 1,
                "leases": 0, "living": null,
            });
            let answer = memory_file::seal(status.to_string().as_bytes())?;
            local_socket::send(&client, br#""Done""#, Some(answer.as_fd()))?;
        }
        let listed: Value = serde_json::from_slice(&list.join().expect("a thread")?.stdout)?;
        let states: Vec<_> = (0..2).map(|number| (&listed[number]["name"], &listed[number]["state"])).collect();
        ensure!(states == [(&json!("first"), &json!("up")), (&json!("second"), &json!("up"))], "{listed}");
        Ok(())
    });
}
