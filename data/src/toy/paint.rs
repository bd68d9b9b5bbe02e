//! Pixels: backgrounds, clutter, objects, light and noise.

use super::{Dice, Kind};
use crate::images::Image;

/// Sides of the grid on which a pixel's coverage by an object is sampled.
const SAMPLES: usize = 3;

/// An RGB picture in the making, values around 0 to 1.
pub(super) struct Canvas {
    pub(super) width: usize,
    pub(super) height: usize,
    pixels: Vec<[f32; 3]>,
}

/// Which pixels an object covers.
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
        self.covered.iter().filter(|covered| **covered).count()
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

/// How one object looks.
pub(super) struct Look {
    kind: Kind,
    radius: f32,
    /// Radians.
    turn: f32,
    colour: [f32; 3],
    second: [f32; 3],
    phase: [f32; 2],
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
        Self { kind, radius, turn: dice.between(-0.25, 0.25), colour, second, phase: [dice.unit(), dice.unit()] }
    }

    /// A point of the picture in the object's own frame, where it reaches from -1 to 1.
    fn local(&self, x: f32, y: f32) -> [f32; 2] {
        let (sin, cos) = self.turn.sin_cos();
        [(cos * x + sin * y) / self.radius, (cos * y - sin * x) / self.radius]
    }

    fn holds(&self, [u, v]: [f32; 2]) -> bool {
        let squared = u * u + v * v;
        match self.kind.shape {
            0 => squared < 0.92,
            1 => u.abs().max(v.abs()) < 0.82,
            2 => v < 0.75 && v > -0.95 + 1.95 * u.abs(),
            3 => squared < star_radius(v.atan2(u)).powi(2),
            4 => (u.abs() < 0.32 && v.abs() < 0.95) || (v.abs() < 0.32 && u.abs() < 0.95),
            _ => (0.30..0.95).contains(&squared),
        }
    }

    fn colour_at(&self, [u, v]: [f32; 2]) -> [f32; 3] {
        let wave = |position: f32, phase: f32, count: f32| ((position + 1.0) * 0.5 * count + phase).rem_euclid(1.0);
        let is_second = match self.kind.pattern {
            0 => false,
            1 => wave(v, self.phase[0], 4.0) < 0.42,
            2 => {
                let [a, b] = [wave(u, self.phase[0], 3.5) - 0.5, wave(v, self.phase[1], 3.5) - 0.5];
                a * a + b * b < 0.075
            }
            _ => (wave(u, self.phase[0], 2.2) < 0.5) ^ (wave(v, self.phase[1], 2.2) < 0.5),
        };
        if is_second { self.second } else { self.colour }
    }

    /// The outline `[x, y, x, y, ...]`; none for a shape with a hole.
    pub(super) fn polygon(&self, [x, y]: [f32; 2]) -> Option<Vec<f64>> {
        let circle = |n: usize, radius: &dyn Fn(f32) -> f32| -> Vec<[f32; 2]> {
            let corner = |corner: usize| {
                let angle = corner as f32 / n as f32 * std::f32::consts::TAU;
                [radius(angle) * angle.cos(), radius(angle) * angle.sin()]
            };
            (0..n).map(corner).collect()
        };
        let corners: Vec<[f32; 2]> = match self.kind.shape {
            0 => circle(32, &|_| 0.92_f32.sqrt()),
            1 => vec![[-0.82, -0.82], [0.82, -0.82], [0.82, 0.82], [-0.82, 0.82]],
            2 => vec![[0.0, -0.95], [1.7 / 1.95, 0.75], [-1.7 / 1.95, 0.75]],
            3 => circle(60, &star_radius),
            4 => {
                let (a, b) = (0.32, 0.95);
                vec![[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]
            }
            _ => return None,
        };
        let (sin, cos) = self.turn.sin_cos();
        let place = |[u, v]: [f32; 2]| {
            let [px, py] = [x + self.radius * (cos * u - sin * v), y + self.radius * (sin * u + cos * v)];
            // Two decimals, as in COCO.
            [px, py].map(|value| (f64::from(value) * 100.0).round() / 100.0)
        };
        Some(corners.into_iter().flat_map(place).collect())
    }
}

/// Five points between 0.42 and 0.98.
fn star_radius(angle: f32) -> f32 {
    let fifth = std::f32::consts::TAU / 5.0;
    let from_point = ((angle + std::f32::consts::FRAC_PI_2).rem_euclid(fifth) / fifth - 0.5).abs() * 2.0;
    0.42 + 0.56 * from_point
}

