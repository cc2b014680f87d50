//! The agent's one loop: changes in, writes out, questions answered.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proxy_common::abi::{Backend, BackendId, FrontendKey, ServiceId};
use proxy_common::decide::Peer;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio::sync::watch;

use crate::claims::FrontendId;
use crate::control::{Question, Reply, Request};
use crate::dataplane::bpf::Kernel;
use crate::dataplane::{Dataplane, Limits};
use crate::kernel::{self, Claim, Loaded, Pins, Settings, devices, programs};
use crate::model::{Model, OwnAddresses};
use crate::object::{Batch, ObjectKey};
use crate::packet::{self, PacketPath, flows};
use crate::reconcile::{self, REST_MS, Reconciler, Report, WantedPort, WantedService};
use crate::resolve::{Policy, Resolved};
use crate::served::served;
use crate::sockets::Closer;
use crate::source::links::Link;
use crate::status::Status;
use crate::told::{News, Told};
use crate::view;
use crate::wanted::Wanted;

/// First wait before failed Services are tried again; doubled up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
/// As kube-proxy's sync period (Q3).
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Threads that were told of a full sync are done with it by then.
const TRIM_AFTER: Duration = Duration::from_secs(1);

/// What the agent must know before it starts.
#[derive(Clone, Debug)]
pub struct Config {
    /// Own node name (O4).
    pub node_name: String,
    /// Options that change what is programmed.
    pub policy: Policy,
    /// The programs serve processes in this cgroup and below.
    pub cgroup: PathBuf,
    /// Where to pin.
    pub pins: Pins,
    /// Sizes of the tables, unless tables are pinned already.
    pub limits: Limits,
    /// How packets are served, unless the policy says that they are not.
    pub packets: packet::Options,
}

/// See the module.
pub struct Agent {
    config: Config,
    /// Nobody else writes.
    _claim: Claim,
    model: Model,
    wanted: Wanted,
    reconciler: Reconciler,
    kernel: Kernel,
    loaded: Loaded,
    packets: Option<PacketPath>,
    closer: Closer,
    /// Which tables `kernel` and `loaded` are of.
    generation: u32,
    settings: Settings,
    started: Instant,
    /// Services whose last programming failed.
    failed: BTreeMap<ObjectKey, String>,
    retry: Option<(Instant, Duration)>,
    /// When leftovers are looked at next. A moment, not a wait: events that come more often must not put it off for ever.
    rest_at: Option<Instant>,
    /// When memory that was needed to program everything goes back to the machine.
    trim_at: Option<Instant>,
    told: Told,
    status: Status,
}

impl Agent {
    /// Loads the programs on what a former run left pinned, or makes new tables; the pin directory is prepared and claimed.
    /// Writes nothing and attaches nothing yet (Q1).
    ///
    /// # Errors
    /// If the kernel refuses something.
    pub fn start(config: Config, claim: Claim) -> Result<Self, kernel::Error> {
        let newest = config.pins.newest()?;
        let generation = newest.unwrap_or(0);
        let tables = config.pins.tables(generation);
        let settings = Settings::of_this_host(
            !config.policy.no_packet_path,
            config.packets.fast_path,
            config.packets.flow_limits,
        )?;
        if !settings.set_retval {
            tracing::warn!(
                "this kernel cannot refuse a connection with ECONNREFUSED (needs 5.18): left to the packet path"
            );
        }
        let mut loaded = Loaded::prepare(&config.pins, &tables, config.limits, settings)?;
        // Where no former run left anything in use, the first lists tell how large the tables must be: on others, programs would
        // have to be loaded again.
        if newest.is_some() || !programs::links(&config.pins).is_empty() {
            loaded.load()?;
        }
        let kernel = Kernel::of(&tables, &config.pins)?;
        let reconciler =
            Reconciler::adopt(&kernel).map_err(kernel::Error::path("read the frontends in", &tables))?;
        let packets = if config.policy.no_packet_path {
            None
        } else {
            Some(PacketPath::open(&config.pins, config.packets)?)
        };
        let closer = Closer::start(&config.pins)?;
        let model = Model::new(config.node_name.clone(), config.policy.clone(), OwnAddresses::Reported);
        Ok(Self {
            status: Status::new(&config, reconciler.adopted_frontends()),
            config,
            _claim: claim,
            model,
            wanted: Wanted::default(),
            reconciler,
            kernel,
            loaded,
            packets,
            closer,
            generation,
            settings,
            started: Instant::now(),
            failed: BTreeMap::new(),
            retry: None,
            rest_at: None,
            trim_at: None,
            told: Told::default(),
        })
    }

