//! Matches the entries of a file of proposals to images, and checks that boxes fit their images.

use std::{collections::BTreeMap, path::Path};

use super::{Entries, IdMap, ImageName, Proposal};
use crate::{
    Error, Result,
    annotations::{Annotations, ImageId, ImageInfo, ImageOrder},
    boxes::Xyxy,
};

/// How far a box may reach outside its image, in px: proposal networks round.
const TOLERANCE_PX: f32 = 1.0;
/// Proposals by image.
#[derive(Debug)]
pub struct Matched {
    /// One entry for every image of the annotations.
    pub by_image: BTreeMap<ImageId, Vec<Proposal>>,
    /// Which entry of the file is of which image.
    pub id_map: IdMap,
    /// The order of entries without names.
    pub order: Option<ImageOrder>,
    /// The number of images in the file that the annotations do not have.
    pub n_others: usize,
}

/// Explanations for boxes outside their images.
const OTHERS: &str = "the proposals seem to be of other images, or of resized ones";
const OTHERS_OR_ORDER: &str = "the proposals seem to be of other images, or of resized ones, or in another order";

/// A fault of an entry, with its hint.
struct Misfit {
    problem: String,
    hint: &'static str,
}

/// Matches every entry to an image, and checks the boxes against it.
///
/// Entries without names are matched by `id_map`, or else by [`order`]. Names that the annotations do not have are left out, and counted.
/// Fails where an image has no entry or two, and where boxes or scores do not fit.
pub fn matched(
    entries: Entries,
    annotations: &Annotations,
    asked: Option<ImageOrder>,
    id_map: Option<&IdMap>,
    path: &Path,
) -> Result<Matched> {
    let malformed = |problem: String, hint: &str| Error::Malformed { path: path.to_owned(), problem, hint: Some(hint.into()) };
    let these = "use the proposals made for exactly these annotations";
    let entries = match (entries, id_map) {
        (Entries::InOrder(entries), Some(id_map)) => id_map.name(entries, path)?,
        (Entries::Named(_), Some(_)) => {
            return Err(malformed("the file names its images itself, but there is an id map".into(), "leave `id_map` out"));
        }
        (entries, None) => entries,
    };
    let entries = match entries {
        Entries::InOrder(entries) => {
            let order = order(&entries, annotations, asked, path)?;
            let images = annotations.images_in(order);
            let id_map = IdMap::in_order(&images, &entries);
            let by_image = images.into_iter().map(|image| image.id).zip(entries).collect();
            return Ok(Matched { by_image, id_map, order: Some(order), n_others: 0 });
        }
        Entries::Named(entries) => entries,
    };
    let (n_entries, paths) = (entries.len(), Paths::of(annotations));
    let (mut by_image, mut id_map) = (BTreeMap::new(), IdMap { places: BTreeMap::new(), counts: Vec::new() });
    let mut stranger = None;
    for (place, (name, proposals)) in entries.into_iter().enumerate() {
        id_map.counts.push(proposals.len() as u64);
        let image = paths.image(&name, annotations);
        id_map.places.extend(image.map(|image| (image, place)));
        match image {
            Some(image) if by_image.insert(image, proposals).is_some() => {
                return Err(malformed(format!("image {image}: two entries, the second as {name}"), these));
            }
            Some(_) => {}
            None => drop(stranger.get_or_insert(name)),
        }
    }
    let absent: Vec<&ImageInfo> = annotations.images.iter().filter(|image| !by_image.contains_key(&image.id)).collect();
    if let Some(first) = absent.first() {
        let (n_absent, n_images) = (absent.len(), annotations.images.len());
        let named = stranger.map(|name| format!("; {name} is the first of {} that they do not have", n_entries - by_image.len()));
        let problem = format!(
            "no entry for {n_absent} of the {n_images} images of the annotations, of which image {} (`{}`) is the first{}",
            first.id,
            first.file_name,
            named.unwrap_or_default()
        );
        return Err(malformed(problem, these));
    }
    let in_order: Vec<Vec<Proposal>> = by_image.values().cloned().collect();
    check(&in_order, &annotations.images_in(ImageOrder::Id), OTHERS).map_err(|Misfit { problem, hint }| malformed(problem, hint))?;
    Ok(Matched { n_others: n_entries - by_image.len(), by_image, id_map, order: None })
}

/// Images by their paths.
pub(super) struct Paths {
    by_path: BTreeMap<String, ImageId>,
    /// By the last part alone: whole paths.
    by_name: BTreeMap<String, Vec<(String, ImageId)>>,
}

impl Paths {
    pub(super) fn of(annotations: &Annotations) -> Self {
        let (mut by_path, mut by_name) = (BTreeMap::new(), BTreeMap::<_, Vec<_>>::new());
        for image in &annotations.images {
            let path = slashes(&image.file_name);
            by_name.entry(last_part(&path).to_owned()).or_default().push((path.clone(), image.id));
            by_path.insert(path, image.id);
        }
        Self { by_path, by_name }
    }

