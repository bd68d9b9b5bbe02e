//! Pixels: backgrounds, clutter, objects, light, the lens and the sensor.
//!
//! Every outline is a signed distance, in px and positive inside, so that one evaluation a pixel gives a smooth edge.

use rand_chacha::rand_core::RngCore as _;

use super::{Dice, Kind};
use crate::images::Image;

/// An RGB picture in the making, values around 0 to 1.
pub(super) struct Canvas {
    pub(super) width: usize,
    pub(super) height: usize,
    pixels: Vec<[f32; 3]>,
    /// Whence the light comes, of length 1.
    sun: [f32; 2],
}

/// The pixels that an object covers.
#[derive(Debug, Clone)]
pub(super) struct Mask {
    pub(super) width: usize,
    pub(super) height: usize,
    /// Row by row.
    pub(super) covered: Vec<bool>,
}

impl Mask {
    pub(super) fn empty(width: usize, height: usize) -> Self {
        Self { width, height, covered: vec![false; width * height] }
    }

    pub(super) fn area(&self) -> usize {
        self.covered.iter().map(|covered| usize::from(*covered)).sum()
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.covered.iter_mut().zip(&other.covered).for_each(|(mine, theirs)| *mine |= theirs);
    }

    pub(super) fn remove(&mut self, other: &Self) {
        self.covered.iter_mut().zip(&other.covered).for_each(|(mine, theirs)| *mine &= !theirs);
    }

    /// Whether a circle lies inside the picture.
    pub(super) fn is_inside(&self, [x, y]: [f32; 2], radius: f32) -> bool {
        x - radius >= 0.0 && y - radius >= 0.0 && x + radius <= self.width as f32 && y + radius <= self.height as f32
    }
}

/// Radii of the star's points and notches, in the object's own frame.
const STAR: [f32; 2] = [0.98, 0.45];
/// Half the length and half the breadth of the cross's bars.
const CROSS: [f32; 2] = [0.95, 0.32];
const CIRCLE: f32 = 0.96;
const SQUARE: f32 = 0.82;
/// Outer and inner radius.
const RING: [f32; 2] = [0.97, 0.54];
/// Top, bottom, and how much a side falls for a step outwards.
const TRIANGLE: [f32; 3] = [-0.95, 0.75, 1.95];

/// How one object looks.
pub(super) struct Look {
    kind: Kind,
    radius: f32,
    /// Sine and cosine of its rotation.
    turn: [f32; 2],
    /// Height as a part of what it is seen from the front.
    tilt: f32,
    colour: [f32; 3],
    second: [f32; 3],
    /// Where its pattern begins, in periods.
    phase: [f32; 2],
    gloss: f32,
}

impl Look {
    pub(super) fn new(dice: &mut Dice, kind: Kind, radius: f32) -> Self {
        let base = match kind.colour {
            0 => [0.83, 0.10, 0.10],
            1 => [0.10, 0.58, 0.16],
            2 => [0.12, 0.25, 0.82],
            3 => [0.93, 0.84, 0.08],
            4 => [0.52, 0.13, 0.66],
            _ => [0.96, 0.50, 0.04],
        };
        let colour = base.map(|value| (value + dice.between(-0.05, 0.05)).clamp(0.0, 1.0));
        let second = [0.95, 0.94, 0.90].map(|value| value + dice.between(-0.05, 0.03));
        let (sin, cos) = dice.between(-0.25, 0.25).sin_cos();
        let (tilt, phase, gloss) = (dice.between(0.88, 1.0), [dice.unit(), dice.unit()], dice.between(0.0, 0.12));
        Self { kind, radius, turn: [sin, cos], tilt, colour, second, phase, gloss }
    }

    /// A point, by its offset from the centre in px, in the object's own frame, where it reaches from -1 to 1.
    fn local(&self, [x, y]: [f32; 2]) -> [f32; 2] {
        let [sin, cos] = self.turn;
        [(cos * x + sin * y) / self.radius, (cos * y - sin * x) / (self.radius * self.tilt)]
    }

