//! Structs that can grow without breaking programs that were compiled with an older header.
//!
//! A program passes the size of the struct that it knows. Fields are only ever added at the end, and zero in a new field of a
//! params struct means the behaviour from before. So an older program's struct is completed with defaults, and a newer
//! program's struct is accepted as long as it uses nothing that this library does not know.

use super::status::{Failure, ggraft_status::*};
use std::ffi::c_void;

/// A params struct.
///
/// # Safety
/// `repr(C)`, starts with a `usize` that holds the struct's size, every bit pattern of its fields is valid, and there is no
/// padding (a later field would lie where older programs leave garbage).
pub(crate) unsafe trait Params: Copy {
    /// Size in the first version of the header: that of the struct, until a field is added; then the offset of that field.
    const FIRST_SIZE: usize;
    /// What a NULL pointer stands for; `struct_size` is set.
    fn defaults() -> Self;
}

/// Reads a caller's struct; null gives the defaults.
///
/// # Safety
/// `ptr` is null or points to as many readable bytes as its first field says.
pub(crate) unsafe fn read<T: Params>(ptr: *const T, name: &str) -> Result<T, Failure> {
    let mut params = T::defaults();
    if ptr.is_null() {
        return Ok(params);
    }
    // SAFETY: the struct starts with its size.
    let size = unsafe { ptr.cast::<usize>().read() };
    if size < T::FIRST_SIZE || size > isize::MAX as usize {
        return Err(Failure::new(
            GGRAFT_ERROR_ARGUMENT,
            format!("{name}: struct_size is {size}, fill the struct with its init function"),
        ));
    }
    let known = size.min(size_of::<T>());
    // SAFETY: the caller promises `size` readable bytes.
    let unknown = unsafe { std::slice::from_raw_parts(ptr.cast::<u8>().add(known), size - known) };
    if unknown.iter().any(|&byte| byte != 0) {
        return Err(Failure::new(
            GGRAFT_ERROR_ARGUMENT,
            format!(
                "{name}: a field is set that this version of the library ({}) does not know",
                env!("CARGO_PKG_VERSION")
            ),
        ));
    }
    // SAFETY: `known` bytes are readable and fit; all bit patterns are valid (`Params`).
    unsafe {
        std::ptr::from_mut(&mut params)
            .cast::<u8>()
            .copy_from_nonoverlapping(ptr.cast(), known);
    }
    Ok(params)
}

/// Fills a caller's params struct of `size` bytes with the defaults, and zeros behind what this library knows.
///
/// # Safety
/// `out` is null or valid for writes of `size` bytes.
pub(crate) unsafe fn init<T: Params>(out: *mut T, size: usize) -> Result<(), Failure> {
    if size < T::FIRST_SIZE {
        return Err(Failure::new(
            GGRAFT_ERROR_ARGUMENT,
            format!(
                "the size is {size}, at least {} are needed: pass sizeof of the struct",
                T::FIRST_SIZE
            ),
        ));
    }
    // SAFETY: the caller's promise; a `usize` at the start is the struct's size (`Params`) and lies within `FIRST_SIZE`.
    unsafe {
        write(out, size, T::defaults())?;
        out.cast::<usize>().write(size);
    }
    Ok(())
}

/// Copies as much of `value` as a caller's struct of `size` bytes holds; what lies behind is set to zero.
///
/// # Safety
/// `out` is null or valid for writes of `size` bytes.
pub(crate) unsafe fn write<T: Copy>(out: *mut T, size: usize, value: T) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::new(GGRAFT_ERROR_NULL, "the struct is NULL"));
    }
    let out = out.cast::<c_void>();
    let known = size.min(size_of::<T>());
    // SAFETY: `out` is not null and valid for `size` bytes, `value` for `known` of them; they do not overlap.
    unsafe {
        out.copy_from_nonoverlapping(std::ptr::from_ref(&value).cast(), known);
        out.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

/// What a number of C stands for: the meaning of the enumeration's variant that has this number, or the error that it has none.
macro_rules! choose {
    ($value:expr, $enumeration:ident { $($variant:ident => $meaning:expr),+ $(,)? }) => {
        match $value {
            $(v if v == $enumeration::$variant as i32 => Ok($meaning),)+
            v => Err($crate::status::Failure::new(
                $crate::status::ggraft_status::GGRAFT_ERROR_ARGUMENT,
                format!("{v} is no {}", stringify!($enumeration)),
            )),
        }
    };
}
pub(crate) use choose;

#[cfg(test)]
mod tests {
    use super::*;

    /// The first version of a header's struct, and the library's, which has one more field.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Old {
        struct_size: usize,
        a: u64,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Current {
        struct_size: usize,
        a: u64,
        b: u64,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct New {
        current: Current,
        c: u64,
    }
    // SAFETY: plain numbers without padding, `struct_size` first.
    unsafe impl Params for Current {
        const FIRST_SIZE: usize = size_of::<Old>();
        fn defaults() -> Self {
            Self {
                struct_size: size_of::<Self>(),
                a: 5,
                b: 6,
            }
        }
    }

    #[test]
    fn an_older_struct_is_completed_and_never_overrun() {
        let mut old = [Old {
            struct_size: 0,
            a: 9,
        }; 2];
        // SAFETY: `old` is valid for the size given.
        unsafe { init(old.as_mut_ptr().cast::<Current>(), size_of::<Old>()) }.unwrap();
        assert_eq!((old[0].struct_size, old[0].a), (size_of::<Old>(), 5));
        assert_eq!(old[1].a, 9);
        old[0].a = 7;
        // SAFETY: the struct holds its size.
        let read = unsafe { read(old.as_ptr().cast::<Current>(), "old") }.unwrap();
        assert_eq!((read.a, read.b), (7, 6));
    }

    #[test]
    fn a_newer_struct_is_accepted_if_it_asks_for_nothing_new() {
        let mut new = New {
            current: Current::defaults(),
            c: 9,
        };
        let ptr = std::ptr::from_mut(&mut new);
        // SAFETY: `new` is valid for the size given.
        unsafe { init(ptr.cast::<Current>(), size_of::<New>()) }.unwrap();
        // SAFETY: as above; the struct holds its size.
        assert_eq!(unsafe { read(ptr.cast::<Current>(), "new") }.unwrap().b, 6);
        assert_eq!(new.c, 0);
        new.c = 1;
        // SAFETY: as above.
        let failure = unsafe { read(std::ptr::from_ref(&new).cast::<Current>(), "new") };
        assert_eq!(failure.unwrap_err().status, GGRAFT_ERROR_ARGUMENT);
    }

    #[test]
    fn a_struct_without_size_is_refused() {
        let zero = Current {
            struct_size: 0,
            a: 0,
            b: 0,
        };
        // SAFETY: the size says that nothing else may be read.
        let failure = unsafe { read(&zero, "zero") }.unwrap_err();
        assert_eq!(failure.status, GGRAFT_ERROR_ARGUMENT);
        // SAFETY: null is allowed.
        let failure = unsafe { init(std::ptr::null_mut::<Current>(), 64) }.unwrap_err();
        assert_eq!(failure.status, GGRAFT_ERROR_NULL);
    }
}
