//! The captioned web set and the held-out crops.

use super::{
    COLOURS, Dice, PATTERNS, SHAPES, World, kinds,
    paint::{Canvas, Look},
};

/// The percentage of captions that name another object than the picture shows.
const WRONG_PERCENT: f32 = 8.0;

/// A picture found on the web, with the text beside it.
#[derive(Debug, Clone)]
pub struct Captioned {
    /// The picture, encoded.
    pub jpeg: Vec<u8>,
    /// Its alt text: mostly right, sometimes wrong, sometimes noise.
    pub text: String,
}

/// What is wrong with a picture's link, or with its row in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    None,
    /// There is no such page any more.
    Gone,
    /// The link leads on to the picture.
    Moved,
    /// The link leads to a web page.
    Page,
    /// Robots may not go there.
    Forbidden,
    /// The picture ends in its middle.
    Cut,
    /// The server fails.
    Failing,
    /// Another picture is there than before.
    Changed,
    /// The row has the URL of another picture.
    Duplicate(usize),
    /// The row is marked as unsafe for work.
    Unsafe,
}

/// The trouble with a picture of the web set.
pub fn trouble(seed: u64, index: usize) -> Trouble {
    match Dice::new(seed, 5, index).below(100) {
        0..10 => Trouble::Gone,
        10..14 => Trouble::Moved,
        14..17 => Trouble::Page,
        17..19 => Trouble::Forbidden,
        19..21 => Trouble::Cut,
        21..22 => Trouble::Failing,
        22..24 => Trouble::Changed,
        24..26 if index > 0 => Trouble::Duplicate(index - 1),
        26..28 => Trouble::Unsafe,
        _ => Trouble::None,
    }
}

/// Where a server of the web set has a picture, below its address.
pub fn web_path(seed: u64, index: usize) -> String {
    let folder = if trouble(seed, index) == Trouble::Forbidden { "private" } else { "pictures" };
    format!("{folder}/{seed}/{index:08}.jpg")
}

/// A picture whose class is known for certain.
#[derive(Debug, Clone)]
pub struct Labelled {
    /// The picture, encoded.
    pub jpeg: Vec<u8>,
    /// Its class, by its place among base ++ novel.
    pub class: usize,
}

impl World {
    /// A picture of the web set. Classes are long-tailed: the first is about four times as frequent as the last.
    pub fn web(&self, index: usize) -> Captioned {
        let mut dice = Dice::new(self.seed, 3, index);
        let n_classes = kinds().len();
        // Density falls linearly from 1.6 to 0.4 over the scattered list.
        let mut class = dice.below(n_classes);
        if dice.unit() > 1.0 - 0.75 * class as f32 / n_classes as f32 {
            class = dice.below(class + 1);
        }
        let jpeg = picture(&mut dice, class);
        let named = if dice.chance(WRONG_PERCENT / 100.0) { dice.below(n_classes) } else { class };
        let text = caption(&mut dice, named);
        Captioned { jpeg, text }
    }

    /// A picture of the held-out set: classes in turn.
    pub fn held_out(&self, index: usize) -> Labelled {
        let mut dice = Dice::new(self.seed, 4, index);
        let class = index % kinds().len();
        Labelled { jpeg: picture(&mut dice, class), class }
    }
}

/// One object, large, not always whole, often with parts of others at the edges.
fn picture(dice: &mut Dice, class: usize) -> Vec<u8> {
    let kinds = kinds();
    let side = 64 + dice.below(49);
    let (width, height) = if dice.chance(0.5) { (side, side) } else { (side, (side as f32 * dice.between(0.8, 1.25)) as usize) };
    let mut canvas = Canvas::background(dice, width, height);
    canvas.clutter(dice, 3);
    let short = width.min(height) as f32;
    if dice.chance(0.35) {
        let (other, radius) = (dice.below(kinds.len()), short * dice.between(0.2, 0.35));
        let look = Look::new(dice, kinds[other], radius);
        let (x, y) = (if dice.chance(0.5) { 0.0 } else { width as f32 }, dice.unit() * height as f32);
        let _not_labelled = canvas.draw(&look, [x, y]);
    }
    let radius = 0.5 * short * dice.between(0.6, 1.12);
    let look = Look::new(dice, kinds[class], radius);
    let centre = [width as f32, height as f32].map(|length| length * (0.5 + 0.09 * dice.normal().clamp(-1.5, 1.5)));
    let _not_labelled = canvas.draw(&look, centre);
    canvas.clutter(dice, 1);
    canvas.light(dice);
    let quality = 60 + dice.below(36) as u8;
    canvas.finish(dice).to_jpeg(quality)
}

fn caption(dice: &mut Dice, class: usize) -> String {
    let kind = kinds()[class];
    let (shape, colour, pattern, name) = (SHAPES[kind.shape], COLOURS[kind.colour], PATTERNS[kind.pattern], kind.name());
    let noun = match pattern {
        "plain" => "one colour",
        "striped" => "stripes",
        "dotted" => "dots",
        _ => "checks",
    };
    let place = *dice.pick(&["on wood", "outdoors", "in the scene", "on a table", "by the wall", "in the grass"]);
    let text = match dice.below(12) {
        0 => format!("a photo of a {name}"),
        1 => format!("{name} {place}, stock photo"),
        2 => format!("a {colour} {pattern} {shape} {place}"),
        3 => format!("my new {shape} ({colour}, {noun})!!"),
        4 => format!("This is a {name}"),
        5 => format!("{colour} {shape} with {noun}"),
        6 => format!("There is a {name} {place}"),
        7 => format!("{} {} - {}", shape.to_uppercase(), colour, pattern),
        8 => format!("A Beautiful {name} | free shipping"),
        9 => format!("the {name} that we saw {place} &amp; liked"),
        10 => name,
        _ => format!("close-up of the {name}"),
    };
    match dice.below(50) {
        0 => format!("IMG_{:04}.JPG", dice.below(10_000)),
        1 => text.chars().take(9).collect(),
        2 => format!("{text} &#8211; caf\u{c3}\u{a9} caf\u{e9} \u{1f426}"),
        _ => text,
    }
}
