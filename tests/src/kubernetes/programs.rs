//! The programs of one Kubernetes version, and where they are.
//!
//! Who has them uses them: in `KUBEBUILDER_ASSETS`, then on `PATH`. The rest is built once by `cargo xtask setup` from
//! `tests/kubernetes/go.mod` and kept in the user's cache, so that every checkout uses the same.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

/// The version; the one of `k8s.io/kubernetes` in `tests/kubernetes/go.mod`.
pub const VERSION: &str = "1.36.3";

/// One program of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its file's name.
    pub name: &'static str,
    /// The Go package that it is built from.
    pub package: &'static str,
    /// What makes it say its version.
    version: &'static [&'static str],
    /// What it says then of every version that will do: another minor version has other rules.
    says: &'static str,
}

/// The API server.
pub const API_SERVER: Program = Program {
    name: "kube-apiserver",
    package: "k8s.io/kubernetes/cmd/kube-apiserver",
    version: &["--version"],
    says: "Kubernetes v1.36.",
};

/// The controllers.
pub const CONTROLLER_MANAGER: Program = Program {
    name: "kube-controller-manager",
    package: "k8s.io/kubernetes/cmd/kube-controller-manager",
    version: &["--version"],
    says: "Kubernetes v1.36.",
};

/// The proxy that Sheave is compared with.
pub const KUBE_PROXY: Program = Program {
    name: "kube-proxy",
    package: "k8s.io/kubernetes/cmd/kube-proxy",
    version: &["--version"],
    says: "Kubernetes v1.36.",
};

/// The command line tool.
pub const KUBECTL: Program = Program {
    name: "kubectl",
    package: "k8s.io/kubernetes/cmd/kubectl",
    version: &["version", "--client"],
    says: "Client Version: v1.36.",
};

/// The store of the API server.
pub const ETCD: Program = Program {
    name: "etcd",
    package: "go.etcd.io/etcd/server/v3",
    version: &["--version"],
    says: "etcd Version: 3.",
};

/// All of them, the quickest to build first.
pub const PROGRAMS: [Program; 5] = [ETCD, KUBECTL, KUBE_PROXY, API_SERVER, CONTROLLER_MANAGER];

/// Where a program was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The program, if there is one that will do.
    pub path: Option<PathBuf>,
    /// Those that were found before it and will not do, with what they say of themselves.
    pub rejected: Vec<(PathBuf, String)>,
}

impl Program {
    /// Looks for the program. Those of the user are asked for their version; the one in the cache is known.
    pub fn find(&self) -> Result<Found> {
        let mut rejected = Vec::new();
        for candidate in users_directories().into_iter().map(|directory| directory.join(self.name)) {
            if !is_program(&candidate) {
                continue;
            }
            let said = self.asked_for_version(&candidate);
            if said.contains(self.says) {
                return Ok(Found { path: Some(candidate), rejected });
            }
            rejected.push((candidate, said.lines().next().unwrap_or_default().to_owned()));
        }
        let cached = self.cached()?;
        Ok(Found { path: is_program(&cached).then_some(cached), rejected })
    }

    /// The program, or what brings it.
    pub fn path(&self) -> Result<PathBuf> {
        let Some(path) = self.find()?.path else {
            bail!(
                "no {} of Kubernetes {VERSION} in KUBEBUILDER_ASSETS, on PATH or in {}: `cargo xtask setup` builds it",
                self.name,
                cache()?.display()
            );
        };
        Ok(path)
    }

    /// Where the cache has the program, or will have it.
    pub fn cached(&self) -> Result<PathBuf> {
        Ok(cache()?.join("bin").join(self.name))
    }

    fn asked_for_version(&self, program: &Path) -> String {
        match Command::new(program).args(self.version).output() {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => error.to_string(),
        }
    }
}

/// The directory of this version in the user's cache.
pub fn cache() -> Result<PathBuf> {
    Ok(crate::cache::directory()?.join(format!("kubernetes-{VERSION}")))
}

fn users_directories() -> Vec<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let assets = set("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let path = set("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>());
    assets.into_iter().chain(path.into_iter().flatten()).collect()
}

/// Whether there is a file that can be run.
#[must_use]
pub fn is_program(path: &Path) -> bool {
    fs::metadata(path)
        .is_ok_and(|file| file.is_file() && file.len() > 0 && file.permissions().mode() & 0o111 != 0)
}

/// The directory of the Go module that the programs are built from.
pub fn go_module(workspace: &Path) -> Result<PathBuf> {
    let module = workspace.join("tests/kubernetes");
    let file = module.join("go.mod");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    // The cache is named after the constant, what is in it is of the module.
    if !text.lines().any(|line| line.trim().starts_with(&format!("k8s.io/kubernetes v{VERSION}"))) {
        bail!("{} is not of Kubernetes {VERSION}", file.display());
    }
    Ok(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_is_of_the_version_and_has_every_program() {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let text = fs::read_to_string(go_module(workspace).unwrap().join("go.mod")).unwrap();
        let minor = VERSION.rsplit_once('.').unwrap().0;
        for program in PROGRAMS {
            assert!(text.lines().any(|line| line == format!("\t{}", program.package)), "{}", program.name);
            assert!(program == ETCD || program.says.ends_with(&format!("v{minor}.")), "{}", program.says);
        }
    }
}
