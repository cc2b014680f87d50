//! Brings the programs of Kubernetes that the cluster suites run against.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use sheave_tests::kubernetes::programs::{self, PROGRAMS, Program, VERSION, is_program};

use crate::{
    setup::{can_install, install},
    shell::{is_on_path, output, root, run, seconds},
};

/// The Go that the module needs, brought by an older one if need be.
const GO: &str = "1.26.8";

/// Since this version Go brings the version that a module names by itself.
const GO_BRINGS_ITSELF: (u32, u32) = (1, 21);

/// Builds what nobody has. Each program is whole before it has its name, so an interrupted build costs one program.
pub(crate) fn programs() -> Result<()> {
    let found = PROGRAMS.iter().map(Program::find).collect::<Result<Vec<_>>>()?;
    if found.iter().all(|found| found.path.is_some()) {
        return Ok(());
    }
    for (path, said) in found.iter().flat_map(|found| &found.rejected) {
        println!("{} is not of Kubernetes {VERSION} and is left alone: it says {said:?}", path.display());
    }
    let cache = programs::cache()?;
    let bin = cache.join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("making {}", bin.display()))?;
    let path = cache.join("lock");
    let lock = fs::File::create(&path).with_context(|| format!("making {}", path.display()))?;
    // Another setup may be at it: two would only take each other's processors. The lock goes with its process.
    lock.lock().with_context(|| format!("locking {}", path.display()))?;
    let mut missing = Vec::new();
    for program in PROGRAMS {
        if program.find()?.path.is_none() {
            missing.push(program);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let go = go()?;
    println!(
        "building Kubernetes {VERSION}, once for this user: ten minutes on two processors for all of it, and 3 GB in Go's \
         build cache"
    );
    for (index, program) in missing.iter().enumerate() {
        println!("{} ({} of {})", program.name, index + 1, missing.len());
        let started = Instant::now();
        build(&go, program, &bin)?;
        println!("{}: done after {}", program.name, seconds(started.elapsed()));
    }
    Ok(())
}

fn build(go: &Go, program: &Program, bin: &Path) -> Result<()> {
    // We hold the lock, so what a killed build left under this name is nobody's.
    let unfinished = bin.join(format!(".{}.unfinished", program.name));
    let version = format!("-s -w -X k8s.io/component-base/version.gitVersion=v{VERSION}");
    let mut build = go.command();
    build
        .arg("build")
        .args(["-trimpath", "-ldflags", &version, "-o"])
        .arg(&unfinished)
        .arg(program.package)
        .current_dir(programs::go_module(&root()?)?)
        // A static program that needs no C compiler; and nothing of the user's that builds it otherwise.
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-mod=readonly -buildvcs=false")
        .env("GOWORK", "off");
    run(&mut build)?;
    if !is_program(&unfinished) {
        bail!("`go build` did not make {}", unfinished.display());
    }
    let path = bin.join(program.name);
    fs::rename(&unfinished, &path).with_context(|| format!("naming {}", path.display()))
}

/// A Go that can build the module.
#[derive(Debug)]
struct Go {
    program: PathBuf,
    /// Where it has its own files, if it cannot tell.
    root: Option<PathBuf>,
}

impl Go {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        match &self.root {
            Some(root) => command.env("GOROOT", root).env("GOTOOLCHAIN", "local"),
            None => command.env("GOTOOLCHAIN", "auto"),
        };
        command
    }
}

/// Finds Go, or installs what Debian has, which may be old: then that brings a newer one.
fn go() -> Result<Go> {
    if find_go().is_none() {
        if !can_install()? {
            bail!(
                "Kubernetes {VERSION} has to be built for the cluster tests, and there is no Go: install Go {GO} \
                 (as root on Debian or Ubuntu: apt-get install golang-go), or {}",
                without_go()
            );
        }
        install(&["golang-go"])?;
    }
    let program = find_go().context("golang-go is installed, but there is no `go`")?;
    let version = output(Command::new(&program).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local"))?;
    let version = String::from_utf8_lossy(&version).trim().to_owned();
    if minor(&version).with_context(|| format!("{} is of version {version:?}", program.display()))?
        >= GO_BRINGS_ITSELF
    {
        return Ok(Go { program, root: None });
    }
    newer_go(&program, &version)
}

fn find_go() -> Option<PathBuf> {
    if is_on_path("go") {
        return Some("go".into());
    }
    ["/usr/local/go/bin/go", "/usr/lib/go/bin/go"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| is_program(path))
}

/// `go1.26.8` to (1, 26).
fn minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.strip_prefix("go")?.split('.');
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

/// What makes Go unnecessary.
fn without_go() -> String {
    format!(
        "point KUBEBUILDER_ASSETS at a directory with {}",
        PROGRAMS.map(|program| program.name).join(", ")
    )
}

/// Go is published as a module too, which an old one can download and check like any other.
fn newer_go(old: &Path, version: &str) -> Result<Go> {
    println!("{version} is too old; it brings Go {GO}");
    let architecture = match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let toolchain = format!("golang.org/toolchain@v0.0.1-go{GO}.linux-{architecture}");
    // Why it fails is in what it says on its standard output.
    let mut download = Command::new(old);
    download
        .args(["mod", "download", "-json", &toolchain])
        // Outside any module; and files that can be made executable.
        .current_dir(env::temp_dir())
        .env("GOFLAGS", "-modcacherw");
    let said = download.stderr(Stdio::inherit()).output().context("running `go mod download`")?;
    let said: Value = serde_json::from_slice(&said.stdout)
        .with_context(|| format!("{} told to download Go {GO}: {}", old.display(), said.status))?;
    let text = |name: &str| said.get(name).and_then(Value::as_str);
    let Some(root) = text("Dir").map(PathBuf::from) else {
        let error = text("Error").unwrap_or("it does not say why");
        bail!(
            "Kubernetes {VERSION} has to be built for the cluster tests, {version} is too old for it, as Debian's \
             golang-go may be, and cannot download Go {GO}: {error}. Install Go {GO} or newer, or {}",
            without_go()
        );
    };
    // The download of a module makes no file executable.
    let tools = root.join(format!("pkg/tool/linux_{architecture}"));
    for directory in [root.join("bin"), tools] {
        let listing = || format!("listing {}", directory.display());
        for entry in fs::read_dir(&directory).with_context(listing)? {
            let path = entry.with_context(listing)?.path();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                .with_context(|| format!("making {} executable", path.display()))?;
        }
    }
    Ok(Go { program: root.join("bin/go"), root: Some(root) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_compare() {
        assert_eq!(minor("go1.26.8"), Some((1, 26)));
        assert_eq!(minor("go1.19"), Some((1, 19)));
        assert!(minor("go1.19.8") < Some(GO_BRINGS_ITSELF) && Some(GO_BRINGS_ITSELF) <= minor("go1.21.0"));
        assert_eq!(minor("devel"), None);
    }
}