    /// Runs until the sources or the process end. What is in the kernel stays (Q8).
    ///
    /// # Errors
    /// If the programs cannot be attached after the first sync.
    pub async fn run(
        mut self,
        mut changes: UnboundedReceiver<Batch>,
        mut questions: Receiver<Question>,
        mut links: watch::Receiver<Option<Vec<Link>>>,
        stop: impl Future<Output = ()>,
    ) -> Result<(), kernel::Error> {
        tokio::pin!(stop);
        loop {
            let wake = self.wake();
            tokio::select! {
                () = &mut stop => return Ok(()),
                batch = changes.recv() => {
                    let Some(batch) = batch else { return Ok(()) };
                    self.take(batch);
                    // Changes that gathered while the last sync ran go together.
                    while let Ok(batch) = changes.try_recv() {
                        self.take(batch);
                    }
                    self.sync()?;
                }
                Some(question) = questions.recv() => self.answer(question),
                Ok(()) = links.changed() => {
                    let known = links.borrow_and_update().clone();
                    if let (Some(packets), Some(known)) = (&mut self.packets, known) {
                        packets.set_links(known);
                        self.sync()?;
                    }
                }
                report = next_report(&mut self.packets) => self.take_report(&report),
                () = tokio::time::sleep(wake), if wake < Duration::MAX => self.tick()?,
            }
        }
    }

    fn take(&mut self, batch: Batch) {
        for change in batch {
            self.told.change(&change).iter().for_each(News::log);
            self.model.apply(change);
        }
    }

    /// Time until something must be done without any event.
    fn wake(&mut self) -> Duration {
        let now = Instant::now();
        if self.reconciler.has_leftovers() {
            self.rest_at.get_or_insert(now + Duration::from_millis(REST_MS));
        } else {
            self.rest_at = None;
        }
        let retry = self.retry.map(|(at, _)| at);
        let packets = self.packets.as_ref().and_then(PacketPath::retry);
        let next = retry.into_iter().chain(self.rest_at).chain(self.trim_at).chain(packets).min();
        next.map_or(Duration::MAX, |at| at.saturating_duration_since(now))
    }

