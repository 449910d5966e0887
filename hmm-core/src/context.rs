//! The composition root: which engine runs, and the mm of this process.

use crate::engine::Engine;
use crate::engine::uffd::UffdEngine;
use crate::error::{Error, Result};
use crate::mm::Mm;
use std::sync::Arc;

/// Chooses the engine: `HMM_ENGINE=auto|uffd` (the environment variable; `auto` when it is not set).
fn choose_engine() -> Result<Arc<dyn Engine>> {
    let wish = std::env::var("HMM_ENGINE").unwrap_or_else(|_| "auto".to_owned());
    match wish.as_str() {
        "auto" | "uffd" => Ok(Arc::new(UffdEngine::open()?)),
        "signal" => Err(Error::Unsupported {
            what: "HMM_ENGINE=signal: this version has no signal engine yet; unset HMM_ENGINE".into(),
        }),
        "model" => Err(Error::Unsupported {
            what: "HMM_ENGINE=model: the model engine simulates memory of its own and cannot manage this process; \
                   open it with Mm::with_engine"
                .into(),
        }),
        other => Err(Error::Unsupported {
            what: format!("HMM_ENGINE={other}: unknown engine; use auto or uffd"),
        }),
    }
}

impl Mm {
    /// The address space of this process, opened on first use. Everyone gets the same one while it is open.
    ///
    /// # Errors
    /// `Unsupported` with the reason when no engine works here.
    pub fn current() -> Result<Arc<Self>> {
        let mut current = Self::lock_current();
        if let Some(mm) = current.as_ref().filter(|mm| mm.check_not_closing().is_ok()) {
            return Ok(Arc::clone(mm));
        }
        crate::fork::install();
        let mm = Self::with_engine(choose_engine()?)?;
        if let Some(old) = current.replace(Arc::clone(&mm))
            && old.is_inherited()
        {
            // Its threads are the parent's: nothing of it may be waited for, or taken down, here.
            let _ = Arc::into_raw(old);
        }
        Ok(mm)
    }
}
