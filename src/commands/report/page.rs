//! The HTML page of a report: [`Gathered`] as text.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use ovenbird_cache::Artifact;
use ovenbird_data::evaluate::{Evaluation, GROUPS, Metric};
use ovenbird_stages::{FailedItem, artifacts::Curve};

use super::{
    gallery::Gallery,
    html::{escape, put},
};
use crate::{
    output::{count, duration},
    pipeline::step_id::StepId,
    results::{self, Comparison, Evaluated, compare},
    run_state::{RunState, StepState, StepStatus},
};

/// The content of the page.
pub(super) struct Gathered {
    pub(super) run: RunState,
    /// The steps that each step reads from, in the order of the run's steps.
    pub(super) after: Vec<Vec<StepId>>,
    /// Start and end of each step that ran, in s since the run's start.
    pub(super) spans: BTreeMap<StepId, (f64, f64)>,
    pub(super) bytes: BTreeMap<StepId, u64>,
    /// By step: seconds since the run's start, items done, views done, batches ready.
    pub(super) flow: BTreeMap<StepId, Vec<(f64, u64, u64, u64)>>,
    pub(super) artifacts: BTreeMap<StepId, Artifact>,
    pub(super) evaluations: Vec<Evaluated>,
    pub(super) trainings: Vec<(StepId, Curve)>,
    /// What steps retrieved, downloaded and relabelled.
    pub(super) sections: Vec<Box<dyn Section>>,
    pub(super) pictures: Option<Gallery>,
    /// The items that each step skipped.
    pub(super) skipped: BTreeMap<StepId, Vec<FailedItem>>,
    /// What could not be read.
    pub(super) unread: Vec<String>,
}

/// A part of a report about one step.
pub(super) trait Section {
    /// What the report shows by it: `STEP.PORT`.
    fn part(&self) -> String;

    fn render(&self, out: &mut String);
}

/// The element of a report that lists its parts.
const SHOWN: &str = "<meta name=\"ovenbird-shown\" content=\"";

/// The parts that a report shows.
pub(super) fn parts_of(html: &str) -> BTreeSet<String> {
    let list = html.split_once(SHOWN).and_then(|(_, rest)| rest.split_once('"')).map_or("", |(list, _)| list);
    list.split(' ').filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

impl Gathered {
    /// The parts that the page shows.
    pub(super) fn shown(&self) -> BTreeSet<String> {
        let evaluations = self.evaluations.iter().map(|it| format!("{}.{}", it.step, it.port));
        let trainings = self.trainings.iter().map(|(step, _)| format!("{step}.curve"));
        let artifacts = self.artifacts.keys().map(|step| format!("{step}.artifact"));
        let pictures = self.pictures.as_ref().filter(|pictures| pictures.has_images()).map(|_| "pictures".to_owned());
        let sections = self.sections.iter().map(|section| section.part());
        evaluations.chain(trainings).chain(artifacts).chain(sections).chain(pictures).collect()
    }
}

/// The page as HTML.
pub(super) fn render(gathered: &Gathered) -> String {
    let mut out = String::new();
    let run = &gathered.run;
    put!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">{SHOWN}{}\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>{} {}</title><style>{}</style><main>",
        escape(&gathered.shown().into_iter().collect::<Vec<_>>().join(" ")),
        escape(&run.pipeline),
        escape(&run.run),
        include_str!("style.css"),
    );
    header(&mut out, gathered);
    if !gathered.unread.is_empty() {
        out.push_str(
            "<section><h2>Not shown</h2><p>`ovenbird verify --full --fix` repairs damaged results; a run recomputes missing ones.</p><ul>",
        );
        gathered.unread.iter().for_each(|words| put!(out, "<li>{}</li>", escape(words)));
        out.push_str("</ul></section>");
    }
    if let Some(matrix) = &run.matrix {
        compare(matrix, &run.steps, &gathered.evaluations).iter().for_each(|comparison| side_by_side(&mut out, comparison));
    }
    for Evaluated { step, evaluation, .. } in &gathered.evaluations {
        put!(out, "<section><h2>{}</h2><p class=\"quiet\">{}</p>", escape(&step.to_string()), evaluation.title());
        groups(&mut out, evaluation);
        warnings(&mut out, &evaluation.warnings);
        curves(&mut out, evaluation);
        classes(&mut out, evaluation);
        out.push_str("</section>");
    }
    gathered.sections.iter().for_each(|section| section.render(&mut out));
    gathered.pictures.iter().for_each(|pictures| pictures.render(&mut out));
    skipped(&mut out, gathered);
    trainings(&mut out, gathered);
    graph(&mut out, gathered);
    timeline(&mut out, gathered);
    throughput(&mut out, gathered);
    flow(&mut out, gathered);
    manifests(&mut out, gathered);
    if !run.notices.is_empty() {
        out.push_str("<section><h2>Notes</h2><ul>");
        run.notices.iter().for_each(|notice| put!(out, "<li>{}</li>", escape(notice)));
        out.push_str("</ul></section>");
    }
    out.push_str("</main></html>\n");
    out
}

