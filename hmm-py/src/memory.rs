//! What an argument means as memory: an object with a buffer, whose export is held as long as the value lives,
//! or a bare `(address, nbytes)`. Only addresses are taken, never a slice: the device writes there too.

use hmm_core::AddrRange;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyMemoryView, PyTuple};

/// Bytes in an element that the typed kernels work on.
const ELEMENT_BYTES: usize = 8;

/// The element types that kernels tell apart; all have 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    /// float64
    Float,
    /// int64
    Signed,
    /// uint64
    Unsigned,
}

/// Memory named by a Python argument.
#[derive(Debug)]
pub(crate) struct Memory {
    address: u64,
    bytes: u64,
    read_only: bool,
    element: Option<Element>,
    /// Text of the element type, for messages.
    format: String,
    /// Keeps the exporter from freeing or resizing its memory; `None` for a bare address range.
    _export: Option<PyUntypedBuffer>,
}

impl FromPyObject<'_, '_> for Memory {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        match object.cast::<PyTuple>() {
            Ok(pair) => Self::from_pair(&pair),
            Err(_) => Self::from_buffer(&object),
        }
    }
}

impl Memory {
    fn from_pair(pair: &Bound<'_, PyTuple>) -> PyResult<Self> {
        let (address, bytes) = pair.extract().map_err(|_| {
            PyTypeError::new_err(
                "a tuple names memory as (address, nbytes), two integers from 0 to 2**64-1",
            )
        })?;
        let format = "(address, nbytes)".to_owned();
        Ok(Self { address, bytes, read_only: false, element: None, format, _export: None })
    }

    fn from_buffer(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        // Through a memoryview, which fills in the shape and strides that ctypes leaves out.
        let view = PyMemoryView::from(object)?;
        let buffer = PyUntypedBuffer::get(view.as_any())?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err(
                "the memory is not C-contiguous; pass a contiguous array",
            ));
        }
        let format = buffer.format().to_string_lossy().into_owned();
        if holds_python_objects(&format) {
            return Err(PyTypeError::new_err(
                "the elements are Python objects, which the garbage collector visits; they must not migrate",
            ));
        }
        Ok(Self {
            address: buffer.buf_ptr().expose_provenance() as u64,
            bytes: buffer.len_bytes() as u64,
            read_only: buffer.readonly(),
            element: element_of(&format, buffer.item_size()),
            format,
            _export: Some(buffer),
        })
    }

    /// Address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether its exporter forbids writing. A bare address range says nothing of it.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Elements of 8 bytes.
    pub(crate) fn count(&self) -> u64 {
        self.bytes / ELEMENT_BYTES as u64
    }

    /// The pages that the memory touches, or `None` when it has no bytes.
    pub(crate) fn pages(&self) -> hmm_core::Result<Option<AddrRange>> {
        if self.bytes == 0 {
            return Ok(None);
        }
        AddrRange::covering(self.address, self.bytes).map(Some)
    }

    /// The pages of the memory, which must be whole ones.
    pub(crate) fn whole_pages(&self) -> hmm_core::Result<AddrRange> {
        AddrRange::new(self.address, self.address.saturating_add(self.bytes))
    }

    /// Checks that the device may write there.
    pub(crate) fn writable(&self, name: &str) -> PyResult<()> {
        if self.read_only {
            return Err(PyBufferError::new_err(format!(
                "{name} is read-only; the device would write to it"
            )));
        }
        Ok(())
    }

    /// The element type, which must be one of `wanted`, at an address that is a multiple of its size.
    pub(crate) fn element(&self, name: &str, wanted: &[Element]) -> PyResult<Element> {
        let Some(element) = self.element.filter(|element| wanted.contains(element)) else {
            let names: Vec<_> = wanted.iter().copied().map(Element::name).collect();
            let message =
                format!("{name} must have {} elements, not '{}'", names.join(" or "), self.format);
            return Err(PyTypeError::new_err(message));
        };
        if !self.address.is_multiple_of(ELEMENT_BYTES as u64) {
            return Err(PyValueError::new_err(format!(
                "{name} is not aligned to {ELEMENT_BYTES} bytes"
            )));
        }
        Ok(element)
    }
}

impl Element {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Float, Self::Signed, Self::Unsigned];
    /// The integers.
    pub(crate) const INTEGERS: [Self; 2] = [Self::Signed, Self::Unsigned];

    fn name(self) -> &'static str {
        match self {
            Self::Float => "float64",
            Self::Signed => "int64",
            Self::Unsigned => "uint64",
        }
    }
}

/// The element type of a `struct` format in this machine's byte order, if it is one that kernels work on.
///
/// The size is the exporter's, not the format's: ctypes writes `<L` for elements of 8 bytes.
fn element_of(format: &str, item_size: usize) -> Option<Element> {
    let foreign: &[char] = if cfg!(target_endian = "little") { &['>', '!'] } else { &['<'] };
    if item_size != ELEMENT_BYTES || format.starts_with(foreign) {
        return None;
    }
    match format.trim_start_matches(['@', '=', '<', '>', '!']) {
        "d" => Some(Element::Float),
        "l" | "q" | "n" => Some(Element::Signed),
        "L" | "Q" | "N" => Some(Element::Unsigned),
        _ => None,
    }
}

/// Whether a `struct` format has an `O` outside the field names (`:name:`).
fn holds_python_objects(format: &str) -> bool {
    format.split(':').step_by(2).any(|types| types.contains('O'))
}
