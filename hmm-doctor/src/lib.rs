//! `hmm doctor`: which engine of libhmm works here, tried for real, and what would make a better one work.
//!
//! Every engine is opened in a process of its own and used as a program uses it: pages leave for a software device, are
//! touched, written, changed by the device, handed to a system call and unmapped. An engine that hangs or crashes is
//! thereby a line of the report. Nothing of the machine is changed.
//!
//! # The JSON object
//! `hmm doctor --json` prints one object. New keys may be added; `schema` changes when one goes or changes its meaning.
//! `null` means unknown, none, or unlimited, as the key says.
//!
//! | key | value |
//! | --- | --- |
//! | `engine` | the engine that programs get here: `"uffd"`, `"uffd-inline"`, `"signal"`; `null`: none |
//! | `reason` | why this one and no better one, or why none; one line for people |
//! | `works` | the engine was tried and does what it should; the exit status is 0 exactly then |
//! | `forced` | `HMM_ENGINE` asks for one engine |
//! | `schema` | 1 |
//! | `version` | of libhmm |
//! | `system` | `kernel`, `architecture`, `page_size`, `container` (hints, a list), `user_namespace`, `user_id`, `capabilities` (of `CAP_SYS_PTRACE` and `CAP_SYS_ADMIN`), `seccomp` (`off`, `strict`, `filter`, `unknown`), `no_new_privileges`, `dumpable` |
//! | `userfaultfd` | `device` (of `/dev/userfaultfd`: `opens`, `error`), `device_mode` (octal text; `null`: no node), `device_minor`, `unprivileged` (of `vm.unprivileged_userfaultfd`), `refused` (why none can be opened; `null`: one can), `features` (a list of `name`, `since`, `offered`, `masked`) |
//! | `proc_files` | `mem` and `pagemap` (`opens`, `error`), `mem_ignores_protection`, `pagemap_scan`, `procmap_query` (`null`: could not be tried) |
//! | `limits` | `max_map_count`, `mappings`, `locked_memory` and `address_space` (bytes; `null`: unlimited), `overcommit_memory`, `huge_pages` |
//! | `signals` | `sigsegv` and `sigbus` (`default`, `ignored`, `handled`), `blocked` (names) |
//! | `environment` | `engine` and `uffd_disable` (of `HMM_ENGINE` and `HMM_UFFD_DISABLE`), `preload`, `valgrind`, `traced` |
//! | `engines` | a list, the best first: `name`, `opens` (false: it refuses), `works`, `reason` (`null` when it works), `proof` (`null` when it does not) |
//! | `limitations` | what does not work with the engine, one sentence each |
//! | `advice` | what would help, the best first: `line` (to type, or to have) and `gain` |
//!
//! A `proof` has `capabilities` (names, as the engine says), `system_calls` (write(2) of a page that is away works),
//! `layout_changes` (a mirror is told of munmap at once), `touch_us` (a touch of one page, microseconds),
//! `out_mib_per_s` and `home_mib_per_s` (8 MiB; medians all three).
#![forbid(unsafe_code)]

mod advice;
mod child;
mod command;
mod facts;
mod limitations;
mod message;
mod report;
mod text;
mod trial;

pub use child::Program;
pub use command::{Answer, run};
pub use report::{Report, examine};