fn header(out: &mut String, gathered: &Gathered) {
    let run = &gathered.run;
    let outcome = run.outcome_words();
    put!(out, "<header><h1>{}</h1><p>{}</p>", escape(&run.pipeline), escape(&run.description));
    put!(
        out,
        "<p><span class=\"outcome {}\">{outcome}</span> run {}, started {}, ",
        outcome.split(' ').next().unwrap_or(""),
        escape(&run.run),
        escape(&run.started)
    );
    put!(out, "{}</p>", duration(run.wall_s));
    if let Some(artifact) = gathered.artifacts.values().next() {
        let made = &artifact.manifest.made;
        put!(
            out,
            "<p class=\"quiet\">{} on {} ({}), libtorch {}</p>",
            escape(&made.program),
            escape(&made.host),
            escape(&made.device),
            escape(&made.libtorch)
        );
    }
    put!(out, "<p class=\"quiet\"><code>ovenbird {}</code></p>", escape(&run.command));
    for step in run.steps.iter().filter(|step| step.state == StepStatus::Failed) {
        put!(out, "<p class=\"failure\"><strong>{} failed.</strong> {}</p>", escape(&step.id.to_string()), escape(&step.words));
    }
    left_out(out, gathered);
    out.push_str("</header>");
}

/// Says at the top that numbers are not of all images.
fn left_out(out: &mut String, gathered: &Gathered) {
    let n_all: usize = gathered.skipped.values().map(Vec::len).sum();
    if n_all > 0 {
        let of_step = |(step, items): (&StepId, &Vec<FailedItem>)| format!("{step} {}", items.len());
        let steps: Vec<String> = gathered.skipped.iter().map(of_step).collect();
        let (n_items, steps) = (count(n_all, "item"), escape(&steps.join(", ")));
        put!(out, "<p class=\"failure\"><a href=\"#skipped\">{n_items} skipped</a> ({steps}): the results are without them.</p>");
    }
    let mut evaluations: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for Evaluated { step, evaluation, .. } in &gathered.evaluations {
        if let Some(n_images @ 1..) = evaluation.n_images_without_detections {
            evaluations.entry(n_images).or_default().push(step.to_string());
        }
    }
    for (n_images, steps) in evaluations {
        let were = if n_images == 1 { "was" } else { "were" };
        let (n_images, steps) = (count(n_images, "image"), escape(&steps.join(", ")));
        put!(out, "<p class=\"failure\">{steps}: {n_images} {were} not looked at by the detector: its objects count as missed.</p>");
    }
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "–".into(), |value| format!("{:.1}", 100.0 * value))
}

