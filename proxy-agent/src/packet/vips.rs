//! `VIPS` and `CLUSTER_IPS`: which addresses packets are looked at for.
//!
//! A VIP's place in the filter is set before its frontend is written, and cleared when neither a frontend nor a connection
//! needs it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use proxy_common::abi::Address;
use proxy_common::abi::packet::{VIP_BYTES, VIP_PLACES, vip_place};

use super::counted::Counted;
use super::flows::Report;
use crate::kernel::mapping::Mapping;
use crate::kernel::programs::open_pinned;
use crate::kernel::table::Table;
use crate::kernel::{self, Pins};
use crate::model::Model;
use crate::object::ObjectKey;

/// See the module.
pub(super) struct Vips {
    vips: Mapping<[u8; VIP_BYTES]>,
    vips_wanted: Counted<usize>,
    /// Places that no frontend has any more. Connections may (Z8, C7): they are cleared after a walk that began later and
    /// found none. True: a walk has begun later.
    lingering: BTreeMap<usize, bool>,
    cluster_ips: Table<Address, u32>,
    cluster_ips_wanted: Counted<IpAddr>,
    cluster_ips_written: HashSet<IpAddr>,
    /// Those that may be written otherwise than wanted.
    unsure: BTreeSet<IpAddr>,
    own: BTreeSet<IpAddr>,
    /// P14.
    excluded: BTreeSet<IpAddr>,
    /// Why the last writing of cluster IPs was not all that was wanted.
    pub(super) failure: Option<String>,
}

impl Vips {
    /// Opens what is pinned, and reads what is written.
    pub(super) fn open(pins: &Pins) -> Result<Self, kernel::Error> {
        let vips = open_pinned(&pins.state(), "VIPS")?;
        let state = pins.state();
        let mapping = Mapping::new(vips.fd(), 1, true);
        let cluster_ips: Table<Address, u32> = Table::open(&pins.state(), "CLUSTER_IPS")?;
        let written =
            cluster_ips.entries().map_err(kernel::Error::path("read", state.join("CLUSTER_IPS")))?;
        Ok(Self {
            vips: mapping.map_err(kernel::Error::path("map into memory", state.join("VIPS")))?,
            vips_wanted: Counted::default(),
            lingering: BTreeMap::new(),
            cluster_ips,
            cluster_ips_wanted: Counted::default(),
            cluster_ips_written: written.into_iter().map(|(address, _)| address.ip()).collect(),
            unsure: BTreeSet::new(),
            own: BTreeSet::new(),
            excluded: BTreeSet::new(),
            failure: None,
        })
    }

    /// Z6: an address bound on this node is its processes'.
    pub(super) fn set_node(&mut self, model: &Model) {
        let own = &model.context().own_addresses;
        let excluded: BTreeSet<IpAddr> =
            model.context().policy.excluded_frontends.iter().map(|excluded| excluded.address).collect();
        self.unsure.extend(self.own.symmetric_difference(own));
        self.unsure.extend(self.excluded.symmetric_difference(&excluded));
        self.own.clone_from(own);
        self.excluded = excluded;
    }

    /// A Service is about to be programmed: its VIPs have their places before. Returns the number of writes.
    pub(super) fn announce(
        &mut self,
        key: &ObjectKey,
        mut vips: BTreeSet<IpAddr>,
        cluster_ips: BTreeSet<IpAddr>,
    ) -> usize {
        let mut writes = 0;
        vips.extend(&cluster_ips);
        self.unsure.extend(self.cluster_ips_wanted.take(key, cluster_ips));
        let places = vips.into_iter().map(|vip| vip_place(&vip.into())).collect();
        for place in self.vips_wanted.take(key, places) {
            self.lingering.remove(&place);
            writes += usize::from(self.vips.set_vip(place, true));
        }
        writes
    }

    /// Services are programmed; with `full`, they are all that there are. Returns the number of writes.
    pub(super) fn settle<'a>(
        &mut self,
        services: impl IntoIterator<Item = &'a ObjectKey>,
        full: bool,
    ) -> usize {
        for key in services {
            self.unsure.extend(self.cluster_ips_wanted.give_back(key));
            self.lingering.extend(self.vips_wanted.give_back(key).into_iter().map(|place| (place, false)));
        }
        if full {
            // Q2: of Services that went while no agent ran.
            let left = (0..VIP_PLACES).filter(|place| self.vips.has_vip(*place));
            let left = left.filter(|place| !self.vips_wanted.has(place));
            let left: Vec<usize> = left.filter(|place| !self.lingering.contains_key(place)).collect();
            self.lingering.extend(left.into_iter().map(|place| (place, false)));
            self.unsure.extend(self.cluster_ips_written.iter().copied());
        }
        self.write_cluster_ips()
    }

    /// Writes what may be otherwise than wanted. Returns the number of writes.
    pub(super) fn write_cluster_ips(&mut self) -> usize {
        let wanted = |address: &IpAddr| {
            self.cluster_ips_wanted.has(address)
                && !self.own.contains(address)
                && !self.excluded.contains(address)
        };
        let (here, gone): (BTreeSet<IpAddr>, BTreeSet<IpAddr>) =
            std::mem::take(&mut self.unsure).into_iter().partition(wanted);
        let new = here.iter().filter(|address| !self.cluster_ips_written.contains(address));
        let new: Vec<(Address, u32)> = new.map(|address| (Address::from(*address), 1)).collect();
        let failures: BTreeMap<usize, _> = self.cluster_ips.put_all(&new).into_iter().collect();
        let mut writes = 0;
        self.failure = None;
        for (at, (address, _)) in new.iter().enumerate() {
            if let Some(error) = failures.get(&at) {
                self.unsure.insert(address.ip());
                self.failure = Some(error.to_string());
            } else {
                self.cluster_ips_written.insert(address.ip());
                writes += 1;
            }
        }
        for address in gone {
            if !self.cluster_ips_written.contains(&address) {
                continue;
            }
            match self.cluster_ips.remove(&address.into()) {
                Ok(()) => {
                    self.cluster_ips_written.remove(&address);
                    writes += 1;
                }
                Err(error) => {
                    self.unsure.insert(address);
                    self.failure = Some(error.to_string());
                }
            }
        }
        writes
    }

    /// Clears places that neither a frontend nor a connection needs. Returns the number of writes.
    pub(super) fn clear_unused(&mut self, report: &Report) -> usize {
        let mut writes = 0;
        let ripe = |(place, ripe): (&usize, &bool)| (*ripe && !report.is_in_use(*place)).then_some(*place);
        let unused: Vec<usize> = self.lingering.iter().filter_map(ripe).collect();
        for place in unused {
            self.lingering.remove(&place);
            writes += usize::from(self.vips.set_vip(place, false));
        }
        self.lingering.values_mut().for_each(|ripe| *ripe = true);
        writes
    }
}