    /// The image that a name is of, if it is plainly one: the paths may begin in different folders.
    pub(super) fn image(&self, name: &ImageName, annotations: &Annotations) -> Option<ImageId> {
        let by_id = |id: i64| annotations.image(ImageId(u64::try_from(id).ok()?)).map(|image| image.id);
        let path = match name {
            ImageName::Id(id) => return by_id(*id),
            ImageName::Text(text) => slashes(text),
        };
        let mut endings = path.match_indices('/').map(|(slash, _)| &path[slash + 1..]);
        let shorter = || endings.find_map(|ending| self.by_path.get(ending));
        let longer = || {
            let ending = format!("/{path}");
            let mut longer = self.by_name.get(last_part(&path))?.iter().filter(|(path, _)| path.ends_with(&ending));
            longer.next().filter(|_| longer.next().is_none()).map(|(_, image)| *image)
        };
        self.by_path.get(&path).or_else(shorter).copied().or_else(|| by_id(path.trim().parse().ok()?)).or_else(longer)
    }
}

fn last_part(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn slashes(path: &str) -> String {
    path.replace('\\', "/").trim_start_matches("./").to_owned()
}

/// Checks proposals against images, and finds the order in which their entries are.
///
/// There must be as many entries as images, every number finite, no box inside out or more than 1 px outside its image, and every score
/// in [0, 1]. Where the file lists its images in ascending id there is one order only. Otherwise it is the one that was `asked` for, or
/// the only one that the boxes fit; fails where they fit both or neither. `path` is for the message.
pub(super) fn order(proposals: &[Vec<Proposal>], annotations: &Annotations, asked: Option<ImageOrder>, path: &Path) -> Result<ImageOrder> {
    let malformed = |problem: String, hint: String| Err(Error::Malformed { path: path.to_owned(), problem, hint: Some(hint) });
    if proposals.len() != annotations.images.len() {
        let (n_proposals, n_images) = (proposals.len(), annotations.images.len());
        let problem = format!("proposals of {n_proposals} images, but the annotations have {n_images}");
        return malformed(problem, "use the proposals made for exactly these annotations".into());
    }
    let check_in = |order: ImageOrder| check(proposals, &annotations.images_in(order), OTHERS_OR_ORDER);
    if annotations.file_order.is_sorted() {
        return match check_in(ImageOrder::Id) {
            Ok(()) => Ok(asked.unwrap_or(ImageOrder::Id)),
            Err(Misfit { problem, hint }) => malformed(problem, hint.into()),
        };
    }
    match (asked, check_in(ImageOrder::Id), check_in(ImageOrder::File)) {
        (Some(ImageOrder::Id) | None, Ok(()), Err(_)) | (Some(ImageOrder::Id), Ok(()), Ok(())) => Ok(ImageOrder::Id),
        (Some(ImageOrder::File) | None, Err(_), Ok(())) | (Some(ImageOrder::File), Ok(()), Ok(())) => Ok(ImageOrder::File),
        (Some(ImageOrder::Id), Err(Misfit { problem, .. }), Ok(())) => malformed(
            format!("{problem}, with entries in ascending image id"),
            "the boxes fit the order in which the annotations list the images: set `with: {order: file}`".into(),
        ),
        (Some(ImageOrder::File), Ok(()), Err(Misfit { problem, .. })) => malformed(
            format!("{problem}, with entries in the order in which the annotations list the images"),
            "the boxes fit ascending image ids: set `with: {order: id}`".into(),
        ),
        (None, Ok(()), Ok(())) => malformed(
            "the entries have no image ids, the annotations do not list the images in ascending id, and the boxes fit both orders".into(),
            "set `with: {order: file}` if the entries are in the order in which the annotations list the images, as mmdet writes them; \
             set `with: {order: id}` if they are in ascending image id"
                .into(),
        ),
        (_, Err(by_id), Err(in_file)) => malformed(
            format!(
                "the boxes fit neither order of the images: in ascending id, {}; in the order of the annotations' file, {}",
                by_id.problem, in_file.problem
            ),
            format!("{}; `with: {{order: file}}` or `{{order: id}}` says which order entries have", by_id.hint),
        ),
    }
}

/// Checks each entry against the image at the same place. `outside`: why boxes may leave their images. Fails at the first that does not fit, and names its image and row.
fn check(proposals: &[Vec<Proposal>], images: &[&ImageInfo], outside: &'static str) -> Result<(), Misfit> {
    let misfit = |problem: String, hint: &'static str| Err(Misfit { problem, hint });
    for (of_image, image) in proposals.iter().zip(images) {
        let (width, height) = (image.width as f32 + TOLERANCE_PX, image.height as f32 + TOLERANCE_PX);
        for (row, Proposal { xyxy, score }) in of_image.iter().enumerate() {
            let Xyxy { x1, y1, x2, y2 } = *xyxy;
            let place = format!("image {}, row {row}", image.id);
            if ![x1, y1, x2, y2, *score].iter().all(|number| number.is_finite()) {
                return misfit(
                    format!("{place}: expected finite numbers, found [{x1}, {y1}, {x2}, {y2}], score {score}"),
                    "make the proposals again",
                );
            }
            if xyxy.width() < 0.0 || xyxy.height() < 0.0 {
                return misfit(format!("{place}: box [{x1}, {y1}, {x2}, {y2}] has x2 < x1 or y2 < y1"), "expected x1, y1, x2, y2, score");
            }
            if x1 < -TOLERANCE_PX || y1 < -TOLERANCE_PX || x2 > width || y2 > height {
                let problem =
                    format!("{place}: box [{x1}, {y1}, {x2}, {y2}] extends beyond the image of {} x {} px", image.width, image.height);
                return misfit(problem, outside);
            }
            if !(0.0..=1.0).contains(score) {
                return misfit(format!("{place}: expected a score in [0, 1], found {score}"), "expected x1, y1, x2, y2, score");
            }
        }
    }
    Ok(())
}
