//! A pod with a tunnel in its own namespace (`vpn-exec attach`), seen from the application's container. The host that
//! the judge watches is the pod's: all of the pod's packets pass its interface `pod0`.

use std::slice::from_mut;

use lab::agent::Agent;
use lab::stamp::Protection;
use lab::{Peer, Pod};

use crate::judge::Judge;
use crate::stages::judged;
use crate::vectors::Vector;

/// Returns whether a vector applies to a container. Its files are the image's, and it inherits no descriptors.
fn applies(vector: &Vector) -> bool {
    use Protection::{Library, Namespace, Privileges, Rules};

    matches!(vector.protection, Namespace | Rules | Library | Privileges)
}

/// Returns whether a vector leaves a pod without a tunnel. The host's loopback addresses and abstract sockets are not in
/// reach of another network namespace.
fn leaves_a_pod(vector: &Vector) -> bool {
    applies(vector) && !vector.name.ends_with("-stub") && vector.name != "abstract"
}

/// The twin of all stages: a privileged container in a pod without a tunnel.
#[test]
fn the_judge_sees_every_vector_of_a_pod_without_a_tunnel() {
    lab::test(Peer::Ours, |lab| {
        lab.join_private_lan()?;
        let judge = Judge::of_network(lab)?;
        let pod = Pod::start(lab)?;
        let mut agent = Agent::start(&mut pod.container("+all", ["env"]))?.begun()?;
        judged(from_mut(&mut agent), &judge, "pod", leaves_a_pod)?.expect_leaks(leaves_a_pod)?;
        agent.finish()?;
        Ok(())
    });
}
