//! What figures shall be at most where the target is no ratio, and why targets are missed.

/// Which number of a figure.
#[derive(Clone, Copy, Debug)]
enum Measure {
    /// The median of its values.
    P50,
    /// Their 99th percentile.
    P99,
}

/// What a figure of Sheave's shall be at most, with no more than [`SERVICES`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    id: &'static str,
    /// What the figure's name ends with.
    name: &'static str,
    measure: Measure,
    /// In the figure's unit.
    at_most: f64,
    /// For people.
    pub(crate) text: &'static str,
}

const SERVICES: u32 = 10_000;

const LIMITS: [Limit; 12] = [
    limit("a1", "cold start: exec to every Service answering", Measure::P50, 400e6, "400 ms"),
    limit("a2", "one endpoint change: rename to visible", Measure::P50, 200e3, "p50 200 us"),
    limit("a2", "one endpoint change: rename to visible", Measure::P99, 1e6, "p99 1 ms"),
    limit("a3", "CPU time, with commands", Measure::P50, 400.0, "400 CPU-ms (4 % of a CPU)"),
    limit("a4", "agent: RSS", Measure::P50, 40e6, "40 MB"),
    limit("a5", "kernel memory of our maps", Measure::P50, 4e6, "4 MB"),
    limit("a6", "restart: failed", Measure::P50, 0.0, "0"),
    limit("a6", "restart: led elsewhere", Measure::P50, 0.0, "0"),
    limit("a6", "restart: held connections broken", Measure::P50, 0.0, "0"),
    limit("a6", "restart: exec to synced again", Measure::P50, 500e6, "500 ms"),
    limit("a7", "looks that saw the removed endpoint after the new one", Measure::P50, 0.0, "0"),
    limit("a9", "of the change", Measure::P50, 0.0, "0"),
];

const fn limit(
    id: &'static str,
    name: &'static str,
    measure: Measure,
    at_most: f64,
    text: &'static str,
) -> Limit {
    Limit { id, name, measure, at_most, text }
}

/// The limits of a figure, and whether its values keep to them.
pub(crate) fn of(
    id: &str,
    name: &str,
    services: u32,
    p50: f64,
    p99: f64,
) -> impl Iterator<Item = (&'static Limit, bool)> {
    let limits = LIMITS
        .iter()
        .filter(move |limit| limit.id == id && name.ends_with(limit.name) && services <= SERVICES);
    limits.map(move |limit| {
        let value = match limit.measure {
            Measure::P50 => p50,
            Measure::P99 => p99,
        };
        (limit, value <= limit.at_most)
    })
}

/// The same as text, for a table.
pub(crate) fn verdicts(targets: impl Iterator<Item = (&'static Limit, bool)>) -> String {
    let told: Vec<_> = targets
        .map(|(limit, met)| format!("{}: {}", limit.text, if met { "met" } else { "missed" }))
        .collect();
    told.join(", ")
}

/// Why targets of a metric are missed, or a peer is cheaper: what was found by measuring. By metric.
pub(crate) const REASONS: [(&str, &str); 13] = [
    (
        "p1",
        "A connect asks whether its address is a Service's. Over one Service that, choosing an endpoint and noting what was \
         dialled is our own work. Over many, the lines that it reads have rested: about what `two reads` pay more there than \
         with one Service. TCP pays for its packets besides (p2).",
    ),
    (
        "p2",
        "As p1, and each packet pays for the programs at the node's devices: `empty programs` pay the kernel's price of \
         that, whatever is in them, and p11 has what ours add.",
    ),
    ("p3", "Only packets, no connect: what `bystander` pays too, and for a part `empty programs`."),
    ("p4", "As p3."),
    (
        "p5",
        "A datagram asks for its Service, its flow, its backend and the way back when it is sent, and for both ways of the \
         flow when its answer is received, beside what p3 pays.",
    ),
    (
        "p8",
        "`empty programs` are what a packet pays for two hooks that do nothing. A known flow is looked up at both of them. A \
         new one is written to a table, with a replaced source to two, and before that asked for wherever it could be. With \
         connection tracking on, the same packets pay for that as well; kube-proxy has it always.",
    ),
    (
        "a1",
        "Of a start with 10,000 Services, half is reading objects, by both CPUs, and most of the rest deciding and writing, \
         by one; the kernel checks our programs meanwhile.",
    ),
    (
        "a2",
        "`A bare watcher` is woken by the same report of the kernel, reads as small a file and says so in memory: that much is \
         the machine's, at p99 as well. The rest is reading the objects, comparing and a few stores, by an agent that has been \
         at rest; of a thousand changes a second one costs it 40 us (a3).",
    ),
    ("a3", "Objects are decoded from JSON, and each change reads its whole slice."),
    ("a4", "A third is files, mostly the binary, and what the kernel maps into the process of our tables."),
    (
        "a5",
        "Tables of connections have all of their memory from the start, so that a packet never waits for any; that of \
         frontends has cache lines at most half of which are taken.",
    ),
    ("a6", "A start as in a1, beside clients that connect as fast as both CPUs let them."),
    (
        "a9",
        "CPU time is told in hundredths of a second, of which both have few. How soon a change is live depends on when each \
         asks the API server again.",
    ),
];
