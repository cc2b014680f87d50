//! Where tools are kept that are built once for a user.

use std::{env, path::PathBuf};

use anyhow::{Context, Result};

/// The directory of Sheave's tools in the user's cache. `proxy-agent/build.rs` looks for its linker at the same place.
pub fn directory() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME")
        .filter(|path| path.is_absolute())
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME says where to keep tools")?;
    Ok(cache.join("sheave/tools"))
}
