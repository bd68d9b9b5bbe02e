//! Folders named after classes.

use ovenbird_cache::Digest;

/// The longest folder name that file systems have, in bytes, less room for a digest.
const MAX_NAME_BYTES: usize = 200;

/// The folder of a class: its name, as far as folders can have it. Different classes have different ones.
pub(crate) fn folder_name(class: &str) -> String {
    let mut name = String::new();
    for (place, character) in class.char_indices() {
        let is_plain = !(character.is_control() || matches!(character, '/' | '\\' | '%') || place == 0 && character == '.');
        if is_plain {
            name.push(character);
        } else {
            let mut bytes = [0; 4];
            name.extend(character.encode_utf8(&mut bytes).bytes().map(|byte| format!("%{byte:02X}")));
        }
    }
    if name.is_empty() {
        // Which no character is written as.
        return "%".into();
    }
    if name.len() <= MAX_NAME_BYTES {
        return name;
    }
    let digest = Digest::of(class.as_bytes()).to_string();
    format!("{}%~{digest}", &name[..name.floor_char_boundary(MAX_NAME_BYTES - 72)])
}

/// The class whose folder has this name, of one that is not too long.
pub(crate) fn class_of(folder: &str) -> String {
    let mut bytes = Vec::with_capacity(folder.len());
    let mut rest = folder.as_bytes();
    while let [first, after @ ..] = rest {
        let digit = |place: usize| after.get(place).and_then(|byte| char::from(*byte).to_digit(16));
        rest = match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((16 * high + low) as u8);
                &after[2..]
            }
            _ => {
                bytes.push(*first);
                after
            }
        };
    }
    String::from_utf8(bytes).unwrap_or_else(|_| folder.to_owned())
}