    /// Distance to the outline in the object's own frame, positive inside.
    fn depth(&self, [u, v]: [f32; 2]) -> f32 {
        let from_centre = (u * u + v * v).sqrt();
        let (u_abs, v_abs) = (u.abs(), v.abs());
        match self.kind.shape {
            0 => CIRCLE - from_centre,
            1 => SQUARE - u_abs.max(v_abs),
            2 => {
                let [top, bottom, slope] = TRIANGLE;
                (bottom - v).min((v - top - slope * u_abs) / (1.0 + slope * slope).sqrt())
            }
            3 => star_depth(u_abs, -v),
            4 => {
                let [long, thin] = CROSS;
                (thin - u_abs).min(long - v_abs).max((long - u_abs).min(thin - v_abs))
            }
            _ => (RING[0] - from_centre).min(from_centre - RING[1]),
        }
    }

    fn colour_at(&self, [u, v]: [f32; 2]) -> [f32; 3] {
        // How far a place is from the nearest point where a wave of so many periods across the object is at its crest, in
        // the object's own frame.
        let to_crest = |position: f32, phase: f32, count: f32| {
            let t = position * 0.5 * count + phase;
            (t - nearest(t)).abs() * 2.0 / count
        };
        let soft = |depth: f32| (depth * self.radius + 0.5).clamp(0.0, 1.0);
        let second = match self.kind.pattern {
            0 => 0.0,
            1 => soft(0.11 - to_crest(v, self.phase[0], 4.0)),
            2 => {
                let [a, b] = [to_crest(u, self.phase[0], 3.5), to_crest(v, self.phase[1], 3.5)];
                soft(0.16 - (a * a + b * b).sqrt())
            }
            _ => {
                let [a, b] = [0, 1].map(|axis| soft(0.227 - to_crest([u, v][axis], self.phase[axis], 2.2)));
                a + b - 2.0 * a * b
            }
        };
        mix(self.colour, self.second, second)
    }

    /// The outline `[x, y, x, y, ...]`; none for a shape with a hole.
    pub(super) fn polygon(&self, [x, y]: [f32; 2]) -> Option<Vec<f64>> {
        let around = |n: usize, radius: &dyn Fn(usize) -> f32| -> Vec<[f32; 2]> {
            let corner = |corner: usize| {
                let (sin, cos) = (corner as f32 / n as f32 * std::f32::consts::TAU).sin_cos();
                [radius(corner) * sin, -radius(corner) * cos]
            };
            (0..n).map(corner).collect()
        };
        let corners: Vec<[f32; 2]> = match self.kind.shape {
            0 => around(32, &|_| CIRCLE),
            1 => vec![[-SQUARE, -SQUARE], [SQUARE, -SQUARE], [SQUARE, SQUARE], [-SQUARE, SQUARE]],
            2 => {
                let [top, bottom, slope] = TRIANGLE;
                vec![[0.0, top], [(bottom - top) / slope, bottom], [(top - bottom) / slope, bottom]]
            }
            3 => around(10, &|corner| STAR[corner % 2]),
            4 => {
                let [b, a] = CROSS;
                vec![[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]
            }
            _ => return None,
        };
        let [sin, cos] = self.turn;
        let place = |[u, v]: [f32; 2]| {
            let v = self.tilt * v;
            let [px, py] = [x + self.radius * (cos * u - sin * v), y + self.radius * (sin * u + cos * v)];
            // Two decimals, as in COCO.
            [px, py].map(|value| (f64::from(value) * 100.0).round() / 100.0)
        };
        Some(corners.into_iter().flat_map(place).collect())
    }
}

/// Depth inside a star that points up (v up), by folding it onto one half of one point.
fn star_depth(u_abs: f32, v: f32) -> f32 {
    let (cos, sin) = (0.809_017, 0.587_785_25);
    let [point, notch] = STAR;
    let right = 2.0 * (cos * u_abs - sin * v).max(0.0);
    let (u, v) = (u_abs - right * cos, v + right * sin);
    let left = 2.0 * (-cos * u - sin * v).max(0.0);
    let (u, v) = ((u + left * cos).abs(), v + left * sin);
    // The edge from the point (0, 0.98) to the notch, 36 degrees on.
    let (edge_u, edge_v) = (notch * sin, notch * cos - point);
    ((v - point) * edge_u - u * edge_v) / -(edge_u * edge_u + edge_v * edge_v).sqrt()
}

/// The whole number next to `t`, for |t| < 1000. (`f32::round` is a call into the C library on the oldest x86-64.)
fn nearest(t: f32) -> f32 {
    (t + 1000.5) as i32 as f32 - 1000.0
}

/// Nearly sin(2 pi t): two parabolas, the same on every platform.
fn wave(t: f32) -> f32 {
    let t = t - nearest(t);
    t * (8.0 - 16.0 * t.abs())
}

fn smooth(t: f32) -> f32 {
    t * t * (3.0 - 2.0 * t)
}

fn mix(a: [f32; 3], b: [f32; 3], t: f32) -> [f32; 3] {
    std::array::from_fn(|channel| a[channel] + (b[channel] - a[channel]) * t)
}

/// A number in [-0.5, 0.5) that looks random, for every pixel.
fn speckle(x: usize, y: usize, salt: u32) -> f32 {
    let mut bits = (x as u32).wrapping_mul(73_856_093) ^ (y as u32).wrapping_mul(19_349_663) ^ salt;
    bits = (bits ^ (bits >> 15)).wrapping_mul(0x2c1b_3c6d);
    bits = (bits ^ (bits >> 12)).wrapping_mul(0x297a_2d39);
    (bits >> 8) as f32 / (1 << 24) as f32 - 0.5
}

/// Smooth noise in [0, 1]: random values on a grid, joined smoothly.
struct Noise {
    values: Vec<f32>,
    columns: usize,
    /// Of every pixel column: its grid column, and how far it is towards the next.
    steps: Vec<(usize, f32)>,
    cell: f32,
}

impl Noise {
    /// `cell` is in px.
    fn new(dice: &mut Dice, width: usize, height: usize, cell: f32) -> Self {
        let columns = (width as f32 / cell) as usize + 2;
        let rows = (height as f32 / cell) as usize + 2;
        let values = (0..columns * rows).map(|_| dice.unit()).collect();
        Self { values, columns, steps: (0..width).map(|x| step(x, cell)).collect(), cell }
    }

