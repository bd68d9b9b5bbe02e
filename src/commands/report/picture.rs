//! One picture of a report: an image with boxes and labels, as SVG.

use std::fmt::Write as _;

use ovenbird_data::{annotations::ImageId, boxes::Xyxy};

use super::html::{escape, put};

/// The width at which a picture is laid out, px of the page; narrower columns are rare.
const SHOWN_WIDTH: f32 = 330.0;
/// The height of a label's text, px of the page.
const TEXT_PX: f32 = 12.0;
/// The mean width of a character, in heights of the text.
const CHARACTER: f32 = 0.58;
/// The characters of a name in a shortened label.
const SHORT_NAME: usize = 10;

/// An image with boxes.
pub(super) struct Picture {
    pub(super) file_name: String,
    pub(super) id: ImageId,
    /// `[width, height]` px, to which the boxes refer.
    pub(super) size: [u32; 2],
    /// A JPEG of any size, or why there is none.
    pub(super) jpeg: Result<Vec<u8>, String>,
    /// Detections first, best first.
    pub(super) boxes: Vec<Boxed>,
    /// How well the detections fit.
    pub(super) words: String,
}

/// An object or a detection.
pub(super) struct Boxed {
    pub(super) xyxy: Xyxy,
    /// The place of its class in the list of the filter.
    pub(super) class: usize,
    pub(super) name: String,
    pub(super) is_novel: bool,
    pub(super) role: Role,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Role {
    /// `is_right`: whether it finds an object; `None` where there are none to be found.
    Detection {
        score: f32,
        is_right: Option<bool>,
    },
    Object {
        is_found: bool,
    },
}

impl Boxed {
    /// The label: whole, shortened, and without the name. An object that was found has the label of its detection.
    fn labels(&self) -> Option<[String; 3]> {
        let name = format!("{}{}", if self.is_novel { "★ " } else { "" }, self.name);
        let short = cut(&name, SHORT_NAME);
        match self.role {
            Role::Detection { score, is_right } => {
                let mark = is_right.map_or("", |is_right| if is_right { " ✓" } else { " ✗" });
                let shortest = if mark.is_empty() { format!("{score:.2}") } else { mark.trim().into() };
                Some([format!("{name} {score:.2}{mark}"), format!("{short}{mark}"), shortest])
            }
            Role::Object { is_found: false } => Some([name, short, "?".into()]),
            Role::Object { is_found: true } => None,
        }
    }

    fn class(&self) -> &'static str {
        match (self.role, self.is_novel) {
            (Role::Detection { .. }, true) => "found novel",
            (Role::Detection { .. }, false) => "found",
            (Role::Object { .. }, true) => "truth novel",
            (Role::Object { .. }, false) => "truth",
        }
    }
}

impl Picture {
    pub(super) fn render(&self, out: &mut String) {
        let Self { file_name, id, size: [width, height], jpeg, boxes, words } = self;
        put!(out, "<figure><svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">", escape(file_name));
        match jpeg {
            Ok(jpeg) => put!(
                out,
                "<image width=\"{width}\" height=\"{height}\" preserveAspectRatio=\"none\" href=\"data:image/jpeg;base64,{}\"/>",
                base64(jpeg)
            ),
            Err(_) => put!(out, "<rect class=\"nothing\" width=\"{width}\" height=\"{height}\"/>"),
        }
        for boxed in boxes {
            let Xyxy { x1, y1, .. } = boxed.xyxy;
            let (class, [box_width, box_height]) = (boxed.class(), [boxed.xyxy.width(), boxed.xyxy.height()]);
            put!(out, "<rect class=\"{class}\" data-class=\"{}\" x=\"{x1:.1}\" y=\"{y1:.1}\" ", boxed.class);
            put!(out, "width=\"{box_width:.1}\" height=\"{box_height:.1}\"><title>{}</title></rect>", escape(&boxed.name));
        }
        self.labels(out);
        put!(out, "</svg><figcaption><strong>{}</strong> image {id}. {}", escape(file_name), escape(words));
        if let Err(problem) = jpeg {
            put!(out, "<br><strong>The image cannot be shown:</strong> {}", escape(problem));
        }
        out.push_str("</figcaption></figure>");
    }

    /// Labels over a background, each where it covers no other label and the fewest lines. A label without room for it is shortened; the
    /// whole of it is its tooltip.
    fn labels(&self, out: &mut String) {
        let [width, height] = self.size.map(|side| side as f32);
        let pixel = width / SHOWN_WIDTH;
        let (text_px, padding) = (TEXT_PX * pixel, 3.0 * pixel);
        let longest = ((width - 2.0 * padding) / (CHARACTER * text_px)).max(1.0) as usize;
        let text_width = |label: &str| CHARACTER * text_px * label.chars().count() as f32;
        let mut placed: Vec<Xyxy> = Vec::new();
        for boxed in &self.boxes {
            let Some([whole, short, shortest]) = boxed.labels() else { continue };
            let lengths = [cut(&whole, longest), cut(&short, longest), cut(&shortest, longest)];
            let places = lengths.into_iter().map(|label| {
                let size = [text_width(&label) + 2.0 * padding, 1.35 * text_px];
                let (place, n_covered) = place(size, &boxed.xyxy, [width, height], pixel, &self.boxes, &placed);
                (label, place, n_covered)
            });
            // The first of those that cover the fewest.
            let (label, place, _) = places.min_by_key(|(.., n_covered)| *n_covered).expect("BUG: a label has three lengths");
            let (Xyxy { x1, y1, .. }, class) = (place, boxed.class());
            let [width, height] = [place.width(), place.height()];
            put!(out, "<g class=\"label {class}\" data-class=\"{}\"><title>{}</title>", boxed.class, escape(&whole));
            put!(out, "<rect x=\"{x1:.1}\" y=\"{y1:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>");
            // The text has the width of its background in every font.
            put!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" style=\"font-size:{text_px:.1}px\" textLength=\"{:.1}\" lengthAdjust=\"spacingAndGlyphs\">{}</text></g>",
                x1 + padding,
                y1 + 1.02 * text_px,
                text_width(&label),
                escape(&label)
            );
            placed.push(place);
        }
    }
}