/// Variants over seeds, and every seed beneath.
fn side_by_side(out: &mut String, comparison: &Comparison) {
    let Comparison { evaluation, of, rows, missing, .. } = comparison;
    let groups = comparison.groups();
    let name = |row: &results::Row| escape(row.variant.as_deref().unwrap_or("all"));
    put!(out, "<section><h2>{}: side by side</h2><p class=\"quiet\">{of}: {}</p>", escape(evaluation), escape(&comparison.legend()));
    out.push_str("<div class=\"wide\"><table><tr><th>variant</th>");
    groups.iter().for_each(|group| put!(out, "<th class=\"number\">{group}</th><th></th>"));
    let has_settings = rows.iter().any(|row| !row.settings.is_empty());
    out.push_str(if has_settings { "<th>settings</th></tr>" } else { "</tr>" });
    for row in rows {
        put!(out, "<tr><th>{}</th>", name(row));
        for group in &groups {
            let value = comparison.headline_of(row, group);
            let words = value.map_or_else(|| "–".into(), |value| value.over_seeds.to_string());
            let difference = value.and_then(|value| value.difference.as_ref()).map(results::Spread::signed);
            put!(out, "<td class=\"number\">{words}</td><td class=\"number\">{}</td>", difference.unwrap_or_default());
        }
        let settings: Vec<String> = row.settings.iter().map(|setting| format!("<code>{}</code>", escape(setting))).collect();
        if has_settings {
            put!(out, "<td class=\"words\">{}</td>", if settings.is_empty() { "as the file".into() } else { settings.join("<br>") });
        }
        out.push_str("</tr>");
    }
    out.push_str("</table></div>");
    missing.iter().for_each(|words| put!(out, "<p class=\"quiet\">Missing: {}</p>", escape(words)));
    warnings(out, &comparison.warnings);
    if !comparison.seeds.is_empty() {
        out.push_str("<details><summary>Every seed</summary><div class=\"wide\"><table><tr><th>variant</th><th class=\"number\">seed</th>");
        groups.iter().for_each(|group| put!(out, "<th class=\"number\">{group}</th>"));
        out.push_str("</tr>");
        for (row, seed) in rows.iter().flat_map(|row| comparison.seeds.iter().map(move |seed| (row, *seed))) {
            put!(out, "<tr><td>{}</td><td class=\"number\">{seed}</td>", name(row));
            for group in &groups {
                let values = comparison.headline_of(row, group).into_iter().flat_map(|value| &value.by_seed);
                let value = values.into_iter().find(|value| value.seed == Some(seed)).map(|value| value.value);
                put!(out, "<td class=\"number\">{}</td>", percent(value));
            }
            out.push_str("</tr>");
        }
        out.push_str("</table></div></details>");
    }
    out.push_str("</section>");
}

fn warnings(out: &mut String, warnings: &[String]) {
    warnings.iter().for_each(|words| put!(out, "<p class=\"failure\">Warning: {}</p>", escape(words)));
}

fn groups(out: &mut String, evaluation: &Evaluation) {
    out.push_str("<div class=\"wide\"><table><tr><th>classes</th>");
    Metric::columns(evaluation.groups.values()).for_each(|(name, _)| put!(out, "<th class=\"number\">{name}</th>"));
    out.push_str("</tr>");
    for name in GROUPS {
        let Some(group) = evaluation.groups.get(name) else { continue };
        put!(out, "<tr class=\"{name}\"><th>{name}</th>");
        Metric::columns(evaluation.groups.values())
            .for_each(|(_, metric)| put!(out, "<td class=\"number\">{}</td>", percent(group.get(metric))));
        out.push_str("</tr>");
    }
    out.push_str("</table></div>");
}

