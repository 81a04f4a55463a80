//! Loss curves as an SVG file.
//!
//! The picture has no background of its own: all colours stand out from white and from black.

use crate::failure::{Failure, Result};
use crate::io::write_file;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;
use std::error::Error;
use std::ops::Range;
use std::path::Path;

/// What a training run has shown so far: steps and losses.
#[derive(Default)]
pub(crate) struct Curve {
    pub(crate) train: Vec<(u64, f64)>,
    pub(crate) valid: Vec<(u64, f64)>,
    pub(crate) best: Option<(u64, f64)>,
}

impl Curve {
    /// Adds a step; `best`: its validation loss is the lowest so far.
    pub(crate) fn add(&mut self, step: u64, loss: f64, valid: Option<f64>, best: bool) {
        self.train.push((step, loss));
        if let Some(valid) = valid {
            self.valid.push((step, valid));
            if best {
                self.best = Some((step, valid));
            }
        }
    }
}

const SIZE: (u32, u32) = (900, 520);
const INK: RGBColor = RGBColor(128, 128, 128);
const TRAIN: RGBColor = RGBColor(59, 130, 246);
const VALID: RGBColor = RGBColor(232, 89, 12);
/// Points of a line at most: more are not visible, and files stay small.
const MAX_POINTS: usize = 1000;
/// Losses that differ more than this are shown on a logarithmic axis, so that the end of the curve is not a flat line.
const LOG_RATIO: f64 = 10.0;

/// Writes the file, which appears complete or not at all.
pub(crate) fn write(path: &Path, curve: &Curve, title: &str) -> Result<()> {
    // The backend writes to memory, where nothing fails.
    let svg = draw(curve, title).map_err(|e| Failure::File {
        path: path.to_owned(),
        source: std::io::Error::other(e.to_string()),
    })?;
    write_file(path, |out| out.write_all(svg.as_bytes()))
}

fn draw(curve: &Curve, title: &str) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    Picture::new(curve).draw(&mut svg, title)?;
    Ok(svg)
}

type Points = Vec<(f64, f64)>;

/// The curves as they are drawn.
struct Picture {
    /// Every step; empty where the smooth line shows it already.
    raw: Points,
    smooth: Points,
    /// Steps that each point of the smooth line is the mean of.
    window: usize,
    valid: Points,
    best: Option<(f64, f64)>,
    x: Axis,
    y: Axis,
}

/// An axis with ticks where people like them.
#[derive(Clone)]
struct Axis {
    range: Range<f64>,
    logarithmic: bool,
    ticks: Vec<f64>,
}

impl Axis {
    /// Steps are whole numbers.
    fn steps(bounds: (f64, f64)) -> Self {
        let range = widen(bounds, false);
        Self {
            ticks: linear_ticks(&range, 9.0, 1.0)
                .into_iter()
                .filter(|&step| step >= 0.0)
                .collect(),
            logarithmic: false,
            range,
        }
    }

    fn losses(bounds: (f64, f64), logarithmic: bool) -> Self {
        let mut range = widen(bounds, logarithmic);
        if bounds.0 >= 0.0 {
            range.start = range.start.max(0.0);
        }
        Self {
            ticks: match logarithmic {
                true => log_ticks(&range),
                false => linear_ticks(&range, 7.0, 0.0),
            },
            logarithmic,
            range,
        }
    }