    /// The noise of pixel row `y`.
    fn row(&self, y: usize, out: &mut Vec<f32>) {
        let (row, down) = step(y, self.cell);
        let (above, below) = self.values[row * self.columns..][..2 * self.columns].split_at(self.columns);
        let line: Vec<f32> = above.iter().zip(below).map(|(above, below)| above + (below - above) * down).collect();
        out.clear();
        out.extend(self.steps.iter().map(|(column, along)| line[*column] + (line[column + 1] - line[*column]) * along));
    }
}

fn step(position: usize, cell: f32) -> (usize, f32) {
    let at = position as f32 / cell;
    (at as usize, smooth(at - (at as usize) as f32))
}

/// The colours of walls, ground and cloth: never as strong as an object's.
fn muted(dice: &mut Dice) -> [f32; 3] {
    let grey = dice.between(0.2, 0.8);
    // Warm or cold rather than purple or green: red against blue.
    let (warmth, green) = (dice.between(-0.13, 0.16), dice.between(-0.03, 0.06));
    [grey + warmth, grey + green, grey - warmth]
}

/// The pattern of the background.
enum Ground {
    Plaster,
    Planks,
    Meadow,
    Cloth,
    Leaves,
    Tiles,
    Gravel,
    OutOfFocus,
}

impl Canvas {
    /// A textured background.
    pub(super) fn background(dice: &mut Dice, width: usize, height: usize) -> Self {
        use Ground::{Cloth, Gravel, Leaves, Meadow, OutOfFocus, Planks, Plaster, Tiles};
        let (first, second, third) = (muted(dice), muted(dice), muted(dice));
        let long = width.max(height) as f32;
        let noises = [0.3, 0.09, 0.03, 0.011].map(|part| Noise::new(dice, width, height, (long * part).max(2.0)));
        let ground = [Plaster, Planks, Meadow, Cloth, Leaves, Tiles, Gravel, OutOfFocus].into_iter().nth(dice.below(8)).unwrap_or(Plaster);
        let (sin, cos) = dice.between(0.0, std::f32::consts::PI).sin_cos();
        let period = dice.between(0.12, 0.28) * long;
        let thread = dice.between(4.0, 7.0);
        let horizon = dice.between(0.25, 0.65) * height as f32;
        let (roughness, salt) = (dice.between(0.04, 0.16), dice.0.next_u32());
        let (sun_y, sun_x) = dice.between(0.0, std::f32::consts::TAU).sin_cos();

        let colour = |x: f32, y: f32, [coarse, medium, fine, finest]: [f32; 4]| -> [f32; 3] {
            match ground {
                Plaster => mix(first, second, 0.6 * coarse + 0.25 * medium + 0.15 * fine),
                Planks => {
                    let across = (x * cos + y * sin) / period;
                    let plank = nearest(across);
                    let to_seam = (across - plank + 0.5).min(plank + 0.5 - across) * period;
                    // Rings of the wood, bent by the noise and different in every plank.
                    let rings = wave(across * 5.0 + 1.6 * coarse + 0.5 * medium + 0.37 * plank);
                    let wood = mix(first, second, 0.35 + 0.2 * rings + 0.25 * wave(plank * 0.381) + 0.15 * fine);
                    mix(wood, wood.map(|value| 0.4 * value), (1.5 - to_seam).clamp(0.0, 1.0))
                }
                Meadow => {
                    let edge = horizon + 0.06 * long * (medium - 0.5);
                    let sky = mix(first, [0.80, 0.86, 0.92], 0.4 + 0.5 * coarse);
                    let near = ((y - edge) / (height as f32 - edge)).clamp(0.0, 1.0);
                    let grass = mix(third, second, 0.1 + 0.35 * finest + 0.3 * fine + 0.25 * medium);
                    let grass = grass.map(|value| value * (0.75 + 0.3 * near));
                    mix(sky, grass, (y - edge + 0.5).clamp(0.0, 1.0))
                }
                Cloth => {
                    let (along, across) = (x * cos + y * sin, y * cos - x * sin);
                    let fold = wave(along / (2.0 * period) + 0.8 * coarse);
                    let weave = wave(along / thread) * wave(across / thread);
                    mix(first, second, 0.4 + 0.16 * weave + 0.22 * fold + 0.2 * (medium - 0.5))
                }
                Leaves => {
                    let leaf = mix(first, second, 0.55 * fine + 0.45 * finest);
                    mix(leaf, third.map(|value| 0.55 * value), (2.0 * (0.5 * medium + 0.3 * fine + 0.2 * finest) - 0.7).clamp(0.0, 0.9))
                }
                Tiles => {
                    let (along, across) = ((x * cos + y * sin) / period, (y * cos - x * sin) / period);
                    let (column, row) = (nearest(along), nearest(across));
                    let to_seam = 0.5 - (along - column).abs().max((across - row).abs());
                    let tile = mix(first, second, 0.3 + 0.12 * wave(0.31 * column + 0.47 * row) + 0.3 * coarse + 0.15 * fine);
                    mix(third, tile, (to_seam * period - 1.0).clamp(0.0, 1.0))
                }
                Gravel => {
                    let stone = mix(first, second, (1.8 * finest - 0.4).clamp(0.0, 1.0));
                    mix(stone, third, 0.4 * medium + 0.2 * fine)
                }
                OutOfFocus => mix(mix(first, second, smooth(coarse)), third, (3.0 * medium - 1.6).clamp(0.0, 1.0)),
            }
        };
        let is_soft = matches!(ground, OutOfFocus);
        let mut pixels = Vec::with_capacity(width * height);
        let mut rows = [const { Vec::new() }; 4];
        for y in 0..height {
            for (noise, row) in noises.iter().zip(&mut rows) {
                noise.row(y, row);
            }
            for x in 0..width {
                let noise = rows.each_ref().map(|row| row[x]);
                let rough = if is_soft { 0.0 } else { roughness * (speckle(x, y, salt) + noise[3] - 0.5) };
                pixels.push(colour(x as f32, y as f32, noise).map(|value| value + rough));
            }
        }
        Self { width, height, pixels, sun: [sun_x, sun_y] }
    }

