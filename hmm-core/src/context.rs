//! The composition root: which engine runs, and the mm of this process.

use crate::addr::PAGE_SIZE;
use crate::engine::Engine;
use crate::engine::mixed::MixedEngine;
use crate::engine::signal::SignalEngine;
use crate::engine::uffd::UffdEngine;
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::mm::Mm;
use std::sync::Arc;

/// An engine for the memory of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// Userfaultfd that serves the kernel's own accesses, too: complete, and needs a privilege.
    Uffd,
    /// Userfaultfd whose faults the toucher answers itself; system calls on absent pages fail with `EFAULT`.
    UffdInline,
    /// Protections and SIGSEGV: works everywhere. System calls as above, and changes of the layout are not reported.
    Signal,
}

impl EngineKind {
    /// From the best to the last resort.
    pub const ALL: [Self; 3] = [Self::Uffd, Self::UffdInline, Self::Signal];

    /// As `HMM_ENGINE` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uffd => "uffd",
            Self::UffdInline => "uffd-inline",
            Self::Signal => "signal",
        }
    }

    /// Opens it, for [`Mm::with_engine`].
    ///
    /// # Errors
    /// `Unsupported` with the reason, and what would help.
    pub fn open(self) -> Result<Arc<dyn Engine>> {
        check_page_size()?;
        Ok(match self {
            Self::Uffd => MixedEngine::open(UffdEngine::open()?),
            Self::UffdInline => MixedEngine::open(UffdEngine::open_inline()?),
            Self::Signal => Arc::new(SignalEngine::open()?),
        })
    }
}

/// Which engine was chosen, and why not a better one.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The engine.
    pub engine: EngineKind,
    /// Named by `HMM_ENGINE`, rather than chosen.
    pub forced: bool,
    /// Better engines, and why they do not work here.
    pub refused: Vec<(EngineKind, Error)>,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.forced { "HMM_ENGINE says so" } else { "the best that works here" };
        write!(f, "engine {} ({how})", self.engine.name())?;
        self.refused.iter().try_for_each(|(engine, why)| write!(f, "; {}: {why}", engine.name()))
    }
}

/// What `HMM_ENGINE` wishes: engines in the order in which they are tried, and whether that is a wish for one.
fn wished() -> Result<(Vec<EngineKind>, bool)> {
    let wish = std::env::var("HMM_ENGINE").unwrap_or_else(|_| "auto".to_owned());
    if wish == "auto" {
        return Ok((EngineKind::ALL.to_vec(), false));
    }
    if let Some(kind) = EngineKind::ALL.into_iter().find(|kind| kind.name() == wish) {
        return Ok((vec![kind], true));
    }
    let what = if wish == "model" {
        "HMM_ENGINE=model: the model engine simulates memory of its own and cannot manage this process; open it with \
         Mm::with_engine"
            .into()
    } else {
        format!("HMM_ENGINE={wish}: unknown engine; use auto, uffd, uffd-inline or signal")
    };
    Err(Error::Unsupported { what })
}

/// Whether changes of the layout are announced (`HMM_LAYOUT`). Unasked, only to an engine that nobody tells of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LayoutWish {
    AsFits,
    Observed,
    Ordered,
}

fn wished_layout() -> Result<LayoutWish> {
    let what = match std::env::var("HMM_LAYOUT").as_deref() {
        Err(_) | Ok("") => return Ok(LayoutWish::AsFits),
        Ok("observed") => return Ok(LayoutWish::Observed),
        Ok("ordered") if crate::preload::layout::is_loaded() => return Ok(LayoutWish::Ordered),
        Ok("ordered") => "HMM_LAYOUT=ordered needs libhmm_preload.so: start the program with \
                          LD_PRELOAD=libhmm_preload.so (of this version), or leave HMM_LAYOUT out"
            .into(),
        Ok(other) => format!("HMM_LAYOUT={other}: unknown; use observed or ordered"),
    };
    Err(Error::Unsupported { what })
}

