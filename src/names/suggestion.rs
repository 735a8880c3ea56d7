//! Suggestions for misspelled names: keys, commands, tunnels and profiles.

/// The maximum length in bytes of a name for which a suggestion is searched. The distance takes quadratic time.
const MAX_LENGTH: usize = 64;

/// Returns the candidate that `name` most likely is a misspelling of. At most a third of a candidate's characters (and
/// at least one) may differ; letter case is ignored.
pub fn closest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if name.len() > MAX_LENGTH {
        return None;
    }
    let name = name.to_ascii_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&name, &candidate.to_ascii_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.chars().count() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closest_tolerates_a_few_wrong_letters() {
        let keys = ["PrivateKey", "PublicKey", "MTU", "DNS"];
        assert_eq!(closest("privatkey", keys), Some("PrivateKey"));
        assert_eq!(closest("PubilcKey", keys), Some("PublicKey"));
        assert_eq!(closest("mut", keys), Some("MTU"));
        assert_eq!(closest("Banana", keys), None);
        assert_eq!(closest(&"x".repeat(100_000), keys), None);
    }
}