/// Precision over recall at IoU 0.5, one line a group.
fn curves(out: &mut String, evaluation: &Evaluation) {
    let (width, height, left, bottom) = (420.0, 260.0, 44.0, 36.0);
    let x = |recall: f64| left + recall * (width - left - 64.0);
    let y = |precision: f64| (height - bottom) - precision * (height - bottom - 12.0);
    put!(out, "<figure><svg class=\"plot\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"Precision over recall\">");
    for tick in 0..=4 {
        let value = f64::from(tick) / 4.0;
        let (tick_x, tick_y) = (x(value), y(value));
        put!(out, "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{tick_y:.1}\" y2=\"{tick_y:.1}\"/>", x(0.0), x(1.0));
        put!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>", left - 6.0, tick_y + 4.0);
        put!(out, "<text x=\"{tick_x:.1}\" y=\"{}\" text-anchor=\"middle\">{value}</text>", height - bottom + 16.0);
    }
    put!(out, "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">recall</text>", x(0.5), height - 4.0);
    put!(out, "<text transform=\"translate(11 {}) rotate(-90)\" text-anchor=\"middle\">precision</text>", y(0.5));
    let mut label_y = 26.0;
    for name in ["novel", "base", "all"] {
        let Some(curve) = evaluation.curves.get(name) else { continue };
        let points: Vec<String> = curve.iter().enumerate().map(|(r, p)| format!("{:.1},{:.1}", x(r as f64 / 100.0), y(*p))).collect();
        put!(out, "<polyline class=\"curve {name}\" points=\"{}\"/>", points.join(" "));
        put!(out, "<line class=\"curve {name}\" x1=\"{}\" x2=\"{}\" y1=\"{label_y}\" y2=\"{label_y}\"/>", width - 58.0, width - 42.0);
        put!(out, "<text x=\"{}\" y=\"{}\">{name}</text>", width - 38.0, label_y + 4.0);
        label_y += 18.0;
    }
    out.push_str("</svg><figcaption>Precision over recall at IoU 0.5, mean over classes</figcaption></figure>");
}

fn classes(out: &mut String, evaluation: &Evaluation) {
    out.push_str("<details><summary>Every class</summary><div class=\"wide\"><table><tr><th>class</th><th></th><th class=\"number\">objects</th><th class=\"number\">AP</th><th class=\"number\">AP50</th><th></th></tr>");
    let mut classes: Vec<_> = evaluation.classes.iter().collect();
    classes.sort_by(|a, b| b.is_novel.cmp(&a.is_novel).then(b.ap.unwrap_or(-1.0).total_cmp(&a.ap.unwrap_or(-1.0))));
    for class in classes {
        let (mark, bar) = (if class.is_novel { "★ novel" } else { "base" }, 100.0 * class.ap50.unwrap_or(0.0));
        put!(out, "<tr><td>{}</td><td>{mark}</td><td class=\"number\">{}</td>", escape(&class.name), class.n_ground_truth);
        put!(out, "<td class=\"number\">{}</td><td class=\"number\">{}</td>", percent(class.ap), percent(class.ap50));
        put!(out, "<td class=\"bar\"><span style=\"width:{bar:.0}%\"></span></td></tr>");
    }
    out.push_str("</table></div></details>");
}

/// The most skipped items of a step that are listed.
const MAX_SKIPPED: usize = 1000;

fn skipped(out: &mut String, gathered: &Gathered) {
    if gathered.skipped.is_empty() {
        return;
    }
    out.push_str("<section id=\"skipped\"><h2>Skipped</h2><p>`ovenbird retry PIPELINE --failed` tries them again.</p>");
    for (step, items) in &gathered.skipped {
        let first = if items.len() > MAX_SKIPPED { format!(", the first {MAX_SKIPPED}") } else { String::new() };
        let (step, n_items) = (escape(&step.to_string()), count(items.len(), "item"));
        put!(out, "<details><summary>{step} <span class=\"quiet\">{n_items}{first}</span></summary>");
        out.push_str("<div class=\"wide\"><table><tr><th>item</th><th>reason</th></tr>");
        for FailedItem { item, reason, .. } in items.iter().take(MAX_SKIPPED) {
            put!(out, "<tr><td>{}</td><td class=\"words\">{}</td></tr>", escape(item), escape(reason));
        }
        out.push_str("</table></div></details>");
    }
    out.push_str("</section>");
}

fn state_words(step: &StepState) -> String {
    match step.wall_s {
        Some(wall_s) => format!("done in {}", duration(wall_s)),
        None => step.state.to_string(),
    }
}

/// A box of the graph: a stage of the file with all its instances.
struct Node<'a> {
    instances: Vec<&'a StepState>,
    /// The places of the nodes that it reads from.
    above: BTreeSet<usize>,
}