    /// From 0 to 1 within the range.
    fn position(&self, value: f64) -> f64 {
        let Range { start, end } = self.range;
        match self.logarithmic {
            true => (value / start).ln() / (end / start).ln(),
            false => (value - start) / (end - start),
        }
    }
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        from + (self.position(*value) * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl Picture {
    fn new(curve: &Curve) -> Self {
        let train = finite(&curve.train);
        let valid = thin_out(&finite(&curve.valid));
        let window = (train.len() / 20).min(200) | 1;
        let smooth = thin_out(&moving_mean(&train, window));
        let raw = match window {
            1 => Vec::new(),
            _ => extremes(&train),
        };
        let shown = || smooth.iter().chain(&valid);
        let (low, high) = bounds(shown().map(|p| p.1));
        let logarithmic = low > 0.0 && high / low > LOG_RATIO;
        // Single steps may lie far outside: they do not get to flatten the rest.
        let mut y = with_most(&raw, low, high);
        if logarithmic {
            // The logarithm of 0 has no place at all.
            y.0 = y.0.max(low / 10.0);
        }
        Self {
            x: Axis::steps(bounds(shown().map(|p| p.0))),
            y: Axis::losses(y, logarithmic),
            best: curve.best.map(|(step, loss)| (step as f64, loss)),
            raw,
            smooth,
            window,
            valid,
        }
    }

    fn draw(&self, svg: &mut String, title: &str) -> Result<(), Box<dyn Error>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let text = |size: u32| ("sans-serif", size).into_font().color(&INK);
        let title: String = title.chars().take(100).collect();
        root.draw(&Text::new(title, (78, 16), text(22)))?;
        self.draw_legend(&root)?;

        let mut chart = ChartBuilder::on(&root)
            .margin_top(72)
            .margin_left(14)
            .margin_right(24)
            .margin_bottom(8)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .bold_line_style(INK.mix(0.25))
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .label_style(text(16))
            .axis_desc_style(text(17))
            .x_desc("step")
            .y_desc(match self.y.logarithmic {
                true => "loss per token (logarithmic)",
                false => "loss per token",
            })
            .x_labels(self.x.ticks.len())
            .y_labels(self.y.ticks.len())
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|&y| label(&self.y, y))
            .draw()?;

        let Range { start, end } = self.y.range;
        let inside = |points: &[(f64, f64)]| -> Points {
            let clamp = |&(x, y): &(f64, f64)| (x, y.clamp(start, end));
            points.iter().map(clamp).collect()
        };
        chart.draw_series(LineSeries::new(inside(&self.raw), TRAIN.mix(0.45)))?;
        chart.draw_series(LineSeries::new(inside(&self.smooth), TRAIN.stroke_width(2)))?;
        // One point is no line.
        let single = self.smooth.iter().filter(|_| self.smooth.len() == 1);
        chart.draw_series(single.map(|&p| Circle::new(p, 3, TRAIN.filled())))?;
        let valid = inside(&self.valid);
        chart.draw_series(LineSeries::new(valid.clone(), VALID.stroke_width(2)))?;
        // Many points would merge into a band.
        if valid.len() <= 60 {
            chart.draw_series(valid.iter().map(|&p| Circle::new(p, 3, VALID.filled())))?;
        }
        let best = self.best.filter(|b| b.1.is_finite());
        chart.draw_series(
            best.iter()
                .map(|&p| Circle::new(p, 8, VALID.stroke_width(2))),
        )?;
        root.present()?;
        Ok(())
    }

    /// One row above the chart, where no curve gets in its way.
    fn draw_legend(&self, root: &DrawingArea<SVGBackend, Shift>) -> Result<(), Box<dyn Error>> {
        let (mut x, y) = (78, 54);
        let mut entry =
            |label: String, line: Option<ShapeStyle>, circle: Option<(i32, ShapeStyle)>| {
                if let Some(style) = line {
                    root.draw(&PathElement::new(vec![(x, y), (x + 24, y)], style))?;
                }
                if let Some((radius, style)) = circle {
                    root.draw(&Circle::new((x + 12, y), radius, style))?;
                }
                let style = ("sans-serif", 17).into_font().color(&INK);
                root.draw(&Text::new(label.clone(), (x + 32, y - 8), style))?;
                // Nobody knows the font of the viewer: a generous mean width.
                x += 32 + 8 * label.chars().count() as i32 + 20;
                Ok::<_, Box<dyn Error>>(())
            };
        if !self.raw.is_empty() {
            let label = "training, each step".to_owned();
            entry(label, Some(TRAIN.mix(0.45).into()), None)?;
        }
        if !self.smooth.is_empty() {
            let label = match self.window {
                1 => "training".to_owned(),
                n => format!("mean of {n} steps"),
            };
            entry(label, Some(TRAIN.stroke_width(2)), None)?;
        }
        if !self.valid.is_empty() {
            let (line, point) = (VALID.stroke_width(2), (3, VALID.filled()));
            entry("validation".to_owned(), Some(line), Some(point))?;
        }
        if let Some((step, loss)) = self.best {
            let label = format!("best: {loss:.4} at step {step}");
            entry(label, None, Some((7, VALID.stroke_width(2))))?;
        }
        Ok(())
    }
}

fn finite(points: &[(u64, f64)]) -> Points {
    points
        .iter()
        .filter(|p| p.1.is_finite())
        .map(|&(step, loss)| (step as f64, loss))
        .collect()
}

/// The mean of `window` (odd) points around each, of fewer at both ends.
fn moving_mean(points: &[(f64, f64)], window: usize) -> Points {
    let mut sums = vec![0.0];
    for (_, y) in points {
        sums.push(sums[sums.len() - 1] + y);
    }
    (0..points.len())
        .map(|i| {
            let from = i.saturating_sub(window / 2);
            let to = (i + window / 2 + 1).min(points.len());
            (points[i].0, (sums[to] - sums[from]) / (to - from) as f64)
        })
        .collect()
}

/// At most [`MAX_POINTS`], the last one among them.
fn thin_out(points: &[(f64, f64)]) -> Points {
    let every = points.len().div_ceil(MAX_POINTS).max(1);
    points
        .chunks(every)
        .map(|chunk| chunk[chunk.len() - 1])
        .collect()
}