    fn tick(&mut self) -> Result<(), kernel::Error> {
        let now_ms = self.now_ms();
        if self.rest_at.is_some_and(|at| at <= Instant::now()) {
            self.rest_at = None;
            self.status.writes += self.reconciler.rest(&mut self.kernel, now_ms);
        }
        if self.trim_at.is_some_and(|at| at <= Instant::now()) {
            self.trim_at = None;
            // SAFETY: gives free pages of the allocator back; no reference leads to them.
            unsafe { libc::malloc_trim(0) };
        }
        let packets = self.packets.as_ref().and_then(PacketPath::retry);
        if self.retry.map(|(at, _)| at).into_iter().chain(packets).any(|at| at <= Instant::now()) {
            self.sync()?;
        }
        Ok(())
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Brings the kernel up to date with the model, if every list is complete.
    fn sync(&mut self) -> Result<(), kernel::Error> {
        if !self.model.ready() || self.packets.as_ref().is_some_and(|packets| !packets.ready()) {
            return Ok(());
        }
        self.told.node(&self.config.node_name, self.model.node_problems()).iter().for_each(News::log);
        let begun = Instant::now();
        let mut packet_writes = self.packets.as_mut().map_or(0, |packets| packets.prepare(&self.model));
        let mut dirty = self.model.take_dirty();
        dirty.extend(self.failed.keys().cloned());
        let full = !self.status.synced || self.reconciler.needs_full_sync();
        if full {
            dirty.extend(self.model.services().cloned());
        }
        if dirty.is_empty() && !full {
            self.status.writes += packet_writes + self.hook();
            return Ok(());
        }
        let resolved = self.wanted.update(&self.model, &dirty);
        for (key, resolved) in &resolved {
            self.told.service(key, self.wanted.problems_of(key, resolved)).iter().for_each(News::log);
        }
        // One by one, so that not all are there in both forms.
        let wanted: Vec<WantedService> =
            resolved.into_iter().map(|(key, resolved)| self.wanted_service(key, &resolved)).collect();
        packet_writes += self.announce(&wanted);
        let mut report = self.reconcile(&wanted, full)?;
        self.finish(&wanted, &report);
        report.writes += packet_writes + self.settle(&wanted, full);
        let served = served(&wanted);
        if let Some(packets) = &self.packets {
            packets.served(&served);
        }
        self.closer.served(served);
        self.status.synced(report.writes, begun.elapsed(), self.reconciler.frontend_count());
        if full {
            self.trim_at = Some(Instant::now() + TRIM_AFTER);
        }
        if !self.status.synced {
            self.first_sync(&report)?;
        }
        self.status.writes += self.hook();
        Ok(())
    }

    /// Before the frontends of these Services are written.
    fn announce(&mut self, wanted: &[WantedService]) -> usize {
        let Some(packets) = &mut self.packets else { return 0 };
        let mut writes = 0;
        for service in wanted {
            let frontends = service.ports.iter().flat_map(|port| &port.frontends);
            let vips = frontends.map(|(key, _)| key.address().ip()).collect();
            writes += packets.announce(&service.key, vips, &self.model);
        }
        writes
    }

    /// After they were written.
    fn settle(&mut self, tried: &[WantedService], full: bool) -> usize {
        let moved = self.reconciler.take_moved();
        let Some(packets) = &mut self.packets else { return 0 };
        // C1: at start all are looked at, for what a former run did not come to do.
        if self.status.synced {
            packets.moved(moved);
        } else {
            packets.moved(self.reconciler.frontends());
        }
        let ports = tried.iter().flat_map(|service| &service.ports);
        let ids = ports.filter_map(|port| self.reconciler.service_id(&port.key));
        let owner = |key: &FrontendKey| self.reconciler.owner(key);
        packets.purge(ids, |id| serving(&self.kernel, id).next().is_some(), owner);
        let keys = tried.iter().map(|service| &service.key);
        packets.settle(keys.filter(|key| !self.failed.contains_key(key)), full)
    }

    /// Hooks follow the devices once the programs find complete tables; with the first ones flows change hands.
    fn hook(&mut self) -> usize {
        match &mut self.packets {
            Some(packets) if self.status.synced => {
                let (reconciler, kernel) = (&self.reconciler, &self.kernel);
                let known = |vip: &FrontendKey, backend: Peer| {
                    let service = reconciler.owner(vip)?;
                    Some((
                        service,
                        serving(kernel, service)
                            .find_map(|(id, found)| ((found.address, found.port) == backend).then_some(id))?,
                    ))
                };
                packets.hook(&self.loaded) + packets.take_over(&self.model, &known)
            }
            Some(_) | None => 0,
        }
    }

    fn take_report(&mut self, report: &flows::Report) {
        if let Some(packets) = self.packets.as_mut().filter(|_| self.status.synced) {
            self.status.writes += packets.take_report(report);
            self.status.writes += self.hook();
        }
    }

    fn wanted_service(&self, key: ObjectKey, resolved: &[Resolved]) -> WantedService {
        let port = |resolved| WantedPort::new(resolved, self.wanted.claims(), self.model.facts());
        WantedService { key, ports: resolved.iter().map(port).collect() }
    }

    /// Attaches the programs: the tables behind them are complete now, so whoever comes finds what is wanted. Sockets are
    /// served already while the verifier walks the programs for packets, which takes it several times as long.
    fn first_sync(&mut self, report: &Report) -> Result<(), kernel::Error> {
        self.loaded.load_for_sockets()?;
        let (made, updated) = self.loaded.attach(&self.config.cgroup)?;
        self.config.pins.remove_others(self.generation)?;
        if self.packets.is_none() {
            // A former run had them on.
            for device in devices::hooked(&self.config.pins)?.into_keys() {
                devices::unhook(&self.config.pins, device)?;
            }
        }
        self.status.synced = true;
        tracing::info!(
            services = self.model.services().count(),
            frontends = self.reconciler.frontend_count(),
            writes = report.writes,
            links_made = made,
            links_updated = updated,
            after_ms = self.now_ms(),
            failed = self.failed.len(),
            "synced"
        );
        let rest = self.loaded.load();
        if rest.is_err() {
            // Nobody will keep up what sockets are told.
            self.config.pins.detach()?;
        }
        rest
    }

    /// Writes what is wanted, on larger tables if it does not fit. With `full` the room that it needs is known before.
    fn reconcile(&mut self, wanted: &[WantedService], full: bool) -> Result<Report, kernel::Error> {
        if full {
            let limits = self.kernel.limits();
            let roomy = reconcile::roomy(limits, wanted);
            if roomy != limits {
                self.move_to(roomy)?;
            }
        }
        let mut writes = 0;
        loop {
            let now_ms = self.now_ms();
            let mut report = self.reconciler.sync(&mut self.kernel, wanted, full, now_ms);
            report.writes += writes;
            match report.larger(self.kernel.limits()) {
                Some(limits) if self.move_to(limits)? => writes = report.writes,
                Some(_) | None => return Ok(report),
            }
        }
    }

    /// Moves to tables of these sizes; `false` if they could not be made or filled, then the old ones stay in use and
    /// serve what fits.
    ///
    /// # Errors
    /// If the programs of the filled tables cannot all be attached: some hooks then use them and others do not, which
    /// only a start with one set of tables puts right.
    fn move_to(&mut self, limits: Limits) -> Result<bool, kernel::Error> {
        tracing::info!(?limits, "moving to larger tables");
        let generation = self.generation + 1;
        let (mut loaded, kernel) = match self.fill(generation, limits) {
            Ok(filled) => filled,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "no larger tables");
                if let Err(error) = self.config.pins.abandon(generation) {
                    tracing::warn!(error = &error as &dyn std::error::Error, "what was made of them stays");
                }
                return Ok(false);
            }
        };
        if self.status.synced {
            loaded.attach(&self.config.cgroup)?;
            if let Some(packets) = &mut self.packets {
                packets.switch(&loaded)?;
            }
        }
        (self.loaded, self.kernel, self.generation) = (loaded, kernel, generation);
        if self.status.synced {
            self.config.pins.remove_others(generation)?;
        }
        Ok(true)
    }

    /// New tables with all that is written in them, and programs that use them. Nothing uses those programs yet.
    fn fill(&mut self, generation: u32, limits: Limits) -> Result<(Loaded, Kernel), kernel::Error> {
        let pins = &self.config.pins;
        let tables = pins.begin(generation)?;
        let mut loaded = Loaded::prepare(pins, &tables, limits, self.settings)?;
        if self.loaded.is_loaded() {
            loaded.load()?;
        }
        let mut kernel = Kernel::of(&tables, pins)?;
        let filled = self.reconciler.copy_to(&mut kernel);
        filled.map_err(|failure| kernel::Error::path("fill", &tables)(failure.error))?;
        pins.complete(generation)?;
        self.reconciler.moved_to(kernel.limits());
        Ok((loaded, kernel))
    }

    /// Remembers what failed, says so once, and plans the next try.
    fn finish(&mut self, tried: &[WantedService], report: &Report) {
        let mut failed: BTreeMap<ObjectKey, String> = BTreeMap::new();
        for (port, error) in &report.failed {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            failed.entry(port.service.clone()).or_insert(text);
        }
        // What fails for the first time is not made to wait for what has failed for long.
        let news = failed.keys().any(|key| !self.failed.contains_key(key));
        for key in tried.iter().map(|service| &service.key) {
            match (self.failed.get(key), failed.get(key)) {
                (old, Some(new)) if old != Some(new) => {
                    tracing::error!(service = %key, error = %new, "not programmed; trying again");
                }
                (Some(_), None) => tracing::info!(service = %key, "programmed at last"),
                (_, _) => {}
            }
            self.failed.remove(key);
        }
        self.failed.append(&mut failed);
        self.retry = if self.failed.is_empty() && !self.reconciler.needs_full_sync() {
            None
        } else {
            let wait = self.retry.filter(|_| !news).map_or(RETRY_MIN, |(_, wait)| (wait * 2).min(RETRY_MAX));
            Some((Instant::now() + wait, wait))
        };
    }

    fn answer(&self, question: Question) {
        let reply = match question.request {
            Request::Status => {
                let problems = view::plan::problems(&self.model, &self.wanted);
                Reply::of(&self.status.view(&self.model, &self.failed, &problems, self.packets.as_ref()))
            }
            Request::Plan => Reply::rendered(&view::plan::plan_of(&self.model, &self.wanted), None),
            Request::Explain { from, to } => self.explain(from, &to),
            Request::Names => {
                let names = self.reconciler.names().map(|(id, key)| (id, key.to_string()));
                Reply::of(&names.collect::<BTreeMap<_, _>>())
            }
        };
        // Whoever asked may have gone.
        let _ = question.reply.send(reply);
    }

    fn explain(&self, from: std::net::IpAddr, to: &str) -> Reply {
        let to = match to.parse::<view::Destination>() {
            Ok(to) => to,
            Err(error) => return Reply::Error(error.to_string()),
        };
        match view::explain::explain_of(&self.model, &self.wanted, from, to) {
            Ok(explanation) => {
                let dialled = FrontendId { address: to.at.ip(), port: to.at.port(), protocol: to.protocol };
                let winner = self.wanted.claims().winner(&dialled);
                let service_id = winner.and_then(|key| self.reconciler.service_id(key));
                Reply::rendered(&explanation, service_id)
            }
            Err(error) => Reply::Error(error.to_string()),
        }
    }
}

async fn next_report(packets: &mut Option<PacketPath>) -> flows::Report {
    match packets {
        Some(packets) => packets.report().await,
        None => std::future::pending().await,
    }
}

/// Backends of a record that serve.
fn serving(kernel: &Kernel, service: ServiceId) -> impl Iterator<Item = (BackendId, Backend)> {
    let record = kernel.record(service);
    let sets = [record.cluster, record.local, record.draining].into_iter();
    let slots = sets.flat_map(|set| set.first()..set.first().saturating_add(set.count()));
    slots.filter_map(|slot| {
        let id = kernel.slot(slot);
        let backend = kernel.backend(id.index());
        (backend.is(id) && backend.is_serving()).then_some((id, backend))
    })
}