impl<'a> Node<'a> {
    fn all(gathered: &'a Gathered) -> Vec<Self> {
        let mut nodes: Vec<Self> = Vec::new();
        let mut places: BTreeMap<&str, usize> = BTreeMap::new();
        for step in &gathered.run.steps {
            let place = *places.entry(&step.id.stage).or_insert(nodes.len());
            if place == nodes.len() {
                nodes.push(Self { instances: Vec::new(), above: BTreeSet::new() });
            }
            nodes[place].instances.push(step);
        }
        for (step, after) in gathered.run.steps.iter().zip(&gathered.after) {
            nodes[places[step.id.stage.as_str()]].above.extend(after.iter().filter_map(|id| places.get(id.stage.as_str())));
        }
        nodes
    }

    /// For each node, the length of the longest path above it. Instances may read from stages that come later in the file, and instances
    /// of two stages may form a circle, which is cut.
    fn layers(nodes: &[Self]) -> Vec<usize> {
        let mut layers = vec![0; nodes.len()];
        for _ in nodes {
            for (place, node) in nodes.iter().enumerate() {
                let lowest = node.above.iter().map(|above| layers[*above] + 1).max().unwrap_or(0);
                layers[place] = lowest.min(nodes.len() - 1);
            }
        }
        layers
    }

    /// The most important state of the instances.
    fn state(&self) -> StepStatus {
        use StepStatus::{CutOff, Done, Dropped, Failed, Reused, Running, Skipped, Waiting};
        let states = [Failed, CutOff, Running, Waiting, Skipped, Done, Dropped, Reused];
        states.into_iter().find(|state| self.instances.iter().any(|step| step.state == *state)).unwrap_or(Waiting)
    }

    fn words(&self) -> String {
        if let [one] = self.instances[..] {
            return state_words(one);
        }
        let made: Vec<f64> = self.instances.iter().filter_map(|step| step.wall_s).collect();
        let mut parts = Vec::new();
        if !made.is_empty() {
            parts.push(format!("{} done in {}", made.len(), duration(made.iter().sum())));
        }
        let mut others: BTreeMap<StepStatus, usize> = BTreeMap::new();
        for step in self.instances.iter().filter(|step| step.wall_s.is_none()) {
            *others.entry(step.state).or_default() += 1;
        }
        parts.extend(others.into_iter().map(|(state, n)| format!("{n} {state}")));
        parts.join(", ")
    }
}

/// Stages in layers: each below the lowest one it reads from.
fn graph(out: &mut String, gathered: &Gathered) {
    let nodes = Node::all(gathered);
    let layer = Node::layers(&nodes);
    let n_layers = layer.iter().max().map_or(0, |layer| layer + 1);
    let in_layer = |wanted: usize| (0..nodes.len()).filter(|node| layer[*node] == wanted).collect::<Vec<_>>();
    let widest = (0..n_layers).map(|wanted| in_layer(wanted).len()).max().unwrap_or(0);
    let (box_width, box_height, gap_x, gap_y) = (156.0, 58.0, 18.0, 40.0);
    let width = widest as f64 * (box_width + gap_x) + gap_x;
    let height = n_layers as f64 * (box_height + gap_y);
    let mut corner = vec![[0.0; 2]; nodes.len()];
    for wanted in 0..n_layers {
        let members = in_layer(wanted);
        let used = members.len() as f64 * (box_width + gap_x) - gap_x;
        for (column, node) in members.into_iter().enumerate() {
            corner[node] = [(width - used) / 2.0 + column as f64 * (box_width + gap_x), wanted as f64 * (box_height + gap_y) + 4.0];
        }
    }
    put!(
        out,
        "<section><h2>Steps</h2><div class=\"wide\"><svg class=\"graph\" viewBox=\"0 0 {width} {height}\" style=\"min-width:{:.0}px;max-width:{:.0}px\" role=\"img\" aria-label=\"The graph of steps\">",
        width * 0.72,
        width * 1.2
    );
    for (node, to) in nodes.iter().zip(&corner) {
        for from in node.above.iter().map(|above| corner[*above]) {
            let (x1, y1, x2, y2) = (from[0] + box_width / 2.0, from[1] + box_height, to[0] + box_width / 2.0, to[1]);
            let middle = f64::midpoint(y1, y2);
            put!(out, "<path class=\"edge\" d=\"M{x1:.0} {y1:.0} C{x1:.0} {middle:.0} {x2:.0} {middle:.0} {x2:.0} {y2:.0}\"/>");
        }
    }
    for (node, [x, y]) in nodes.iter().zip(&corner) {
        let short = |text: &str, most: usize| {
            if text.chars().count() > most { format!("{}…", text.chars().take(most - 1).collect::<String>()) } else { text.to_owned() }
        };
        let first = node.instances[0];
        let title = match node.instances.len() {
            1 => first.id.to_string(),
            n => format!("{} × {n}", first.id.stage),
        };
        put!(
            out,
            "<g class=\"step {}\"><title>{}</title><rect x=\"{x:.0}\" y=\"{y:.0}\" width=\"{box_width}\" height=\"{box_height}\" rx=\"6\"/>",
            node.state().to_string().replace(' ', "-"),
            escape(&node.words())
        );
        put!(out, "<text class=\"id\" x=\"{:.0}\" y=\"{:.0}\">{}</text>", x + 10.0, y + 18.0, escape(&short(&title, 18)));
        put!(out, "<text x=\"{:.0}\" y=\"{:.0}\">{}</text>", x + 10.0, y + 34.0, escape(&short(&first.kind, 22)));
        put!(out, "<text x=\"{:.0}\" y=\"{:.0}\">{}</text></g>", x + 10.0, y + 50.0, escape(&short(&node.words(), 22)));
    }
    out.push_str("</svg></div></section>");
}