/// At most [`MAX_POINTS`] that reach as low and as high as all of them.
fn extremes(points: &[(f64, f64)]) -> Points {
    let every = (2 * points.len()).div_ceil(MAX_POINTS).max(2);
    points
        .chunks(every)
        .flat_map(|chunk| {
            let (low, high) = bounds(chunk.iter().map(|p| p.1));
            [(chunk[0].0, high), (chunk[chunk.len() - 1].0, low)]
        })
        .collect()
}

fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    })
}

/// `low` and `high`, moved apart until all but a hundredth of the points on either side lie between them.
fn with_most(points: &[(f64, f64)], low: f64, high: f64) -> (f64, f64) {
    let mut sorted: Vec<f64> = points.iter().map(|p| p.1).collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => (low, high),
        n => (low.min(sorted[n / 100]), high.max(sorted[n - 1 - n / 100])),
    }
}

/// A range with some room at both ends, whatever the bounds.
fn widen((low, high): (f64, f64), logarithmic: bool) -> Range<f64> {
    if low > high {
        return 0.0..1.0;
    }
    if logarithmic && low > 0.0 {
        let room = (high / low).powf(0.04);
        return low / room..high * room;
    }
    let room = match high - low {
        0.0 => 0.5 * low.abs().max(1.0),
        width => 0.03 * width,
    };
    low - room..high + room
}

/// Multiples of 1, 2 or 5 times a power of ten, not less than `smallest`, about `count` of them.
fn linear_ticks(range: &Range<f64>, count: f64, smallest: f64) -> Vec<f64> {
    let rough = (range.end - range.start) / count;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|&step| step >= rough)
        .unwrap_or(rough)
        .max(smallest);
    let (first, last) = ((range.start / step).ceil(), (range.end / step).floor());
    (first as i64..=last as i64)
        .map(|i| i as f64 * step)
        .collect()
}

/// Powers of ten, and multiples of them as long as there is room.
fn log_ticks(range: &Range<f64>) -> Vec<f64> {
    let powers = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
    let with = |multiples: &'static [f64]| -> Vec<f64> {
        powers
            .clone()
            .flat_map(|p| multiples.iter().map(move |m| m * 10f64.powi(p)))
            .filter(|y| range.contains(y))
            .collect()
    };
    let sets: [&[f64]; 2] = [&[1.0, 2.0, 3.0, 5.0, 7.0], &[1.0, 2.0, 5.0]];
    sets.into_iter()
        .map(with)
        .find(|ticks| ticks.len() <= 9)
        .unwrap_or_else(|| with(&[1.0]))
}

/// Labels of one length on a linear axis; of their own length on a logarithmic one, where 0.01 may stand beside 5.
fn label(axis: &Axis, value: f64) -> String {
    let closest = axis
        .ticks
        .windows(2)
        .map(|pair| pair[1] - pair[0])
        .fold(f64::INFINITY, f64::min);
    let digits = |step: f64| (-step.log10() - 1e-9).ceil().clamp(0.0, 9.0) as usize;
    match axis.logarithmic {
        true => format!("{value:.*}", digits(value)),
        false => format!("{value:.*}", digits(closest.min(1e9))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(losses: impl IntoIterator<Item = f64>) -> Curve {
        let mut curve = Curve::default();
        for (i, loss) in losses.into_iter().enumerate() {
            let valid = (i % 10 == 9).then_some(loss * 1.1);
            curve.add(i as u64 + 1, loss, valid, i == 19);
        }
        curve
    }

    #[test]
    fn every_curve_can_be_drawn() {
        let falling = |n: usize| (0..n).map(move |i| 3.0 * (-0.01 * i as f64).exp());
        for curve in [
            Curve::default(),
            curve([1.0]),
            curve([0.0, 0.0, 0.0]),
            curve([f64::NAN, 2.0, f64::INFINITY, 1.0]),
            curve(falling(300)),
            curve(falling(100_000)),
        ] {
            let svg = draw(&curve, "a <b> & \"c\"").unwrap();
            assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
            assert!(svg.contains("a &lt;b&gt; &amp; "), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.len() < 100_000, "{}", svg.len());
        }
    }

    #[test]
    fn losses_of_several_magnitudes_get_a_logarithmic_axis() {
        let narrow = Picture::new(&curve([2.0, 1.5, 1.0]));
        assert!(!narrow.y.logarithmic);
        assert_eq!(label(&narrow.y, narrow.y.ticks[0]), "1.0");
        let wide = Picture::new(&curve([3.0, 0.4, 0.02]));
        assert!(wide.y.logarithmic);
        let labels: Vec<_> = wide.y.ticks.iter().map(|&t| label(&wide.y, t)).collect();
        assert_eq!(labels, ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]);
    }

    #[test]
    fn smoothing_keeps_the_level_and_loses_no_step() {
        let points: Points = (0..100).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let smooth = moving_mean(&points, 21);
        assert_eq!(smooth.len(), points.len());
        assert!(
            smooth.iter().all(|p| (p.1 - 0.5).abs() < 0.06),
            "{smooth:?}"
        );
    }
}
