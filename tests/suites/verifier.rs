//! The verifier's verdict on every program, with every setting: a panic that stays reachable, or a bound that it cannot
//! follow, makes loading fail.

use aya::{EbpfLoader, programs::ProgramInfo};
use proxy_agent::kernel::programs::{CLASSIFIERS, CONTINUATIONS, FAST_PATH, OBJECT, PROGRAMS, load};

/// Instructions that the verifier may walk for one program. Kernels give up at a million; what comes near it on a new
/// kernel fails on an old one, which prunes less.
const MAX_VERIFIED: u32 = 30_000;

/// The same for a program of the packet path, which reads headers of every shape.
const MAX_VERIFIED_PACKET: u32 = 400_000;

#[test]
fn every_program_loads_with_every_setting() {
    for host_netns in [0u64, 4250] {
        // By kernel: the old, and those that have more.
        for (has_more, fast_path) in [(0u32, 0u32), (1, 0), (1, 1)] {
            let mut loader = EbpfLoader::new();
            loader
                .btf(None)
                .override_global("HOST_NETNS", &host_netns, true)
                .override_global("SET_RETVAL", &has_more, true)
                .override_global("COARSE_CLOCK", &has_more, true)
                .override_global("FAST_PATH", &fast_path, true);
            let mut ebpf = loader.load(OBJECT).unwrap_or_else(|error| panic!("needs root: {error:?}"));
            let check = |name: &str, info: ProgramInfo, max: u32| {
                let verified = info.verified_instruction_count().unwrap();
                println!(
                    "{name} (node {host_netns}, SET_RETVAL and COARSE_CLOCK {has_more}, fast path {fast_path}): {verified} instructions"
                );
                assert!(verified < max, "{name}: {verified}");
            };
            for name in PROGRAMS {
                let program = ebpf.program_mut(name).unwrap();
                load(program, name).unwrap_or_else(|error| panic!("{name}: {error:?}"));
                check(name, program.info().unwrap(), MAX_VERIFIED);
            }
            let continuations = CONTINUATIONS.into_iter().chain(FAST_PATH).map(|(name, _)| name);
            for name in CLASSIFIERS.into_iter().chain(continuations) {
                let program = ebpf.program_mut(name).unwrap();
                load(program, name).unwrap_or_else(|error| panic!("{name}: {error:?}"));
                check(name, program.info().unwrap(), MAX_VERIFIED_PACKET);
            }
        }
    }
}

#[test]
fn the_object_has_no_other_programs() {
    let ebpf =
        EbpfLoader::new().btf(None).load(OBJECT).unwrap_or_else(|error| panic!("needs root: {error:?}"));
    let mut names: Vec<&str> = ebpf.programs().map(|(name, _)| name).collect();
    names.sort_unstable();
    let names_of = |continuations: [(&'static str, u32); 2]| continuations.map(|(name, _)| name);
    let mut known = [&PROGRAMS[..], &CLASSIFIERS, &names_of(CONTINUATIONS), &names_of(FAST_PATH)].concat();
    known.sort_unstable();
    assert_eq!(names, known);
}