/// Smooth noise in [0, 1]: random values on a grid, joined smoothly.
struct Noise {
    values: Vec<f32>,
    columns: usize,
    cell: f32,
}

impl Noise {
    fn new(dice: &mut Dice, width: usize, height: usize, cell: f32) -> Self {
        let columns = (width as f32 / cell) as usize + 2;
        let rows = (height as f32 / cell) as usize + 2;
        Self { values: (0..columns * rows).map(|_| dice.unit()).collect(), columns, cell }
    }

    fn at(&self, x: f32, y: f32) -> f32 {
        let (x, y) = (x / self.cell, y / self.cell);
        let (column, row) = (x as usize, y as usize);
        let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
        let (a, b) = (smooth(x.fract()), smooth(y.fract()));
        let value = |row: usize, column: usize| self.values[row * self.columns + column];
        let line = |row: usize| value(row, column) * (1.0 - a) + value(row, column + 1) * a;
        line(row) * (1.0 - b) + line(row + 1) * b
    }
}

fn mix(a: [f32; 3], b: [f32; 3], t: f32) -> [f32; 3] {
    std::array::from_fn(|channel| a[channel] * (1.0 - t) + b[channel] * t)
}

/// The colours of walls, ground and cloth: never as strong as an object's.
fn muted(dice: &mut Dice) -> [f32; 3] {
    let grey = dice.between(0.22, 0.82);
    [0, 1, 2].map(|_| grey + dice.between(-0.11, 0.11))
}

impl Canvas {
    /// A textured background.
    pub(super) fn background(dice: &mut Dice, width: usize, height: usize) -> Self {
        let (first, second, third) = (muted(dice), muted(dice), muted(dice));
        let coarse = Noise::new(dice, width, height, dice_cell(width, 0.33));
        let middle = Noise::new(dice, width, height, dice_cell(width, 0.08));
        let fine = Noise::new(dice, width, height, 3.0);
        let style = dice.below(5);
        let (frequency, angle) = (dice.between(0.05, 0.25), dice.between(0.0, std::f32::consts::PI));
        let horizon = dice.between(0.3, 0.7) * height as f32;
        let (sin, cos) = angle.sin_cos();
        let colour = |x: f32, y: f32| -> [f32; 3] {
            let (rough, medium) = (coarse.at(x, y), middle.at(x, y));
            let base = match style {
                // Plaster.
                0 => mix(first, second, 0.7 * rough + 0.3 * medium),
                // Planks.
                1 => {
                    let along = (x * cos + y * sin) * frequency;
                    let grain = ((along * 6.0 + 4.0 * medium).sin() * 0.5 + 0.5) * 0.35;
                    let seam = if along.rem_euclid(4.0) < 0.25 { 0.35 } else { 0.0 };
                    mix(first, second, grain + seam)
                }
                // Sky over ground.
                2 => {
                    let edge = horizon + 12.0 * (rough - 0.5);
                    if y < edge { mix(first, second, y / edge * 0.8) } else { mix(third, second, medium * 0.6) }
                }
                // Cloth.
                3 => {
                    let weave = ((x * frequency * 4.0).sin() * (y * frequency * 4.0).sin()) * 0.5 + 0.5;
                    mix(first, second, 0.35 * weave + 0.4 * rough)
                }
                // Leaves.
                _ => mix(mix(first, second, medium), third, (rough * 1.6 - 0.4).clamp(0.0, 1.0)),
            };
            base.map(|value| value + 0.10 * (fine.at(x, y) - 0.5) + 0.08 * (medium - 0.5))
        };
        let pixels = (0..width * height).map(|pixel| colour((pixel % width) as f32, (pixel / width) as f32)).collect();
        Self { width, height, pixels }
    }