/// At most so many characters.
fn cut(text: &str, n_characters: usize) -> String {
    if text.chars().count() <= n_characters {
        return text.to_owned();
    }
    text.chars().take(n_characters.saturating_sub(1)).chain(['…']).collect()
}

/// Where a label goes: at a corner of its box, outside or inside, within the image. Returns how many labels it covers there, too.
fn place([width, height]: [f32; 2], own: &Xyxy, image: [f32; 2], pixel: f32, boxes: &[Boxed], placed: &[Xyxy]) -> (Xyxy, usize) {
    let gap = 3.0 * pixel;
    let (outside, inside) = ([own.x1, own.x2 - width], [own.x1 + gap, own.x2 - width - gap]);
    let rows = [(own.y1 - height - gap, outside), (own.y2 + gap, outside), (own.y1 + gap, inside), (own.y2 - height - gap, inside)];
    let within = |low: f32, length: f32, side: f32| low.min(side - length).max(0.0);
    let corners = rows.into_iter().flat_map(|(y, columns)| columns.map(|x| [within(x, width, image[0]), within(y, height, image[1])]));
    let places = corners.map(|[x, y]| Xyxy { x1: x, y1: y, x2: x + width, y2: y + height });
    let costs = places.map(|label| {
        let n_covered = placed.iter().filter(|other| overlap(&label, other)).count();
        let n_lines = boxes.iter().filter(|boxed| covers_line(&label, &boxed.xyxy, pixel)).count();
        (label, n_covered, n_lines)
    });
    let best = costs.min_by_key(|(_, n_covered, n_lines)| (*n_covered, *n_lines)).map(|(label, n_covered, _)| (label, n_covered));
    best.expect("BUG: a box has corners")
}

fn overlap(a: &Xyxy, b: &Xyxy) -> bool {
    a.x1 < b.x2 && b.x1 < a.x2 && a.y1 < b.y2 && b.y1 < a.y2
}

/// Whether a label covers a line of a box, which is two pixels wide.
fn covers_line(label: &Xyxy, xyxy: &Xyxy, pixel: f32) -> bool {
    let outer = Xyxy { x1: xyxy.x1 - pixel, y1: xyxy.y1 - pixel, x2: xyxy.x2 + pixel, y2: xyxy.y2 + pixel };
    let is_inside = label.x1 > xyxy.x1 + pixel && label.y1 > xyxy.y1 + pixel && label.x2 < xyxy.x2 - pixel && label.y2 < xyxy.y2 - pixel;
    overlap(label, &outer) && !is_inside
}

/// Bytes as an address holds them.
pub(super) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let number = group.iter().enumerate().fold(0_u32, |number, (place, byte)| number | u32::from(*byte) << (16 - 8 * place));
        for digit in 0..4 {
            let is_filled = digit <= group.len();
            text.push(if is_filled { char::from(DIGITS[(number >> (18 - 6 * digit)) as usize & 63]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of RFC 4648, section 10.
    #[test]
    fn base64_equals_the_rfc() {
        let found = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(found, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
    }

    fn object(xyxy: [f32; 4], name: &str) -> Boxed {
        Boxed { xyxy: xyxy.into(), class: 0, name: name.into(), is_novel: false, role: Role::Object { is_found: false } }
    }

    #[test]
    fn labels_stay_in_the_image_and_cover_neither_lines_nor_each_other() {
        let boxes = [
            object([0.0, 0.0, 330.0, 200.0], "wall"),
            object([70.0, 30.0, 170.0, 90.0], "owl"),
            object([72.0, 34.0, 168.0, 94.0], "wren"),
            object([250.0, 150.0, 326.0, 196.0], "a long name at the edge"),
        ];
        let mut placed: Vec<Xyxy> = Vec::new();
        for boxed in &boxes {
            let (label, n_covered) = place([60.0, 16.0], &boxed.xyxy, [330.0, 200.0], 1.0, &boxes, &placed);
            assert!(label.x1 >= 0.0 && label.y1 >= 0.0 && label.x2 <= 330.0 && label.y2 <= 200.0, "{}: {label:?}", boxed.name);
            assert!(n_covered == 0 && placed.iter().all(|other| !overlap(&label, other)), "{}: {label:?}", boxed.name);
            assert!(boxes.iter().all(|other| !covers_line(&label, &other.xyxy, 1.0)), "{}: {label:?}", boxed.name);
            placed.push(label);
        }
    }
}
