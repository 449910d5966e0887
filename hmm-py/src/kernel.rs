//! Device kernels from Python arguments: types, lengths and access checked, addresses taken.

use crate::memory::{Element, Memory};
use hmm_soft::Kernel;
use pyo3::exceptions::{PyIndexError, PyOverflowError, PyValueError};
use pyo3::prelude::*;

/// A kernel that is ready to run, and the memory that must stay exported until it has ended.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) kernel: Kernel,
    pub(crate) memory: Vec<Memory>,
}

impl Work {
    /// `None` when there is nothing to do.
    fn unless_empty(kernel: Kernel, memory: Vec<Memory>) -> Option<Self> {
        let empty = memory.iter().all(|memory| memory.bytes() == 0);
        (!empty).then_some(Self { kernel, memory })
    }
}

/// `dst[:] = byte`
pub(crate) fn fill(dst: Memory, byte: u8) -> PyResult<Option<Work>> {
    dst.writable("dst")?;
    let kernel = Kernel::Fill { dst: dst.address(), len: dst.bytes(), byte };
    Ok(Work::unless_empty(kernel, vec![dst]))
}

/// `dst[:] = src[:]`, bytes
pub(crate) fn copy(dst: Memory, src: Memory) -> PyResult<Option<Work>> {
    dst.writable("dst")?;
    same("bytes", ("dst", dst.bytes()), ("src", src.bytes()))?;
    apart(("dst", &dst), ("src", &src))?;
    let kernel = Kernel::Copy { dst: dst.address(), src: src.address(), len: dst.bytes() };
    Ok(Work::unless_empty(kernel, vec![dst, src]))
}

/// `y += a * x`
pub(crate) fn axpy(a: f64, x: Memory, y: Memory) -> PyResult<Option<Work>> {
    x.element("x", &[Element::Float])?;
    y.element("y", &[Element::Float])?;
    y.writable("y")?;
    same("elements", ("y", y.count()), ("x", x.count()))?;
    if x.address() != y.address() {
        apart(("y", &y), ("x", &x))?;
    }
    let kernel = Kernel::AxpyF64 { a, x: x.address(), y: y.address(), count: x.count() };
    Ok(Work::unless_empty(kernel, vec![x, y]))
}

/// The sum of all elements, and how to read the result.
pub(crate) fn sum(src: Memory) -> PyResult<(Element, Option<Work>)> {
    let element = src.element("src", &Element::ALL)?;
    let (address, count) = (src.address(), src.count());
    let kernel = match element {
        Element::Float => Kernel::SumF64 { src: address, count },
        Element::Signed | Element::Unsigned => Kernel::SumU64 { src: address, count },
    };
    Ok((element, Work::unless_empty(kernel, vec![src])))
}

/// `dst[i] = src[index[i]]`
pub(crate) fn gather(dst: Memory, src: Memory, index: Memory) -> PyResult<Option<Work>> {
    let element = dst.element("dst", &Element::ALL)?;
    src.element("src", &[element])?;
    index.element("index", &Element::INTEGERS)?;
    dst.writable("dst")?;
    same("elements", ("dst", dst.count()), ("index", index.count()))?;
    apart(("dst", &dst), ("index", &index))?;
    let kernel = Kernel::GatherU64 {
        dst: dst.address(),
        src: src.address(),
        index: index.address(),
        count: dst.count(),
    };
    Ok(Work::unless_empty(kernel, vec![dst, index, src]))
}

/// `target[index] += value` in one atomic step; the result is the old value.
pub(crate) fn atomic_add(target: Memory, index: u64, value: i128) -> PyResult<(Element, Work)> {
    let element = target.element("target", &Element::INTEGERS)?;
    target.writable("target")?;
    if index >= target.count() {
        let count = target.count();
        return Err(PyIndexError::new_err(format!("index {index} is outside of {count} elements")));
    }
    let value = to_bits(element, value)?;
    let kernel = Kernel::AtomicAddU64 { addr: target.address() + index * 8, value };
    Ok((element, Work { kernel, memory: vec![target] }))
}

/// `target[::stride] += value`, without atomicity.
pub(crate) fn add(target: Memory, value: i128, stride: u64) -> PyResult<Option<Work>> {
    let element = target.element("target", &Element::INTEGERS)?;
    target.writable("target")?;
    if stride == 0 {
        return Err(PyValueError::new_err("stride must be at least 1"));
    }
    let value = to_bits(element, value)?;
    let (addr, count) = (target.address(), target.count().div_ceil(stride));
    let stride = stride.min(target.count()) * 8;
    let kernel = Kernel::AddU64 { addr, count, stride, value };
    Ok(Work::unless_empty(kernel, vec![target]))
}

/// A result of 64 bits as the number that the element type makes of it.
pub(crate) fn to_number(element: Element, bits: u64, py: Python<'_>) -> PyResult<Py<PyAny>> {
    let number = match element {
        Element::Float => f64::from_bits(bits).into_pyobject(py)?.into_any(),
        Element::Signed => bits.cast_signed().into_pyobject(py)?.into_any(),
        Element::Unsigned => bits.into_pyobject(py)?.into_any(),
    };
    Ok(number.unbind())
}

/// An integer of the element's range, as 64 bits.
fn to_bits(element: Element, value: i128) -> PyResult<u64> {
    let bits = match element {
        Element::Unsigned => u64::try_from(value).ok(),
        Element::Float | Element::Signed => i64::try_from(value).ok().map(i64::cast_unsigned),
    };
    bits.ok_or_else(|| {
        PyOverflowError::new_err(format!("{value} does not fit the elements of target"))
    })
}

fn same(unit: &str, first: (&str, u64), second: (&str, u64)) -> PyResult<()> {
    if first.1 == second.1 {
        return Ok(());
    }
    let ((first, first_size), (second, second_size)) = (first, second);
    let message =
        format!("{first} has {first_size} {unit}, {second} has {second_size}: they must be equal");
    Err(PyValueError::new_err(message))
}

fn apart(first: (&str, &Memory), second: (&str, &Memory)) -> PyResult<()> {
    let ((first, a), (second, b)) = (first, second);
    let below = |a: &Memory, b: &Memory| a.address().saturating_add(a.bytes()) <= b.address();
    if below(a, b) || below(b, a) {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("{first} and {second} overlap")))
}