fn check_page_size() -> Result<()> {
    match rustix::param::page_size() {
        PAGE_SIZE => Ok(()),
        size => Err(Error::Unsupported {
            what: format!("this kernel's pages have {size} bytes; the library knows {PAGE_SIZE}"),
        }),
    }
}

/// Under Valgrind, registers are wrong after a signal handler unless it is told to keep them: nobody gets that unasked.
fn may_choose(kind: EngineKind, forced: bool) -> Result<()> {
    if kind == EngineKind::Signal && !forced && crate::engine::under_valgrind() {
        let what = "under Valgrind use the model engine (Mm::with_engine), or HMM_ENGINE=signal together with Valgrind's \
                    option --px-default=allregs-at-mem-access"
            .into();
        return Err(Error::Unsupported { what });
    }
    Ok(())
}

/// Opens the best engine that works here, or the one that `HMM_ENGINE` names.
///
/// # Errors
/// `Unsupported` with the reasons when none works.
pub fn open_engine() -> Result<(Arc<dyn Engine>, Choice)> {
    let (kinds, forced) = wished()?;
    let mut refused = Vec::new();
    for kind in kinds {
        match may_choose(kind, forced).and_then(|()| kind.open()) {
            Ok(engine) => return Ok((engine, Choice { engine: kind, forced, refused })),
            Err(why) => refused.push((kind, why)),
        }
    }
    let reasons: Vec<_> =
        refused.iter().map(|(kind, why)| format!("{}: {why}", kind.name())).collect();
    Err(Error::Unsupported { what: format!("no engine works here: {}", reasons.join("; ")) })
}

/// One line about the choice, for who asked with `HMM_LOG=info`.
fn tell(choice: &Choice, is_ordered: bool) {
    if std::env::var("HMM_LOG").is_ok_and(|level| level == "info") {
        let layout = if is_ordered { "; the program announces changes of its layout" } else { "" };
        eprintln!("libhmm: {choice}{layout}");
    }
}

impl Mm {
    /// The address space of this process, opened on first use. Everyone gets the same one while it is open.
    ///
    /// # Errors
    /// `Unsupported` with the reason when no engine works here, or `HMM_ENGINE` or `HMM_LAYOUT` asks for what cannot be
    /// had.
    pub fn current() -> Result<Arc<Self>> {
        let mut current = Self::lock_current();
        if let Some(mm) = current.as_ref().filter(|mm| mm.check_not_closing().is_ok()) {
            return Ok(Arc::clone(mm));
        }
        crate::fork::install();
        let layout = wished_layout()?;
        let (engine, choice) = open_engine()?;
        let mm = Self::with_engine(engine)?;
        // Only now: an mm that does not open is no test of one that runs.
        crate::inject::configure_from_environment()?;
        let is_told = mm.capabilities().contains(Capabilities::EVENTS);
        let is_ordered = layout == LayoutWish::Ordered || layout == LayoutWish::AsFits && !is_told;
        let is_ordered = is_ordered && crate::preload::layout::attach(&mm);
        if layout == LayoutWish::Ordered && !is_ordered {
            mm.close()?;
            return Err(Error::NoMemory { what: "hooks for libhmm_preload.so" });
        }
        tell(&choice, is_ordered);
        if !mm.serves_kernel() {
            crate::preload::attach(&mm, Some(crate::engine::program_action));
        }
        if let Some(old) = current.replace(Arc::clone(&mm))
            && old.is_inherited()
        {
            // Its threads are the parent's: nothing of it may be waited for, or taken down, here.
            let _ = Arc::into_raw(old);
        }
        Ok(mm)
    }

    /// Whether system calls on absent pages wait for them, as accesses do.
    pub fn serves_kernel(&self) -> bool {
        self.capabilities().contains(Capabilities::KERNEL_FAULTS)
    }
}
