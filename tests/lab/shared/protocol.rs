//! The protocol between a test and the agent: an act a line on standard input, an answer a line on standard output.

/// Precedes each of the agent's answers, to tell them from the output of a launcher.
pub const ANSWER: &str = "agent: ";

/// The first answer, which says that the agent runs.
pub const BEGUN: &str = "begun";

/// Precedes an act that must succeed. The agent waits longer for the packets that such an act needs.
pub const PATIENTLY: &str = "patiently";

/// Precedes the report of a task, which is one line of JSON.
pub const REPORT: &str = "report: ";