fn timeline(out: &mut String, gathered: &Gathered) {
    let end = gathered.spans.values().map(|span| span.1).fold(gathered.run.wall_s, f64::max);
    if gathered.spans.is_empty() || end <= 0.0 {
        return;
    }
    out.push_str("<section><h2>Timeline</h2><div class=\"timeline\">");
    for step in &gathered.run.steps {
        let Some((start, stop)) = gathered.spans.get(&step.id) else { continue };
        let (left, length) = (100.0 * start / end, (100.0 * (stop - start) / end).max(0.4));
        put!(
            out,
            "<div><span>{}</span><span class=\"track\"><i style=\"left:{left:.2}%;width:{length:.2}%\"></i></span><span class=\"number\">{}</span></div>",
            escape(&step.id.to_string()),
            duration(stop - start)
        );
    }
    out.push_str("</div></section>");
}

fn throughput(out: &mut String, gathered: &Gathered) {
    let made: Vec<_> = gathered.run.steps.iter().filter_map(|step| Some((step, step.wall_s?))).collect();
    if made.is_empty() {
        return;
    }
    let total: f64 = made.iter().map(|(_, wall_s)| wall_s).sum();
    out.push_str("<section><h2>Throughput</h2><div class=\"wide\"><table><tr><th>step</th><th class=\"number\">items</th><th class=\"number\">items/s</th><th class=\"number\">written</th><th class=\"number\">time</th><th>share</th></tr>");
    for (step, wall_s) in made {
        let bytes = indicatif::HumanBytes(gathered.bytes.get(&step.id).copied().unwrap_or(0));
        put!(
            out,
            "<tr><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{:.0}</td>",
            escape(&step.id.to_string()),
            step.done,
            step.done as f64 / wall_s.max(1e-3)
        );
        put!(out, "<td class=\"number\">{bytes}</td><td class=\"number\">{}</td>", duration(wall_s));
        put!(out, "<td class=\"bar\"><span style=\"width:{:.0}%\"></span></td></tr>", 100.0 * wall_s / total.max(1e-9));
    }
    out.push_str("</table></div></section>");
}

