//! Writing HTML.

/// Text that is safe inside HTML, also inside attributes.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Appends formatted text; writing to memory does not fail.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {{
        let _infallible = write!($out, $($arg)*);
    }};
}
pub(super) use put;
