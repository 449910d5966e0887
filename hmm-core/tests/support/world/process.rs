//! The process: what it does to its memory, and what must come of it.

use super::{Check, Expected, World, data_of, parts};
use crate::support::steps::{Bytes, Change, PAGES, Span};
use hmm_core::{Error, PAGE_SIZE, Residency};

impl World {
    pub(super) fn is_possible(&self, change: Change) -> bool {
        match change {
            Change::Map(_) | Change::Unmap(_) => true,
            Change::Drop(span) | Change::Protect { span, .. } => self.is_mapped(span),
            Change::Move { from, to } | Change::MoveAndStore { from, to, .. } => {
                let fits = to + from.count <= PAGES;
                let apart = to + from.count <= from.first || from.first + from.count <= to;
                let stores = matches!(change, Change::MoveAndStore { .. });
                fits && apart && self.is_mapped(from) && (!stores || self.is_writable(from))
            }
            Change::Store(bytes) => {
                parts(bytes).all(|(page, ..)| self.is_writable(Span { first: page, count: 1 }))
            }
        }
    }

    /// What the change does to the expected bytes.
    pub(super) fn note(&mut self, change: Change) {
        match change {
            Change::Map(span) => {
                self.expected.extend(span.pages().map(|page| (page, Expected::fresh())));
            }
            Change::Unmap(span) => {
                self.expected.retain(|page, _| !span.pages().contains(page));
            }
            Change::Drop(span) => {
                for (_, page) in self.expected.range_mut(span.pages()) {
                    page.bytes.fill(0);
                }
            }
            Change::Move { from, to } => {
                let moved: Vec<_> = from
                    .pages()
                    .filter_map(|page| Some((page - from.first + to, self.expected.remove(&page)?)))
                    .collect();
                self.expected.extend(moved);
            }
            Change::Protect { span, writable } => {
                for (_, page) in self.expected.range_mut(span.pages()) {
                    page.writable = writable;
                }
            }
            Change::MoveAndStore { from, to, seed } => {
                self.note(Change::Move { from, to });
                self.note_store(Bytes { at: to * PAGE_SIZE, len: 1, seed });
            }
            Change::Store(bytes) => self.note_store(bytes),
        }
    }

    pub(super) fn note_store(&mut self, bytes: Bytes) {
        let data = data_of(bytes);
        for (page, at, from, len) in parts(bytes) {
            if let Some(expected) = self.expected.get_mut(&page) {
                expected.bytes[at..at + len].copy_from_slice(&data[from..from + len]);
            }
        }
    }

    /// The change, as something that any thread can do.
    pub(super) fn action(&self, change: Change) -> Box<dyn FnOnce() -> Result<(), Error> + Send> {
        let (memory, area) = (self.memory.clone(), self.area);
        let range = move |span: Span| area.sub(span.first, span.count);
        Box::new(move || {
            match change {
                Change::Map(span) => memory.map(range(span)),
                Change::Unmap(span) => memory.unmap(range(span)),
                Change::Drop(span) => memory.drop_contents(range(span)),
                Change::Move { from, to } => memory.remap(range(from), area.page_at(to)),
                Change::MoveAndStore { from, to, seed } => {
                    memory.remap(range(from), area.page_at(to));
                    memory.store(area.page_at(to), &[seed])?;
                }
                Change::Protect { span, writable } => memory.protect(range(span), writable),
                Change::Store(bytes) => {
                    let data = data_of(bytes);
                    for (page, at, from, len) in parts(bytes) {
                        let addr = area.page_at(page).checked_add(at as u64).unwrap();
                        memory.store(addr, &data[from..from + len])?;
                    }
                }
            }
            Ok(())
        })
    }

    pub(super) fn change(&mut self, change: Change) -> Check {
        let possible = self.is_possible(change);
        if !possible {
            let Change::Store(bytes) = change else { return Ok(()) };
            return self.bad_store(bytes);
        }
        (self.action(change))().map_err(|error| format!("{change:?}: {error}"))?;
        self.note(change);
        self.told_of(change);
        Ok(())
    }

