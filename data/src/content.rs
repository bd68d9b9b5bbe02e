//! The format of a file by its first bytes, whatever its name says: for messages about files with the wrong name.

/// Names a file's content for messages, after "found"; `None` for unknown first bytes.
pub fn describe(bytes: &[u8]) -> Option<&'static str> {
    image_format(bytes).map(Format::name).or_else(|| other(bytes))
}

/// A way of storing pictures that programs write and cameras have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format(&'static str);

impl Format {
    /// Its name with an article, as it follows "found".
    pub fn name(self) -> &'static str {
        self.0
    }
}

/// The format of a picture; `None` for other files and unknown formats.
pub fn image_format(bytes: &[u8]) -> Option<Format> {
    const MAGIC: &[(&[u8], &str)] = &[
        (b"\xff\xd8", "a JPEG"),
        (b"\x89PNG", "a PNG"),
        (b"GIF87a", "a GIF"),
        (b"GIF89a", "a GIF"),
        (b"II*\0", "a TIFF"),
        (b"MM\0*", "a TIFF"),
        (b"II+\0", "a TIFF"),
        (b"MM\0+", "a TIFF"),
        (b"\xff\x0a", "a JPEG XL"),
        (b"\0\0\0\x0cJXL ", "a JPEG XL"),
        (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
        (b"\xff\x4f\xff\x51", "a JPEG 2000"),
        (b"\0\0\x01\0", "an icon (ICO)"),
        (b"8BPS", "a Photoshop file (PSD)"),
        (b"\x76\x2f\x31\x01", "an OpenEXR"),
        (b"qoif", "a QOI"),
        (b"DDS ", "a DDS"),
        (b"#?RADIANCE", "a Radiance HDR"),
    ];
    let named = MAGIC.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, name)| *name);
    let is_at = |place: usize, text: &[u8]| bytes.get(place..place + text.len()) == Some(text);
    let name = match named {
        Some(name) => name,
        None if is_at(0, b"RIFF") && is_at(8, b"WEBP") => "a WebP",
        // A header's size tells it from a text that begins with these letters.
        None if is_at(0, b"BM") && is_at(6, b"\0\0\0\0") => "a BMP",
        None if is_at(4, b"ftyp") => match bytes.get(8..12)? {
            b"avif" | b"avis" => "an AVIF",
            b"heic" | b"heix" | b"hevc" | b"hevx" | b"heim" | b"heis" | b"mif1" | b"msf1" => "a HEIC",
            _ => return None,
        },
        None if matches!(bytes, [b'P', b'1'..=b'6', b' ' | b'\n' | b'\r' | b'\t', ..]) => "a PNM (PPM, PGM or PBM)",
        None if text_starts(bytes, &["<svg"]) || (text_starts(bytes, &["<?xml"]) && contains(bytes, b"<svg")) => "an SVG",
        None if is_at(128, b"DICM") => "a DICOM",
        None => return None,
    };
    Some(Format(name))
}

fn other(bytes: &[u8]) -> Option<&'static str> {
    const MAGIC: &[(&[u8], &str)] = &[
        (b"\x1f\x8b", "a gzip archive"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PK\x05\x06", "a zip archive"),
        (b"BZh", "a bzip2 archive"),
        (b"\xfd7zXZ\0", "an xz archive"),
        (b"\x28\xb5\x2f\xfd", "a zstd archive"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!", "a RAR archive"),
        (b"%PDF", "a PDF"),
        (b"PAR1", "a Parquet table"),
        (b"ARROW1", "an Arrow file"),
        (b"\x89HDF", "an HDF5 file"),
        (b"\x93NUMPY", "a NumPy array"),
        (b"SQLite format 3", "an SQLite database"),
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
        (b"\xff\xfe", "a text in UTF-16"),
        (b"\xfe\xff", "a text in UTF-16"),
        (b"{\0", "a text in UTF-16"),
        (b"[\0", "a text in UTF-16"),
        (b"\0{", "a text in UTF-16"),
        (b"\0[", "a text in UTF-16"),
    ];
    if bytes.is_empty() {
        return Some("an empty file");
    }
    if let Some((_, name)) = MAGIC.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Some(name);
    }
    match bytes {
        [0x80, 2..=5, ..] => Some("a Python pickle"),
        [_, _, _, _, 0, 0, 0, 0, b'{', ..] => Some("safetensors"),
        _ if bytes.get(257..262) == Some(b"ustar".as_slice()) => Some("a tar archive"),
        _ if bytes.get(4..8) == Some(b"ftyp".as_slice()) => Some("a video (MP4)"),
        _ if text_starts(bytes, &["<!doctype html", "<html", "<head", "<body"]) => Some("a web page"),
        _ if text_starts(bytes, &["<?xml", "<annotation", "<"]) => Some("XML"),
        _ if bytes.iter().all(u8::is_ascii_whitespace) => Some("an empty file"),
        _ if bytes.iter().take(4096).all(|byte| *byte == 0) => Some("zeros (a download that was not finished)"),
        _ => None,
    }
}