    /// Sticks, stones, leaves and paper that are no objects, up to `most`; some let the ground shine through.
    pub(super) fn clutter(&mut self, dice: &mut Dice, most: usize) {
        for _ in 0..dice.below(most + 1) {
            let opacity = if dice.chance(0.35) { dice.between(0.3, 0.7) } else { 1.0 };
            let _not_an_object = self.thing(dice, opacity);
        }
    }

    /// One such thing in front of everything, thin, and which pixels it hides.
    pub(super) fn occluder(&mut self, dice: &mut Dice) -> Mask {
        self.thing(dice, 1.0)
    }

    fn thing(&mut self, dice: &mut Dice, opacity: f32) -> Mask {
        let (first, second) = (muted(dice), muted(dice));
        let colour = if dice.chance(0.3) { first.map(|value| 0.35 * value) } else { first };
        let centre = [dice.unit() * self.width as f32, dice.unit() * self.height as f32];
        let (sin, cos) = dice.between(0.0, std::f32::consts::PI).sin_cos();
        let short = self.width.min(self.height) as f32;
        let sort = dice.below(4);
        let [long, thin] = match sort {
            // A stick or cable, a stone, a leaf, a scrap of paper: half length and half breadth.
            0 => [dice.between(0.12, 0.6), dice.between(0.005, 0.013)],
            1 => [dice.between(0.02, 0.07), dice.between(0.015, 0.05)],
            2 => [dice.between(0.05, 0.13), dice.between(0.015, 0.04)],
            _ => [dice.between(0.04, 0.11), dice.between(0.03, 0.09)],
        }
        .map(|part| (part * short).max(0.7));
        let bend = if sort == 0 { dice.between(-0.35, 0.35) } else { 0.0 };
        let frame = |[x, y]: [f32; 2]| {
            let along = cos * x + sin * y;
            [along, cos * y - sin * x + bend * along * along / long]
        };
        let depth = |offset: [f32; 2]| {
            let [along, across] = frame(offset).map(f32::abs);
            match sort {
                1 => (1.0 - ((along / long).powi(2) + (across / thin).powi(2)).sqrt()) * thin.min(long),
                2 => thin * (1.0 - (along / long).powi(2)) - across,
                _ => (long - along).min(thin - across),
            }
        };
        let paint = |offset: [f32; 2]| {
            let [along, across] = frame(offset);
            match sort {
                0 => colour.map(|value| value * (1.0 - 0.35 * across / thin)),
                1 => mix(colour, second, 0.15 + 0.15 * wave(along / long + 0.4 * across / thin)),
                // The vein of a leaf.
                2 => mix(colour, second, 0.5 * (1.0 - across.abs()).clamp(0.0, 1.0)),
                // Lines of writing.
                _ => mix(colour, second, 0.2 * (2.5 * wave(across / (0.3 * thin + 2.0)) - 1.5).clamp(0.0, 1.0)),
            }
        };
        self.stamp(centre, long.max(thin) * (1.0 + bend.abs()), 0.012 * short, opacity, depth, paint)
    }

