//! What turns the entrances that there are into those that there shall be.

use super::Entrance;
use crate::config::is_one_place;

/// What is to be done to the entrances of a relay. What stays is in none of this, and is not touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// What is not to be there any more.
    pub close: Vec<Entrance>,
    /// What is to lead elsewhere, and how: the same socket listens.
    pub turn: Vec<(Entrance, Entrance)>,
    /// What is new, and can be taken while all that is closed is still there.
    pub open: Vec<Entrance>,
    /// What is new, and can be taken only once what is closed has been let go of.
    pub open_after: Vec<Entrance>,
}

impl Change {
    /// From one to the other.
    pub fn between(is: &[Entrance], shall: &[Entrance]) -> Self {
        let mut gone: Vec<&Entrance> = is.iter().filter(|entrance| !shall.contains(entrance)).collect();
        let mut change = Self::default();
        let mut new = Vec::new();
        for entrance in shall.iter().filter(|entrance| !is.contains(entrance)) {
            match gone.iter().position(|former| former.is_at(entrance)) {
                Some(at) => change.turn.push((gone.remove(at).clone(), entrance.clone())),
                None => new.push(entrance),
            }
        }
        for entrance in new {
            let after = gone.iter().any(|former| former.is_in_the_way_of(entrance));
            if after { &mut change.open_after } else { &mut change.open }.push(entrance.clone());
        }
        change.close = gone.into_iter().cloned().collect();
        change
    }

    /// What is closed and in the way of what is new.
    pub fn in_the_way(&self) -> Vec<Entrance> {
        let is_in_the_way = |former: &&Entrance| self.open_after.iter().any(|new| former.is_in_the_way_of(new));
        self.close.iter().filter(is_in_the_way).cloned().collect()
    }
}

impl Entrance {
    /// Whether it is the same socket that listens at both.
    fn is_at(&self, other: &Self) -> bool {
        let place = |entrance: &Self| (entrance.address, entrance.only.clone(), entrance.port, entrance.protocol);
        place(self) == place(other)
    }

    /// Whether no two sockets can listen at both.
    fn is_in_the_way_of(&self, other: &Self) -> bool {
        (self.port, self.protocol) == (other.port, other.protocol) && is_one_place(self.address, other.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ports::parse_publish;

    fn entrances(list: &[&str]) -> Vec<Entrance> {
        list.iter().flat_map(|text| parse_publish(text).expect("ports")).map(|port| Entrance::from(&port)).collect()
    }

    #[test]
    fn what_stays_is_left_alone_and_the_rest_is_told_apart() {
        let is = entrances(&["1:1", "2:2", "3:3", "4:4/udp", "5:5"]);
        assert_eq!(Change::between(&is, &is), Change::default());
        let shall = entrances(&["1:1", "2:22", "127.0.0.1:3:3", "4:4", "6:6", "5:5,proxy-protocol=v2"]);
        let change = Change::between(&is, &shall);
        assert_eq!(change.close, entrances(&["3:3", "4:4/udp"]));
        let turned = [("2:2", "2:22"), ("5:5", "5:5,proxy-protocol=v2")];
        let turned = turned.map(|(from, to)| (entrances(&[from]).remove(0), entrances(&[to]).remove(0)));
        assert_eq!(change.turn, turned);
        assert_eq!(change.open, entrances(&["4:4", "6:6"]), "a port of another protocol is another");
        assert_eq!(change.open_after, entrances(&["127.0.0.1:3:3"]));
        assert_eq!(change.in_the_way(), entrances(&["3:3"]));
    }

    #[test]
    fn all_addresses_of_a_family_are_in_the_way_of_each() {
        for (is, shall, in_the_way) in [
            ("0.0.0.0:1:1", "127.0.0.1:1:1", true),
            ("127.0.0.1:1:1", "0.0.0.0:1:1", true),
            ("[::]:1:1", "[::1]:1:1", true),
            ("[::]:1:1", "127.0.0.1:1:1", false),
            ("0.0.0.0:1:1", "[::]:1:1", false),
            ("127.0.0.1:1:1", "127.0.0.2:1:1", false),
        ] {
            let change = Change::between(&entrances(&[is]), &entrances(&[shall]));
            assert_eq!(!change.open_after.is_empty(), in_the_way, "from {is} to {shall}");
            assert_eq!(change.in_the_way() == entrances(&[is]), in_the_way, "from {is} to {shall}");
        }
    }
}