/// Whether a text begins with one of some words in lower case, after a byte order mark and spaces.
fn text_starts(bytes: &[u8], words: &[&str]) -> bool {
    let text = bytes.strip_prefix(super::json::BYTE_ORDER_MARK).unwrap_or(bytes).trim_ascii_start();
    words.iter().any(|word| text.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word.as_bytes())))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes[..bytes.len().min(4096)].windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_by_their_first_bytes() {
        let tar = [vec![b'a'; 257], b"ustar\0".to_vec()].concat();
        let cases: &[(&[u8], Option<&str>)] = &[
            (b"", Some("an empty file")),
            (b" \n", Some("an empty file")),
            (&[0; 5000], Some("zeros (a download that was not finished)")),
            (b"\xff\xd8\xff\xe0", Some("a JPEG")),
            (b"\x89PNG\r\n", Some("a PNG")),
            (b"GIF89a..", Some("a GIF")),
            (b"BM\x9a\x00\x00\x00\0\0\0\0\x36", Some("a BMP")),
            (b"BMW is a car", None),
            (b"II*\0\x08", Some("a TIFF")),
            (b"MM\0*", Some("a TIFF")),
            (b"RIFF\x10\0\0\0WEBPVP8 ", Some("a WebP")),
            (b"RIFF\x10\0\0\0WAVE", None),
            (b"\0\0\0\x1cftypavif", Some("an AVIF")),
            (b"\0\0\0\x1cftypheic", Some("a HEIC")),
            (b"\0\0\0\x1cftypisom", Some("a video (MP4)")),
            (b"\xff\x0a\xfa", Some("a JPEG XL")),
            (b"\0\0\0\x0cJXL \r\n", Some("a JPEG XL")),
            (b"\0\0\0\x0cjP  \r\n", Some("a JPEG 2000")),
            (b"\0\0\x01\0\x01\0", Some("an icon (ICO)")),
            (b"8BPS\0\x01", Some("a Photoshop file (PSD)")),
            (b"P6\n3 2\n255\n", Some("a PNM (PPM, PGM or PBM)")),
            (b"\xef\xbb\xbf <svg xmlns='x'>", Some("an SVG")),
            (b"<?xml version='1.0'?><svg>", Some("an SVG")),
            (b"<?xml version='1.0'?><annotation>", Some("XML")),
            (b"\n<!DOCTYPE html><html>", Some("a web page")),
            (b"<HTML>", Some("a web page")),
            (b"\x1f\x8b\x08", Some("a gzip archive")),
            (b"PK\x03\x04", Some("a zip archive")),
            (&tar, Some("a tar archive")),
            (b"\x80\x04\x95", Some("a Python pickle")),
            (b"\x40\0\0\0\0\0\0\0{\"a\"", Some("safetensors")),
            (b"PAR1", Some("a Parquet table")),
            (b"version https://git-lfs.github.com/spec/v1\n", Some("a Git LFS pointer, not the file itself")),
            (b"\xff\xfe{\0\"\0", Some("a text in UTF-16")),
            (b"{\0\"\0", Some("a text in UTF-16")),
            (b"\0{\0\"", Some("a text in UTF-16")),
            (b"{\"images\": []}", None),
            (b"no picture", None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(describe(bytes), *expected, "{:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(40)]));
        }
    }

    #[test]
    fn no_beginning_of_a_file_is_too_short_to_look_at() {
        for n in 0..300 {
            for byte in [0, b'<', b'P', b'B', b'R', 0xff, 0x80] {
                describe(&vec![byte; n]);
            }
        }
    }
}