    /// Paints an object with its shadow and returns what it covers: pixels of which at least half is inside.
    pub(super) fn draw(&mut self, look: &Look, centre: [f32; 2]) -> Mask {
        let sun = self.sun;
        let paint = |offset: [f32; 2]| {
            let local = look.local(offset);
            // A little roundness: lighter towards the light, with a soft reflection there.
            let towards = (sun[0] * offset[0] + sun[1] * offset[1]) / look.radius;
            let [du, dv] = [0, 1].map(|axis| offset[axis] / look.radius - 0.45 * sun[axis]);
            let shine = look.gloss * (1.0 - 1.5 * (du * du + dv * dv)).max(0.0).powi(2);
            look.colour_at(local).map(|value| value * (1.0 + 0.10 * towards) + shine)
        };
        let depth = |offset: [f32; 2]| look.depth(look.local(offset)) * look.radius;
        self.stamp(centre, 1.2 * look.radius, 0.08 * look.radius, 1.0, depth, paint)
    }

    /// Paints whatever has a positive depth around a centre, with a soft shadow of `height` px.
    fn stamp(
        &mut self,
        [x, y]: [f32; 2],
        reach: f32,
        height: f32,
        opacity: f32,
        depth: impl Fn([f32; 2]) -> f32,
        paint: impl Fn([f32; 2]) -> [f32; 3],
    ) -> Mask {
        let mut mask = Mask::empty(self.width, self.height);
        let reach = reach + 2.0 * height + 2.0;
        let span = |centre: f32, length: usize| (centre - reach).max(0.0) as usize..((centre + reach).max(0.0) as usize).min(length);
        let salt = (x * 64.0) as u32;
        for row in span(y, self.height) {
            for column in span(x, self.width) {
                let offset = [column as f32 + 0.5 - x, row as f32 + 0.5 - y];
                let inside = (depth(offset) + 0.5).clamp(0.0, 1.0);
                let pixel = &mut self.pixels[row * self.width + column];
                if inside < 1.0 {
                    let shifted = [offset[0] + height * self.sun[0], offset[1] + height * self.sun[1]];
                    let shadow = (depth(shifted) / (1.0 + 1.2 * height) + 0.5).clamp(0.0, 1.0);
                    *pixel = pixel.map(|value| value * (1.0 - 0.45 * opacity * shadow));
                }
                if inside > 0.0 {
                    let grain = 1.0 + 0.07 * speckle(column, row, salt);
                    *pixel = mix(*pixel, paint(offset).map(|value| value * grain), inside * opacity);
                    mask.covered[row * self.width + column] = inside >= 0.5;
                }
            }
        }
        mask
    }