    /// Thin lines and faint patches that are no objects.
    pub(super) fn clutter(&mut self, dice: &mut Dice, most: usize) {
        for _ in 0..dice.below(most + 1) {
            let colour = muted(dice);
            let opacity = dice.between(0.25, 0.7);
            let (x, y) = (dice.unit() * self.width as f32, dice.unit() * self.height as f32);
            let (sin, cos) = dice.between(0.0, std::f32::consts::PI).sin_cos();
            let short = self.width.min(self.height) as f32;
            let (length, thickness) = if dice.chance(0.6) {
                (dice.between(0.2, 1.2) * short, dice.between(0.004, 0.012) * short)
            } else {
                (dice.between(0.05, 0.25) * short, dice.between(0.04, 0.15) * short)
            };
            for (place, pixel) in self.pixels.iter_mut().enumerate() {
                let (dx, dy) = ((place % self.width) as f32 - x, (place / self.width) as f32 - y);
                let (along, across) = (cos * dx + sin * dy, cos * dy - sin * dx);
                let inside = (length / 2.0 - along.abs() + 0.5).min(thickness.max(0.8) - across.abs() + 0.5).clamp(0.0, 1.0);
                if inside > 0.0 {
                    *pixel = mix(*pixel, colour, inside * opacity);
                }
            }
        }
    }

    /// Paints an object with its shadow and returns what it covers: pixels of which at least half is inside.
    pub(super) fn draw(&mut self, look: &Look, [x, y]: [f32; 2]) -> Mask {
        let mut mask = Mask::empty(self.width, self.height);
        let reach = 1.35 * look.radius + 2.0;
        let rows = (y - reach).max(0.0) as usize..((y + reach).ceil().max(0.0) as usize).min(self.height);
        let columns = (x - reach).max(0.0) as usize..((x + reach).ceil().max(0.0) as usize).min(self.width);
        let shadow = 0.07 * look.radius;
        for row in rows {
            for column in columns.clone() {
                let (mut n_inside, mut n_shadow, mut sum) = (0, 0, [0.0; 3]);
                for sample in 0..SAMPLES * SAMPLES {
                    let offset = |step: usize| (step as f32 + 0.5) / SAMPLES as f32;
                    let dx = column as f32 + offset(sample % SAMPLES) - x;
                    let dy = row as f32 + offset(sample / SAMPLES) - y;
                    let local = look.local(dx, dy);
                    if look.holds(local) {
                        n_inside += 1;
                        // A little roundness: lighter towards the upper left.
                        let shade = 1.0 - 0.10 * (local[0] + local[1]);
                        let colour = look.colour_at(local);
                        sum = std::array::from_fn(|channel| sum[channel] + colour[channel] * shade);
                    } else if look.holds(look.local(dx - shadow, dy - shadow)) {
                        n_shadow += 1;
                    }
                }
                let total = (SAMPLES * SAMPLES) as f32;
                let pixel = &mut self.pixels[row * self.width + column];
                if n_shadow > 0 {
                    *pixel = mix(*pixel, [0.0; 3], 0.35 * n_shadow as f32 / total);
                }
                if n_inside > 0 {
                    let inside = n_inside as f32 / total;
                    *pixel = mix(*pixel, sum.map(|value| value / n_inside as f32), inside);
                    mask.covered[row * self.width + column] = 2 * n_inside >= SAMPLES * SAMPLES;
                }
            }
        }
        mask
    }

    /// Light from one side, a tint, and darker corners.
    pub(super) fn light(&mut self, dice: &mut Dice) {
        let (sin, cos) = dice.between(0.0, std::f32::consts::TAU).sin_cos();
        let (strength, vignette, exposure) = (dice.between(0.0, 0.28), dice.between(0.0, 0.3), dice.between(0.82, 1.12));
        let tint = [0, 1, 2].map(|_| dice.between(0.95, 1.05));
        for (place, pixel) in self.pixels.iter_mut().enumerate() {
            let u = (place % self.width) as f32 / self.width as f32 * 2.0 - 1.0;
            let v = (place / self.width) as f32 / self.height as f32 * 2.0 - 1.0;
            let gain = exposure * (1.0 + strength * (cos * u + sin * v)) * (1.0 - vignette * (u * u + v * v) * 0.5);
            *pixel = std::array::from_fn(|channel| pixel[channel] * gain * tint[channel]);
        }
    }

    /// Sensor noise, and 8 bits.
    pub(super) fn finish(self, dice: &mut Dice) -> Image {
        let noise = dice.between(0.004, 0.025);
        let mut rgb = Vec::with_capacity(3 * self.pixels.len());
        for pixel in &self.pixels {
            let grain = dice.normal() * noise;
            rgb.extend(pixel.map(|value| ((value + grain) * 255.0).round().clamp(0.0, 255.0) as u8));
        }
        Image { width: self.width as u32, height: self.height as u32, rgb }
    }
}

/// A grid cell as a part of the picture's width, at least 2 px.
fn dice_cell(width: usize, part: f32) -> f32 {
    (width as f32 * part).max(2.0)
}