/// Views per second (items where a step has no views) over time; and the batches that were ready for the network, which have an axis of their own.
fn flow(out: &mut String, gathered: &Gathered) {
    let long_enough: Vec<_> = gathered.flow.iter().filter(|(_, points)| points.len() >= 4).collect();
    if long_enough.is_empty() {
        return;
    }
    out.push_str("<section><h2>Flow</h2><div class=\"plots\">");
    for (step, points) in long_enough {
        let counts_views = points.iter().any(|(_, _, views, _)| *views > 0);
        let amount = |(_, done, views, _): &(f64, u64, u64, u64)| if counts_views { *views } else { *done } as f64;
        let rate = |pair: &[(f64, u64, u64, u64)]| (pair[1].0, (amount(&pair[1]) - amount(&pair[0])) / (pair[1].0 - pair[0].0).max(1e-3));
        let step = escape(&step.to_string());
        let rates: Vec<(f64, f64)> = points.windows(2).map(rate).collect();
        plot(out, &rates, "s", &format!("{step}: {}", if counts_views { "views/s" } else { "items/s" }));
        if counts_views {
            let ready: Vec<(f64, f64)> = points.iter().map(|(at, .., ready)| (*at, *ready as f64)).collect();
            plot(out, &ready, "s", &format!("{step}: batches ready for the network; at 0 it waits for images"));
        }
    }
    out.push_str("</div></section>");
}

/// Losses and learning rate of trainings over their steps.
fn trainings(out: &mut String, gathered: &Gathered) {
    for (step, curve) in &gathered.trainings {
        put!(out, "<section><h2>{}: training</h2><div class=\"plots\">", escape(&step.to_string()));
        for name in curve.names() {
            let points: Vec<(f64, f64)> = curve.of(name).into_iter().map(|(step, value)| (step as f64, value)).collect();
            let last = points.last().map_or(0.0, |(_, value)| *value);
            plot(out, &points, "steps", &format!("{}, {} at the end", escape(name), digits(last)));
        }
        out.push_str("</div></section>");
    }
}

/// Three significant digits.
fn digits(value: f64) -> String {
    if value == 0.0 || (0.01..1e4).contains(&value.abs()) { format!("{value:.3}") } else { format!("{value:.2e}") }
}

/// A line of points (x, y) over an axis that begins at 0, or below it where values do.
fn plot(out: &mut String, points: &[(f64, f64)], unit: &str, caption: &str) {
    let (width, height, left, bottom) = (520.0, 150.0, 56.0, 30.0);
    let (start, end) = points.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (x, _)| (low.min(*x), high.max(*x)));
    let (least, most) = points.iter().fold((0.0, 0.0), |(least, most): (f64, f64), (_, y)| (least.min(*y), most.max(*y)));
    put!(out, "<figure><svg class=\"plot\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{caption}\">");
    put!(out, "<line class=\"grid\" x1=\"{left}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\"/>", width - 12.0, y = height - bottom);
    let mark = |value: f64| match value {
        0.0 => "0".into(),
        value if value.abs() >= 100.0 => format!("{value:.0}"),
        value => digits(value),
    };
    let margin = left - 6.0;
    put!(out, "<text x=\"{margin}\" y=\"18\" text-anchor=\"end\">{}</text>", mark(most));
    put!(out, "<text x=\"{margin}\" y=\"{}\" text-anchor=\"end\">{}</text>", height - bottom + 4.0, mark(least));
    put!(out, "<text x=\"{left}\" y=\"{}\">{start:.0} {unit}</text>", height - 8.0);
    put!(out, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{end:.0} {unit}</text>", width - 12.0, height - 8.0);
    let x = |x: f64| left + (x - start) / (end - start).max(1e-9) * (width - left - 12.0);
    let y = |y: f64| height - bottom - (y - least) / (most - least).max(1e-12) * (height - bottom - 14.0);
    let points: String = points.iter().map(|(at, value)| format!("{:.1},{:.1} ", x(*at), y(*value))).collect();
    put!(out, "<polyline class=\"curve only\" points=\"{points}\"/>");
    put!(out, "</svg><figcaption>{caption}</figcaption></figure>");
}