    /// Light from one side, patches of shade, a tint, and darker corners.
    pub(super) fn light(&mut self, dice: &mut Dice) {
        let (strength, vignette, exposure) = (dice.between(0.0, 0.28), dice.between(0.0, 0.3), dice.between(0.82, 1.12));
        let tint = [0, 1, 2].map(|_| exposure * dice.between(0.95, 1.05));
        let shade = if dice.chance(0.5) { dice.between(0.1, 0.4) } else { 0.0 };
        let cell = dice.between(0.15, 0.4) * self.width.max(self.height) as f32;
        let patches = Noise::new(dice, self.width, self.height, cell);
        let mut patch_row = Vec::new();
        for (y, row) in self.pixels.chunks_exact_mut(self.width).enumerate() {
            patches.row(y, &mut patch_row);
            let v = y as f32 / self.height as f32 * 2.0 - 1.0;
            for (x, (pixel, patch)) in row.iter_mut().zip(&patch_row).enumerate() {
                let u = x as f32 / self.width as f32 * 2.0 - 1.0;
                let side = 1.0 + strength * (self.sun[0] * u + self.sun[1] * v);
                let dark = 1.0 - shade * smooth((2.5 * patch - 1.1).clamp(0.0, 1.0));
                let gain = side * dark * (1.0 - vignette * (u * u + v * v) * 0.5);
                *pixel = std::array::from_fn(|channel| pixel[channel] * gain * tint[channel]);
            }
        }
    }

    /// The lens's softness, the sensor's noise, and 8 bits.
    pub(super) fn finish(mut self, dice: &mut Dice) -> Image {
        let softness = dice.between(0.04, 0.2);
        self.soften(softness);
        let noise = dice.between(0.004, 0.022);
        let mut rgb = Vec::with_capacity(3 * self.pixels.len());
        for pixel in &self.pixels {
            // The sum of four bytes is nearly normal, with deviation 148; a byte of each colour on top.
            let [a, b, c, d, red, green, blue, _] = dice.0.next_u64().to_le_bytes();
            let grey = (f32::from(a) + f32::from(b) + f32::from(c) + f32::from(d) - 510.0) / 148.0;
            let grain = [red, green, blue].map(|byte| noise * (grey + (f32::from(byte) - 127.5) / 148.0));
            // The cast cuts off at 0 and 255.
            rgb.extend::<[u8; 3]>(std::array::from_fn(|channel| ((pixel[channel] + grain[channel]) * 255.0 + 0.5) as u8));
        }
        Image { width: self.width as u32, height: self.height as u32, rgb }
    }

    /// Each pixel gives a part to its neighbours, along rows and then columns.
    fn soften(&mut self, part: f32) {
        let blend = |before: [f32; 3], here: [f32; 3], after: [f32; 3]| -> [f32; 3] {
            std::array::from_fn(|channel| here[channel] + part * (before[channel] + after[channel] - 2.0 * here[channel]))
        };
        for row in self.pixels.chunks_exact_mut(self.width) {
            let mut before = row[0];
            for x in 0..row.len() {
                let (here, after) = (row[x], row[(x + 1).min(row.len() - 1)]);
                row[x] = blend(before, here, after);
                before = here;
            }
        }
        let mut above = self.pixels[..self.width].to_vec();
        for y in 0..self.height {
            let (upper, lower) = self.pixels.split_at_mut((y + 1) * self.width);
            for (x, pixel) in upper[y * self.width..].iter_mut().enumerate() {
                let here = *pixel;
                *pixel = blend(above[x], here, *lower.get(x).unwrap_or(&here));
                above[x] = here;
            }
        }
    }
}