    /// Stores up to the page where it must fail.
    pub(super) fn bad_store(&mut self, bytes: Bytes) -> Check {
        if !self.memory.survives_bad_accesses() {
            return Ok(());
        }
        let data = data_of(bytes);
        for (page, at, from, len) in parts(bytes) {
            let possible = self.is_writable(Span { first: page, count: 1 });
            let addr = self.addr(page * PAGE_SIZE + at);
            let result = self.memory.store(addr, &data[from..from + len]);
            self.judge("store", result, possible)?;
            if possible {
                let part = Bytes { at: page * PAGE_SIZE + at, len, seed: data[from] };
                self.note_store(part);
            }
        }
        Ok(())
    }

    /// No event tells of a changed protection; the drivers know it otherwise.
    pub(super) fn told_of(&self, change: Change) {
        if let Change::Protect { span, .. } = change {
            self.devices.iter().for_each(|device| device.forget(self.range(span)));
        }
    }

    pub(super) fn load(&mut self, bytes: Bytes) -> Check {
        for (page, at, _, len) in parts(bytes) {
            let possible = self.expected.contains_key(&page);
            if !possible && !self.memory.survives_bad_accesses() {
                continue;
            }
            let mut out = vec![0; len];
            let result = self.memory.load(self.addr(page * PAGE_SIZE + at), &mut out);
            if self.judge("load", result, possible)?.is_some() {
                self.compare(page, at, &out, "a load")?;
            }
        }
        Ok(())
    }

    pub(super) fn add(&mut self, word: usize, value: u64) -> Check {
        let (page, at) = (word * 8 / PAGE_SIZE, word * 8 % PAGE_SIZE);
        if !self.is_writable(Span { first: page, count: 1 }) {
            return Ok(());
        }
        let before = self.memory.add(self.addr(word * 8), value);
        let before = before.map_err(|error| format!("add: {error}"))?;
        self.compare(page, at, &before.to_ne_bytes(), "an atomic add")?;
        if let Some(expected) = self.expected.get_mut(&page) {
            expected.bytes[at..at + 8].copy_from_slice(&before.wrapping_add(value).to_ne_bytes());
        }
        Ok(())
    }

    /// How many of the bytes come before the first page that `allowed` refuses.
    pub(super) fn prefix(&self, bytes: Bytes, allowed: impl Fn(&Expected) -> bool) -> usize {
        parts(bytes)
            .take_while(|(page, ..)| self.expected.get(page).is_some_and(&allowed))
            .map(|(.., len)| len)
            .sum()
    }

    pub(super) fn system_read(&mut self, bytes: Bytes) -> Check {
        let reachable = self.prefix(bytes, |_| true);
        let mut out = vec![0; bytes.len];
        let result = self.mm.read(self.addr(bytes.at), &mut out);
        let Some(count) = self.judge("Mm::read", result, reachable > 0)? else { return Ok(()) };
        ensure!(count == reachable, "Mm::read gave {count} bytes of {reachable}");
        for (page, at, from, len) in parts(Bytes { len: count, ..bytes }) {
            self.compare(page, at, &out[from..from + len], "Mm::read")?;
        }
        Ok(())
    }

    pub(super) fn system_write(&mut self, bytes: Bytes) -> Check {
        let reachable = self.prefix(bytes, |page| page.writable);
        let result = self.mm.write(self.addr(bytes.at), &data_of(bytes));
        let Some(count) = self.judge("Mm::write", result, reachable > 0)? else { return Ok(()) };
        ensure!(count == reachable, "Mm::write took {count} bytes of {reachable}");
        self.note_store(Bytes { len: count, ..bytes });
        Ok(())
    }

    /// A fork brings everything home, and the child sees it.
    pub(super) fn fork(&mut self) -> Check {
        let pages: Vec<_> = self
            .expected
            .iter()
            .map(|(page, one)| (self.area.page_at(*page), &*one.bytes))
            .collect();
        if let Some(compared) = self.memory.fork(&pages) {
            compared?;
        } else {
            let away = self.residency()?;
            let away = away.iter().enumerate().filter(|(_, at)| matches!(at, Residency::Device(_)));
            for (page, _) in away {
                let home = self.mm.make_present(self.area.sub(page, 1), false);
                home.map_err(|error| format!("bringing page {page} home: {error}"))?;
            }
        }
        let left = self.residency()?.iter().filter(|at| matches!(at, Residency::Device(_))).count();
        ensure!(left == 0, "{left} pages are away after a fork");
        Ok(())
    }
}