fn manifests(out: &mut String, gathered: &Gathered) {
    out.push_str("<section><h2>Manifests</h2>");
    for step in &gathered.run.steps {
        let Some(artifact) = gathered.artifacts.get(&step.id) else {
            put!(out, "<p class=\"quiet\">{}: no artifact</p>", escape(&step.id.to_string()));
            continue;
        };
        let manifest = &artifact.manifest;
        let files = || manifest.units.iter().flat_map(|unit| &unit.files);
        let metrics: BTreeMap<_, _> = manifest.units.iter().flat_map(|unit| &unit.metrics).collect();
        let shown = serde_json::json!({
            "fingerprint": manifest.fingerprint,
            "recipe": manifest.recipe,
            "ports": manifest.ports,
            "metrics of the last unit": metrics,
            "made": manifest.made,
        });
        let shown = serde_json::to_string_pretty(&shown).expect("BUG: manifests are plain JSON");
        let bytes = indicatif::HumanBytes(files().map(|file| file.bytes).sum());
        put!(
            out,
            "<details><summary>{} <span class=\"quiet\">{}, {}, {} units, {} files, {bytes}</span></summary><pre>{}</pre></details>",
            escape(&step.id.to_string()),
            escape(&step.kind),
            manifest.fingerprint,
            manifest.units.len(),
            files().count(),
            escape(&shown)
        );
    }
    out.push_str("</section>");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gathered(state: StepStatus) -> Gathered {
        let waiting = StepState::waiting("<script>".into(), "eval/coco");
        let step = StepState { state, done: 3, total: 3, wall_s: Some(2.0), words: "a & b".into(), ..waiting };
        let run = RunState {
            run: "r".into(),
            pipeline: "p".into(),
            description: "d".into(),
            command: "run p".into(),
            started: "s".into(),
            outcome: None,
            last_event: String::new(),
            life: None,
            process: None,
            ends: None,
            wall_s: 2.0,
            steps: vec![step],
            notices: vec!["n".into()],
            matrix: None,
        };
        let class = ovenbird_data::evaluate::ClassResult { name: "owl".into(), is_novel: true, n_ground_truth: 2, ap: None, ap50: None };
        let evaluation = Evaluation {
            format: 1,
            protocol: ovenbird_data::evaluate::Protocol::Coco,
            iou_type: ovenbird_data::evaluate::IouType::Masks,
            groups: BTreeMap::from([("novel".into(), ovenbird_data::evaluate::Summary::default())]),
            classes: vec![class],
            curves: BTreeMap::from([("novel".into(), vec![1.0; 101])]),
            warnings: vec!["4 of 4 <odd>".into()],
            n_images_without_detections: None,
        };
        let skipped = vec![FailedItem { item: "<a>.jpg".into(), reason: "cut & gone".into(), attempts: 1 }];
        Gathered {
            run,
            after: vec![vec![]],
            spans: BTreeMap::from([("<script>".into(), (0.0, 2.0))]),
            bytes: BTreeMap::new(),
            flow: BTreeMap::new(),
            artifacts: BTreeMap::new(),
            evaluations: vec![Evaluated { step: "coco".into(), kind: "eval/coco".into(), port: "evaluation", evaluation }],
            trainings: vec![("<b>".into(), Curve { rows: vec![(10, BTreeMap::from([("loss.boxes".into(), 0.5)]))] })],
            sections: Vec::new(),
            pictures: None,
            skipped: BTreeMap::from([("<script>".into(), skipped)]),
            unread: vec![],
        }
    }

    #[test]
    fn the_page_has_every_section_and_names_cannot_break_it() {
        let page = render(&gathered(StepStatus::Done));
        for words in [
            "<h2>coco</h2><p class=\"quiet\">COCO, masks</p>",
            "</table></div><p class=\"failure\">Warning: 4 of 4 &lt;odd&gt;</p>",
            "Every class",
            "<h2>Steps</h2>",
            "<h2>Timeline</h2>",
            "<h2>Throughput</h2>",
            "<h2>Manifests</h2>",
            "<h2>Notes</h2>",
            "1 item skipped</a> (&lt;script&gt; 1)",
            "<td>&lt;a&gt;.jpg</td><td class=\"words\">cut &amp; gone</td>",
            "–",
        ] {
            assert!(page.contains(words), "{words}");
        }
        assert!(!page.contains("<script>") && !page.contains("http://") && !page.contains("src=\"http"));
    }

    #[test]
    fn a_failed_step_is_named_at_the_top() {
        assert!(render(&gathered(StepStatus::Failed)).contains("failed.</strong> a &amp; b"));
    }
}
