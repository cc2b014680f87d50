//! The verifier's verdict on every program, with every setting: a panic that stays reachable, or a bound that it cannot
//! follow, makes loading fail.

use aya::{
    EbpfLoader,
    programs::{ProgramInfo, SchedClassifier},
};
use proxy_agent::kernel::programs::{CLASSIFIERS, CONTINUATIONS, OBJECT, PROGRAMS, load};

/// Instructions that the verifier may walk for one program. Kernels give up at a million; what comes near it on a new
/// kernel fails on an old one, which prunes less.
const MAX_VERIFIED: u32 = 30_000;

/// The same for a program of the packet path, which reads headers of every shape.
const MAX_VERIFIED_PACKET: u32 = 400_000;

#[test]
fn every_program_loads_with_every_setting() {
    for host_netns in [0u64, 4250] {
        for set_retval in [0u32, 1] {
            let mut loader = EbpfLoader::new();
            loader.btf(None).override_global("HOST_NETNS", &host_netns, true).override_global(
                "SET_RETVAL",
                &set_retval,
                true,
            );
            let mut ebpf = loader.load(OBJECT).unwrap_or_else(|error| panic!("needs root: {error:?}"));
            let check = |name: &str, info: ProgramInfo, max: u32| {
                let verified = info.verified_instruction_count().unwrap();
                println!("{name} (node {host_netns}, set_retval {set_retval}): {verified} instructions");
                assert!(verified < max, "{name}: {verified}");
            };
            for name in PROGRAMS {
                let program = ebpf.program_mut(name).unwrap();
                load(program, name).unwrap_or_else(|error| panic!("{name}: {error:?}"));
                check(name, program.info().unwrap(), MAX_VERIFIED);
            }
            for name in CLASSIFIERS.into_iter().chain(CONTINUATIONS.map(|(name, _)| name)) {
                let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
                program.load().unwrap_or_else(|error| panic!("{name}: {error:?}"));
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
    let mut known = [&PROGRAMS[..], &CLASSIFIERS, &CONTINUATIONS.map(|(name, _)| name)].concat();
    known.sort_unstable();
    assert_eq!(names, known);
}
